"""Gram matrix of a layer with one position per sample."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import aligned, capability, lower_block, multiprocessors, rows_product, store_symmetric
from .tiles import Tile, lower_blocks, tile


@triton.jit
def _gram_hadamard_kernel(
    A,
    E,
    K,
    n,
    inputs,
    outputs,
    stride_an,
    stride_ai,
    stride_en,
    stride_eo,
    stride_ki,
    bias,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
):
    block_i, block_j = lower_block(tl.program_id(0), tl.cdiv(n, ROWS))
    offs_i = block_i * ROWS + tl.arange(0, ROWS)
    offs_j = block_j * ROWS + tl.arange(0, ROWS)
    mask_i, mask_j = offs_i < n, offs_j < n
    a = rows_product(
        A,
        offs_i.to(tl.int64) * stride_an,
        offs_j.to(tl.int64) * stride_an,
        mask_i,
        mask_j,
        inputs,
        stride_ai,
        PRECISION,
        BK,
    )  # [ROWS, ROWS]
    e = rows_product(
        E,
        offs_i.to(tl.int64) * stride_en,
        offs_j.to(tl.int64) * stride_en,
        mask_i,
        mask_j,
        outputs,
        stride_eo,
        PRECISION,
        BK,
    )  # [ROWS, ROWS]
    store_symmetric(K, (a + bias) * e, offs_i, offs_j, n, stride_ki, 1)


def _tile(a: Tensor, e: Tensor) -> Tile:
    """Return a large tile if large ones keep the device busy, else a small one."""
    arch, suffix = capability(a.device), "" if aligned(a, e) else "_unaligned"
    large = tile("gram_hadamard" + suffix, arch, a.itemsize)
    busy = lower_blocks(a.shape[0], large.blocks["ROWS"]) >= multiprocessors(a.device)
    return large if busy else tile("gram_hadamard_few" + suffix, arch, a.itemsize)


def gram_hadamard(a: Tensor, e: Tensor, bias: bool, precision: str = "ieee") -> Tensor:
    """Return K = (A A^T + bias) * (E E^T), elementwise, for a (N,1,I) and e (N,1,O).

    Costs N^2 (I + O) / 2 MACs and the padding of tiles.

    Args:
        a: Input of the layer.
        e: Gradient at its output.
        bias: Whether the bias belongs to the block.
        precision: "ieee", "tf32" or "tf32x3": how float32 is multiplied.
    """
    n = a.shape[0]
    k = a.new_empty((n, n), dtype=torch.float32)
    chosen = _tile(a, e)
    _gram_hadamard_kernel[(lower_blocks(n, chosen.blocks["ROWS"]),)](
        A=a,
        E=e,
        K=k,
        n=n,
        inputs=a.shape[-1],
        outputs=e.shape[-1],
        stride_an=a.stride(0),
        stride_ai=a.stride(-1),
        stride_en=e.stride(0),
        stride_eo=e.stride(-1),
        stride_ki=n,
        # Not an integer: Triton would compile a version of its own for 1.
        bias=float(bias),
        PRECISION=precision,
        **chosen.launch,
    )
    return k
