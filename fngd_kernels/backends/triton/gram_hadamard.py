"""Gram matrices of layers with one position per sample: many small layers in one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import aligned, capability, lower_block, multiprocessors, rows_product, store_symmetric
from .tiles import Tile, lower_blocks, tile

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
    places,
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
    K += tl.cast(_pick(places, pid_layer), tl.int64) * stride_kl
    store_symmetric(K, k, offs_i, offs_j, n, stride_ki, 1)


def _tile(layers: int, like: Tensor, wide: bool) -> Tile:
    """Return large tiles where they keep the device busy, else small ones."""
    arch, suffix = capability(like.device), "" if wide else "_unaligned"
    large = tile("gram_hadamard" + suffix, arch, like.itemsize)
    busy = layers * lower_blocks(like.shape[0], large.blocks["ROWS"]) >= multiprocessors(like.device)
    return large if busy else tile("gram_hadamard_few" + suffix, arch, like.itemsize)


def gram_hadamard(
    a: Sequence[Tensor], e: Sequence[Tensor], bias: Sequence[bool], precision: str = "ieee"
) -> Tensor:
    """Return K (L,N,N), K_l = (A_l A_l^T + bias_l) * (E_l E_l^T), for a_l (N,1,I_l) and e_l (N,1,O_l).

    N^2 (I_l + O_l) / 2 MACs and the padding of tiles. All layers share N, device and dtype. Layers whose rows
    are aligned have a launch of their own: one that is not would narrow the loads of all.

    precision: "ieee", "tf32" or "tf32x3", of products of float32
    """
    n = a[0].shape[0]
    k = a[0].new_empty((len(a), n, n), dtype=torch.float32)
    places: dict[bool, list[int]] = {True: [], False: []}
    for place, layer in enumerate(zip(a, e, strict=True)):
        places[aligned(*layer)].append(place)
    for wide, group in places.items():
        chosen = _tile(len(group), a[0], wide)
        for first in range(0, len(group), LAYERS):
            some = tuple(group[first : first + LAYERS])
            _gram_hadamard_kernel[(lower_blocks(n, chosen.blocks["ROWS"]), len(some))](
                A=tuple(a[place] for place in some),
                E=tuple(e[place] for place in some),
                K=k,
                n=n,
                inputs=tuple(a[place].shape[-1] for place in some),
                outputs=tuple(e[place].shape[-1] for place in some),
                places=some,
                stride_an=tuple(a[place].stride(0) for place in some),
                stride_ai=tuple(a[place].stride(-1) for place in some),
                stride_en=tuple(e[place].stride(0) for place in some),
                stride_eo=tuple(e[place].stride(-1) for place in some),
                stride_kl=n * n,
                stride_ki=n,
                # Not integers, of which Triton makes a 1 a constant: code for every set of biases.
                bias=tuple(float(bias[place]) for place in some),
                PRECISION=precision,
                **chosen.launch,
            )
    return k
