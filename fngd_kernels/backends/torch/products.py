"""The matrix products that all Gram algorithms consist of."""

from math import ceil

import torch
from torch import Tensor

from ... import native
from ...torch_private import HAS_ONEDNN_PRODUCT, onednn_rows_product
from .costs import row_block

NATIVE_MAX_ROWS = 512
"""With more rows, the library's products of row blocks are faster than the extension's kernel."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums over `dtype` are kept in: at least fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


ONEDNN_MACS = 1 << 20
"""Products of fewer multiply-adds take oneDNN longer to prepare than to compute."""


def rows_product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y^T for x (M,D) and y (N,D)."""
    (m, d), n = x.shape, y.shape[0]
    if HAS_ONEDNN_PRODUCT and x.dtype == torch.float32 and x.is_cpu and m * d * n >= ONEDNN_MACS:
        return onednn_rows_product(_untangled(x), _untangled(y))
    return x @ y.T


def _untangled(x: Tensor) -> Tensor:
    """Return x (M,D), copied if its rows or columns overlap or interleave, which oneDNN does not accept."""
    (m, d), (row, column) = x.shape, x.stride()
    return x if (column == 1 and row >= d) or (row == 1 and column >= m) else x.contiguous()


def add_gram(k: Tensor, rows: Tensor) -> None:
    """Add rows rows^T to the upper triangle of k (N,N); what is below the diagonal is left undefined."""
    n = rows.shape[0]
    if native.AVAILABLE and k.device.type == "cpu" and rows.stride(1) == 1 and n <= NATIVE_MAX_ROWS:
        native.extension.add_gram(k, rows)
        return
    block = row_block(n)
    for i in range(0, n, block):
        k[i : i + block, i:].add_(rows_product(rows[i : i + block], rows[i:]))


def mirror(k: Tensor) -> Tensor:
    """Write the upper triangle of k (N,N) over the lower one, and return k."""
    n = k.shape[0]
    block = max(128, ceil(n / 16))
    for i in range(0, n, block):
        diagonal = k[i : i + block, i : i + block]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
        if i + block < n:
            k[i + block :, i : i + block] = k[i : i + block, i + block :].T
    return k
