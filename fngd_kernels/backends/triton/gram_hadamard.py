"""Gram matrix of a layer with one position per sample; one launch serves several layers of one shape."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    alignment,
    capability,
    chosen_layer,
    launches,
    lower_block,
    multiprocessors,
    rows_product,
    store_symmetric,
)
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
    stride_kl,
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
    pid_layer = tl.program_id(1)
    a = rows_product(
        chosen_layer(A, pid_layer),
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
        chosen_layer(E, pid_layer),
        offs_i.to(tl.int64) * stride_en,
        offs_j.to(tl.int64) * stride_en,
        mask_i,
        mask_j,
        outputs,
        stride_eo,
        PRECISION,
        BK,
    )  # [ROWS, ROWS]
    K += pid_layer.to(tl.int64) * stride_kl
    store_symmetric(K, (a + bias) * e, offs_i, offs_j, n, stride_ki, 1)


def _tile(a: Sequence[Tensor], e: Sequence[Tensor]) -> Tile:
    """Return a large tile if large ones keep the device busy, else a small one."""
    device, itemsize = a[0].device, a[0].itemsize
    arch, suffix = capability(device), alignment(*a, *e)
    large = tile("gram_hadamard" + suffix, arch, itemsize)
    busy = len(a) * lower_blocks(len(a[0]), large.blocks["ROWS"]) >= multiprocessors(device)
    return large if busy else tile("gram_hadamard_few" + suffix, arch, itemsize)


def gram_hadamard(a: Tensor, e: Tensor, bias: bool, precision: str = "ieee") -> Tensor:
    """Return K = (A A^T + bias) * (E E^T), elementwise, for a (N,1,I) and e (N,1,O).

    Costs N^2 (I + O) / 2 MACs and the padding of tiles.

    Args:
        a: Input of the layer.
        e: Gradient at its output.
        bias: Whether the bias belongs to the block.
        precision: "ieee", "tf32" or "tf32x3": how float32 is multiplied.
    """
    return gram_hadamard_batch([a], [e], bias, precision)[0]


def gram_hadamard_batch(
    a: Sequence[Tensor], e: Sequence[Tensor], bias: bool, precision: str = "ieee"
) -> Tensor:
    """Return K (L,N,N) of L layers with the same shapes and strides, each as `gram_hadamard` forms it."""
    n = a[0].shape[0]
    k = a[0].new_empty((len(a), n, n), dtype=torch.float32)
    chosen = _tile(a, e)
    for first, some_a, some_e, layers in launches(a, e):
        _gram_hadamard_kernel[(lower_blocks(n, chosen.blocks["ROWS"]), layers)](
            A=some_a,
            E=some_e,
            K=k[first:] if first else k,
            n=n,
            inputs=a[0].shape[-1],
            outputs=e[0].shape[-1],
            stride_an=a[0].stride(0),
            stride_ai=a[0].stride(-1),
            stride_en=e[0].stride(0),
            stride_eo=e[0].stride(-1),
            stride_kl=n * n,
            stride_ki=n,
            # Not an integer: Triton would compile a version of its own for 1.
            bias=float(bias),
            PRECISION=precision,
            **chosen.launch,
        )
    return k
