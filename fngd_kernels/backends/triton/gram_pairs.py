"""Gram matrix of a linear layer from all pairs of positions.

K_ij = sum_{t,u} (<a_it, a_ju> + bias) <e_it, e_ju>. The rows of a tile are a
chunk of the positions of a few samples. Both products of a pair of tiles stay in registers until they are
summed over positions. One launch serves several layers with the same shapes and strides.
"""

from collections.abc import Sequence
from math import ceil

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
    sample_sums,
    store_symmetric,
)
from .reduce import sum_partials
from .tiles import PairGrid, Tile, diagonal_grid, pair_grid, tile, waves_cost

SMALL_TILE_MAC = 1.5
"""Cost of a multiply-add in a small tile, whose rows are read more often, in those of a large one; an
estimate.
"""


@triton.jit(do_not_specialize_on_alignment=["pairs"])
def _gram_pairs_kernel(
    A,
    E,
    K,
    n,
    positions,
    inputs,
    outputs,
    pairs,
    stride_an,
    stride_at,
    stride_ai,
    stride_en,
    stride_et,
    stride_eo,
    stride_kp,
    stride_kl,
    stride_ki,
    stride_kj,
    BIAS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    SAMPLES: tl.constexpr,
    POSITIONS: tl.constexpr,
    BK: tl.constexpr,
):
    pid_block, pid_part, pid_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    a_layer, e_layer = chosen_layer(A, pid_layer), chosen_layer(E, pid_layer)
    chunks = tl.cdiv(positions, POSITIONS)
    if DIAGONAL:
        block_i, block_j, chunk_pairs = pid_block, pid_block, chunks * (chunks + 1) // 2
    else:
        block_i, block_j = lower_block(pid_block, tl.cdiv(n, SAMPLES))
        chunk_pairs = chunks * chunks
    first = pid_part * pairs

    rows = tl.arange(0, SAMPLES * POSITIONS)
    offs_n_i = (block_i * SAMPLES + rows // POSITIONS).to(tl.int64)
    offs_n_j = (block_j * SAMPLES + rows // POSITIONS).to(tl.int64)
    acc = tl.zeros([SAMPLES, SAMPLES], dtype=tl.float32)
    for pair in range(first, tl.minimum(first + pairs, chunk_pairs)):
        if DIAGONAL:
            chunk_i, chunk_j = lower_block(pair, chunks)
        else:
            chunk_i, chunk_j = pair // chunks, pair % chunks
        offs_t_i = (chunk_i * POSITIONS + rows % POSITIONS).to(tl.int64)
        offs_t_j = (chunk_j * POSITIONS + rows % POSITIONS).to(tl.int64)
        mask_i = (offs_n_i < n) & (offs_t_i < positions)
        mask_j = (offs_n_j < n) & (offs_t_j < positions)
        a = rows_product(
            a_layer,
            offs_n_i * stride_an + offs_t_i * stride_at,
            offs_n_j * stride_an + offs_t_j * stride_at,
            mask_i,
            mask_j,
            inputs,
            stride_ai,
            PRECISION,
            BK,
        )  # [SAMPLES * POSITIONS, SAMPLES * POSITIONS]
        e = rows_product(
            e_layer,
            offs_n_i * stride_en + offs_t_i * stride_et,
            offs_n_j * stride_en + offs_t_j * stride_et,
            mask_i,
            mask_j,
            outputs,
            stride_eo,
            PRECISION,
            BK,
        )  # [SAMPLES * POSITIONS, SAMPLES * POSITIONS]
        if BIAS:
            a += 1.0
        sums = sample_sums(a * e, SAMPLES, POSITIONS)  # [SAMPLES, SAMPLES]
        if DIAGONAL:
            sums = tl.where(chunk_i == chunk_j, sums, 2 * sums)
        acc += sums

    samples = tl.arange(0, SAMPLES)
    K += pid_part.to(tl.int64) * stride_kp + pid_layer.to(tl.int64) * stride_kl
    store_symmetric(K, acc, block_i * SAMPLES + samples, block_j * SAMPLES + samples, n, stride_ki, stride_kj)


def _tile_and_grid(a: Sequence[Tensor], e: Sequence[Tensor]) -> tuple[Tile, PairGrid]:
    """Return a large tile and its grid, or a small one where large ones leave more of the device idle."""
    (n, positions, _), layers, processors = a[0].shape, len(a), multiprocessors(a[0].device)
    arch, itemsize, suffix = capability(a[0].device), a[0].itemsize, alignment(*a, *e)
    large, small = (tile(name + suffix, arch, itemsize) for name in ("gram_pairs", "gram_pairs_few"))
    # The programs of all layers run side by side.
    programs = ceil(2 * processors / layers)
    coarse, fine = (pair_grid(n, positions, chosen.blocks["ROWS"], programs) for chosen in (large, small))
    if SMALL_TILE_MAC * waves_cost(fine, layers, processors) < waves_cost(coarse, layers, processors):
        return small, fine
    return large, coarse


def gram_pairs(a: Tensor, e: Tensor, bias: bool, precision: str = "ieee") -> Tensor:
    """Return K_ij = sum_{t,u} (<a_it, a_ju> + bias) <e_it, e_ju> for a (N,T,I) and e (N,T,O).

    Costs N^2 T^2 (I + O) / 2 MACs and the padding of tiles. If there are few pairs of blocks, several
    programs share the pairs of positions of one. Their partial sums take at most 64 KiB for each
    multiprocessor, beside K's size.

    Args:
        a: Input of the layer.
        e: Gradient at its output.
        bias: Whether the bias belongs to the block.
        precision: "ieee", "tf32" or "tf32x3": how float32 is multiplied.
    """
    return gram_pairs_batch([a], [e], bias, precision)[0]


def gram_pairs_batch(a: Sequence[Tensor], e: Sequence[Tensor], bias: bool, precision: str = "ieee") -> Tensor:
    """Return K (L,N,N) of L layers with the same shapes and strides, each as `gram_pairs` forms it.

    The more layers, the fewer programs share a pair of blocks.
    """
    n = a[0].shape[0]
    chosen, grid = _tile_and_grid(a, e)
    k = a[0].new_empty((grid.parts, len(a), n, n), dtype=torch.float32)
    _launch(a, e, k, k.stride(), bias, False, precision, grid, chosen)
    return k[0] if grid.parts == 1 else sum_partials(k)


def gram_pairs_diag(a: Tensor, e: Tensor, bias: bool, precision: str = "ieee") -> Tensor:
    """Return the diagonal (N,) of `gram_pairs`: squared norms of the samples' contributions.

    Costs N T^2 (I + O) / 2 MACs and the padding of tiles.
    """
    n, positions, _ = a.shape
    chosen = tile("gram_pairs" + alignment(a, e), capability(a.device), a.itemsize)
    grid = diagonal_grid(n, positions, chosen.blocks["ROWS"], 2 * multiprocessors(a.device))
    norms = a.new_empty((grid.parts, n), dtype=torch.float32)
    _launch([a], [e], norms, (n, n, 1, 0), bias, True, precision, grid, chosen)
    return norms[0] if grid.parts == 1 else norms.sum(0)


def _launch(
    a: Sequence[Tensor],
    e: Sequence[Tensor],
    k: Tensor,
    strides: tuple[int, ...],
    bias: bool,
    diagonal: bool,
    precision: str,
    grid: PairGrid,
    chosen: Tile,
) -> None:
    (n, positions, inputs), outputs = a[0].shape, e[0].shape[2]
    for first, some_a, some_e, layers in launches(a, e):
        _gram_pairs_kernel[(grid.blocks, grid.parts, layers)](
            A=some_a,
            E=some_e,
            K=k[:, first:] if first else k,
            n=n,
            positions=positions,
            inputs=inputs,
            outputs=outputs,
            pairs=grid.pairs,
            stride_an=a[0].stride(0),
            stride_at=a[0].stride(1),
            stride_ai=a[0].stride(2),
            stride_en=e[0].stride(0),
            stride_et=e[0].stride(1),
            stride_eo=e[0].stride(2),
            stride_kp=strides[0],
            stride_kl=strides[1],
            stride_ki=strides[2],
            stride_kj=strides[3],
            BIAS=bias,
            DIAGONAL=diagonal,
            PRECISION=precision,
            SAMPLES=grid.samples,
            POSITIONS=grid.positions,
            BK=chosen.blocks["BK"],
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
