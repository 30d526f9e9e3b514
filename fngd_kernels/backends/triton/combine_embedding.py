"""Weighted gradient of an embedding: sums over runs of equal ids, without atomic operations."""

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, dot
from .rounding import rounded
from .tiles import tile


@triton.jit(
    do_not_specialize=["num_embeddings", "padding_idx"],
    do_not_specialize_on_alignment=["positions"],
)
def _sum_chunks_kernel(
    IDS,
    ORDER,
    E,
    S,
    W,
    ENDS,
    rows,
    positions,
    dim,
    num_embeddings,
    padding_idx,
    stride_en,
    stride_et,
    stride_ed,
    stride_s,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    pid_c = tl.program_id(0).to(tl.int64)
    first = pid_c * BR
    offs_r = first + tl.arange(0, BR)
    offs_d = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)
    mask_r, mask_d = offs_r < rows, offs_d < dim
    ids = tl.load(IDS + offs_r, mask=mask_r, other=-1)
    previous = tl.load(IDS + offs_r - 1, mask=mask_r & (offs_r > 0), other=-1)
    before = tl.load(IDS + first - 1, mask=first > 0, other=-1)
    after = tl.load(IDS + first + BR, mask=first + BR < rows, other=-1)
    # An id outside the weight never writes outside it.
    kept = (ids >= 0) & (ids < num_embeddings) & (ids != padding_idx)

    place = tl.load(ORDER + offs_r, mask=mask_r, other=0)
    offs_n, offs_t = place // positions, place % positions
    s = tl.load(S + offs_n * stride_s, mask=kept, other=0).to(tl.float32)
    row_e = E + offs_n * stride_en + offs_t * stride_et
    mask_e = kept[:, None] & mask_d[None, :]
    e = tl.load(row_e[:, None] + offs_d[None, :] * stride_ed, mask=mask_e, other=0)  # [BR, BD]
    scaled = e.to(tl.float32) * s[:, None]
    # Each row of the product is the sum over all rows with the same id. It is as exact as in float32: 0 and 1
    # are exact in tf32, and tf32x3 splits the other factor into three terms.
    same = (ids[:, None] == ids[None, :]).to(tl.float32)  # [BR, BR]
    sums = dot(same, scaled, tl.zeros([BR, BD], dtype=tl.float32), "tf32x3")  # [BR, BD]

    head = kept & ((ids != previous) | (offs_r == first))
    begun, continued = ids == before, ids == after
    row_w = W + ids.to(tl.int64) * dim
    mask_w = (head & ~begun & ~continued)[:, None] & mask_d[None, :]
    tl.store(row_w[:, None] + offs_d[None, :], rounded(sums, W.dtype.element_ty), mask=mask_w)
    # The sum of a run that continues outside the chunk goes to ENDS: row 0 if it began before, row 1 if it
    # begins here.
    row_p = ENDS + (2 * pid_c + tl.where(begun, 0, 1)) * dim
    mask_p = (head & (begun | continued))[:, None] & mask_d[None, :]
    tl.store(row_p[:, None] + offs_d[None, :], sums, mask=mask_p)


@triton.jit(do_not_specialize=["num_embeddings", "padding_idx"])
def _join_chunks_kernel(
    IDS,
    ENDS,
    W,
    rows,
    dim,
    num_embeddings,
    padding_idx,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    pid_c = tl.program_id(0).to(tl.int64)
    offs_d = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)
    mask_d = offs_d < dim
    first = pid_c * BR
    before = tl.load(IDS + first - 1, mask=first > 0, other=-1)
    last = tl.load(IDS + first + BR - 1, mask=first + BR < rows, other=-1)
    after = tl.load(IDS + first + BR, mask=first + BR < rows, other=-1)
    kept = (last >= 0) & (last < num_embeddings) & (last != padding_idx)
    # A run is summed by the program of the chunk in which it begins, in the order of the chunks.
    if kept & (last == after) & (last != before):
        acc = tl.load(ENDS + (2 * pid_c + 1) * dim + offs_d, mask=mask_d, other=0)  # [BD]
        chunk = pid_c + 1
        while tl.load(IDS + chunk * BR, mask=chunk * BR < rows, other=-1) == last:
            offs_c = chunk + tl.arange(0, BC)
            mask_c = tl.load(IDS + offs_c * BR, mask=offs_c * BR < rows, other=-1) == last
            row_p = ENDS + 2 * offs_c * dim
            mask_p = mask_c[:, None] & mask_d[None, :]
            acc += tl.sum(tl.load(row_p[:, None] + offs_d[None, :], mask=mask_p, other=0), 0)
            chunk += BC
        tl.store(W + last.to(tl.int64) * dim + offs_d, rounded(acc, W.dtype.element_ty), mask=mask_d)


def combine_embedding(
    ids: Tensor, e: Tensor, s: Tensor, num_embeddings: int, padding_idx: int | None
) -> Tensor:
    """Return W_v = sum over the positions with id v of s_n e_nt, (num_embeddings,D), and 0 for padding_idx.

    Positions are sorted by id and summed in chunks of equal size; then runs of equal ids that extend over
    several chunks are joined. A gradient that is not finite makes the sums of all ids in its chunk not
    finite.
    """
    if ids.ndim == 1:
        ids, e = ids.unsqueeze(1), e.unsqueeze(1)
    dim = e.shape[2]
    # Sorting 32 bits takes half the passes of sorting 64.
    sorted_ids, order = ids.flatten().to(torch.int32).sort(stable=True)
    rows = len(sorted_ids)
    chosen = tile("combine_embedding", capability(e.device), e.itemsize)
    chunks = ceil(rows / chosen.blocks["BR"])
    w = e.new_zeros((num_embeddings, dim))
    ends = e.new_empty((chunks, 2, dim), dtype=torch.float32)
    grid = (chunks, ceil(dim / chosen.blocks["BD"]))
    padding_idx = -1 if padding_idx is None else padding_idx
    _sum_chunks_kernel[grid](
        IDS=sorted_ids,
        ORDER=order,
        E=e,
        S=s,
        W=w,
        ENDS=ends,
        rows=rows,
        positions=ids.shape[1],
        dim=dim,
        num_embeddings=num_embeddings,
        padding_idx=padding_idx,
        stride_en=e.stride(0),
        stride_et=e.stride(1),
        stride_ed=e.stride(2),
        stride_s=s.stride(0),
        **chosen.launch,
    )
    _join_chunks_kernel[grid](
        IDS=sorted_ids,
        ENDS=ends,
        W=w,
        rows=rows,
        dim=dim,
        num_embeddings=num_embeddings,
        padding_idx=padding_idx,
        BC=32,
        **chosen.launch,
    )
    return w
