"""Gram matrices of layers with one position per sample: many small layers in one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, lower_block, multiprocessors, rows_product, store_symmetric
from .tiles import Tile, tile

LAYERS = 16
"""Most layers of one launch: their pointers, sizes and strides are arguments, which a graph can record."""


@triton.jit
def _pick(VALUES, pid):
    """Return VALUES[pid] of a tuple."""
    value = VALUES[0]
    for place in tl.static_range(1, len(VALUES)):
        value = tl.where(pid == place, VALUES[place], value)
    return value


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
    stride_kl,
    stride_ki,
    bias,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
):
    pid_block, pid_layer = tl.program_id(0), tl.program_id(1)
    block_i, block_j = lower_block(pid_block, tl.cdiv(n, ROWS))
    offs_i = block_i * ROWS + tl.arange(0, ROWS)
    offs_j = block_j * ROWS + tl.arange(0, ROWS)
    mask_i, mask_j = offs_i < n, offs_j < n
    stride = _pick(stride_an, pid_layer)
    a = rows_product(
        _pick(A, pid_layer),
        offs_i.to(tl.int64) * stride,
        offs_j.to(tl.int64) * stride,
        mask_i,
        mask_j,
        _pick(inputs, pid_layer),
        _pick(stride_ai, pid_layer),
        PRECISION,
        BK,
    )  # [ROWS, ROWS]
    stride = _pick(stride_en, pid_layer)
    e = rows_product(
        _pick(E, pid_layer),
        offs_i.to(tl.int64) * stride,
        offs_j.to(tl.int64) * stride,
        mask_i,
        mask_j,
        _pick(outputs, pid_layer),
        _pick(stride_eo, pid_layer),
        PRECISION,
        BK,
    )  # [ROWS, ROWS]
    k = (a + _pick(bias, pid_layer)) * e
    store_symmetric(K + pid_layer.to(tl.int64) * stride_kl, k, offs_i, offs_j, n, stride_ki, 1)


def _tile(n: int, layers: int, like: Tensor) -> Tile:
    """Return large tiles where they keep the device busy, else small ones."""
    arch = capability(like.device)
    large = tile("gram_hadamard", arch, like.dtype)
    blocks = triton.cdiv(n, large.blocks["ROWS"])
    busy = layers * blocks * (blocks + 1) // 2 >= multiprocessors(like.device)
    return large if busy else tile("gram_hadamard_few", arch, like.dtype)


def gram_hadamard(
    a: Sequence[Tensor], e: Sequence[Tensor], bias: Sequence[bool], precision: str = "ieee"
) -> Tensor:
    """Return K (L,N,N), K_l = (A_l A_l^T + bias_l) * (E_l E_l^T), for a_l (N,1,I_l) and e_l (N,1,O_l).

    N^2 (I_l + O_l) / 2 MACs and the padding of tiles. All layers share N, device and dtype.

    precision: "ieee", "tf32" or "tf32x3", of products of float32
    """
    n = a[0].shape[0]
    chosen = _tile(n, len(a), a[0])
    blocks = triton.cdiv(n, chosen.blocks["ROWS"])
    k = a[0].new_empty((len(a), n, n), dtype=torch.float32)
    for first in range(0, len(a), LAYERS):
        a_some, e_some = tuple(a[first : first + LAYERS]), tuple(e[first : first + LAYERS])
        _gram_hadamard_kernel[(blocks * (blocks + 1) // 2, len(a_some))](
            A=a_some,
            E=e_some,
            K=k[first:],
            n=n,
            inputs=tuple(layer.shape[-1] for layer in a_some),
            outputs=tuple(layer.shape[-1] for layer in e_some),
            stride_an=tuple(layer.stride(0) for layer in a_some),
            stride_ai=tuple(layer.stride(-1) for layer in a_some),
            stride_en=tuple(layer.stride(0) for layer in e_some),
            stride_eo=tuple(layer.stride(-1) for layer in e_some),
            stride_kl=n * n,
            stride_ki=n,
            bias=tuple(map(int, bias[first : first + LAYERS])),
            PRECISION=precision,
            **chosen.launch,
        )
    return k
