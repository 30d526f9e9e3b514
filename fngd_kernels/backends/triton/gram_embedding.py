"""Gram matrix of an embedding from all pairs of positions that hold the same id.

K_ij = sum_{t,u} [ids_it = ids_ju] <e_it, e_ju>. The rows of a tile are a
chunk of the positions of a few samples. For a pair of tiles without a common id no product is computed. Where
the positions of a sample fill several tiles they are taken in the order of their ids, so that most pairs of
tiles have none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    alignment,
    capability,
    lower_block,
    multiprocessors,
    rows_product,
    sample_sums,
    store_symmetric,
)
from .reduce import sum_partials
from .tiles import PairGrid, Tile, diagonal_grid, pair_grid, tile


@triton.jit(do_not_specialize=["padding_idx"], do_not_specialize_on_alignment=["pairs"])
def _gram_embedding_kernel(
    IDS,
    ORDER,
    E,
    K,
    n,
    positions,
    size,
    pairs,
    stride_in,
    stride_it,
    stride_on,
    stride_en,
    stride_et,
    stride_ed,
    stride_kp,
    stride_ki,
    stride_kj,
    padding_idx,
    HAS_PADDING: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    SAMPLES: tl.constexpr,
    POSITIONS: tl.constexpr,
    BK: tl.constexpr,
):
    pid_block, pid_part = tl.program_id(0), tl.program_id(1)
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
        ids_i = tl.load(IDS + offs_n_i * stride_in + offs_t_i * stride_it, mask=mask_i, other=0)
        ids_j = tl.load(IDS + offs_n_j * stride_in + offs_t_j * stride_it, mask=mask_j, other=0)
        # [SAMPLES * POSITIONS, SAMPLES * POSITIONS]
        same = (ids_i[:, None] == ids_j[None, :]) & mask_i[:, None] & mask_j[None, :]
        if HAS_PADDING:
            same &= ids_i[:, None] != padding_idx
        if tl.max(tl.max(same.to(tl.int32), axis=1), axis=0) > 0:
            if HAS_ORDER:
                offs_t_i = tl.load(ORDER + offs_n_i * stride_on + offs_t_i, mask=mask_i, other=0)
                offs_t_j = tl.load(ORDER + offs_n_j * stride_on + offs_t_j, mask=mask_j, other=0)
            e = rows_product(
                E,
                offs_n_i * stride_en + offs_t_i * stride_et,
                offs_n_j * stride_en + offs_t_j * stride_et,
                mask_i,
                mask_j,
                size,
                stride_ed,
                PRECISION,
                BK,
            )  # [SAMPLES * POSITIONS, SAMPLES * POSITIONS]
            sums = sample_sums(tl.where(same, e, 0.0), SAMPLES, POSITIONS)  # [SAMPLES, SAMPLES]
            if DIAGONAL:
                sums = tl.where(chunk_i == chunk_j, sums, 2 * sums)
            acc += sums

    samples = tl.arange(0, SAMPLES)
    K += pid_part.to(tl.int64) * stride_kp
    store_symmetric(K, acc, block_i * SAMPLES + samples, block_j * SAMPLES + samples, n, stride_ki, stride_kj)


def _tile(e: Tensor) -> Tile:
    return tile("gram_embedding" + alignment(e), capability(e.device), e.itemsize)


def gram_embedding(ids: Tensor, e: Tensor, padding_idx: int | None, precision: str = "tf32x3") -> Tensor:
    """Return K_ij = sum_{t,u} [ids_it = ids_ju] <e_it, e_ju> for ids (N,T) and e (N,T,D).

    Costs at most N^2 T^2 D / 2 MACs, only in pairs of tiles that share an id. Partial sums are as in
    `gram_pairs`.

    Args:
        ids: Ids of the positions.
        e: Gradient at the layer's output.
        padding_idx: Id that contributes nothing.
        precision: "ieee", "tf32" or "tf32x3": how float32 is multiplied.
    """
    n, positions = ids.shape
    chosen = _tile(e)
    grid = pair_grid(n, positions, chosen.blocks["ROWS"], 2 * multiprocessors(e.device))
    k = e.new_empty((grid.parts, n, n), dtype=torch.float32)
    _launch(ids, e, k, k.stride(), padding_idx, False, precision, grid, chosen)
    return k[0] if grid.parts == 1 else sum_partials(k)


def gram_embedding_diag(ids: Tensor, e: Tensor, padding_idx: int | None, precision: str = "tf32x3") -> Tensor:
    """Return the diagonal (N,) of `gram_embedding`: squared norms of the samples' contributions.

    Costs at most N T^2 D / 2 MACs.
    """
    n, positions = ids.shape
    chosen = _tile(e)
    grid = diagonal_grid(n, positions, chosen.blocks["ROWS"], 2 * multiprocessors(e.device))
    norms = e.new_empty((grid.parts, n), dtype=torch.float32)
    _launch(ids, e, norms, (n, 1, 0), padding_idx, True, precision, grid, chosen)
    return norms[0] if grid.parts == 1 else norms.sum(0)


def _launch(
    ids: Tensor,
    e: Tensor,
    k: Tensor,
    strides: tuple[int, ...],
    padding_idx: int | None,
    diagonal: bool,
    precision: str,
    grid: PairGrid,
    chosen: Tile,
) -> None:
    order = None
    if ids.shape[1] > grid.positions:
        ids, order = ids.sort(dim=1)
    _gram_embedding_kernel[(grid.blocks, grid.parts)](
        IDS=ids,
        ORDER=order,
        E=e,
        K=k,
        n=e.shape[0],
        positions=e.shape[1],
        size=e.shape[2],
        pairs=grid.pairs,
        stride_in=ids.stride(0),
        stride_it=ids.stride(1),
        stride_on=ids.shape[1],
        stride_en=e.stride(0),
        stride_et=e.stride(1),
        stride_ed=e.stride(2),
        stride_kp=strides[0],
        stride_ki=strides[1],
        stride_kj=strides[2],
        padding_idx=0 if padding_idx is None else padding_idx,
        HAS_PADDING=padding_idx is not None,
        HAS_ORDER=order is not None,
        DIAGONAL=diagonal,
        PRECISION=precision,
        SAMPLES=grid.samples,
        POSITIONS=grid.positions,
        BK=chosen.blocks["BK"],
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
