"""Weighted gradient of a linear layer: a product over all positions, with rows scaled as they are read."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...workspace import default_workspace
from .common import aligned, capability, dot, multiprocessors
from .rounding import rounded
from .tiles import tile

PART_STEPS = 16
"""Cost of a partial tile, in steps of the product: 8 for traffic, 8 for the launch that sums; an estimate."""


@triton.jit(do_not_specialize=["rows", "part_rows"], do_not_specialize_on_alignment=["positions"])
def _combine_kernel(
    A,
    E,
    S,
    W,
    B,
    rows,
    positions,
    inputs,
    outputs,
    part_rows,
    stride_an,
    stride_at,
    stride_ai,
    stride_en,
    stride_et,
    stride_eo,
    stride_s,
    stride_p,
    stride_wo,
    WITH_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
):
    pid_i, pid_o, pid_p = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_o = (pid_o * BO + tl.arange(0, BO)).to(tl.int64)
    offs_i = (pid_i * BI + tl.arange(0, BI)).to(tl.int64)
    offs_k = tl.arange(0, BK)
    mask_o, mask_i = offs_o < outputs, offs_i < inputs
    first = tl.program_id(2) * part_rows
    last = tl.minimum(first + part_rows, rows)

    acc = tl.zeros([BO, BI], dtype=tl.float32)
    # Summed over its rows only after the loop, so that threads do not exchange sums in each step.
    acc_b = tl.zeros([BK, BO], dtype=tl.float32)
    for start in range(first, last, BK):
        offs_r = start + offs_k
        mask_r = offs_r < last
        offs_n = (offs_r // positions).to(tl.int64)
        offs_t = (offs_r % positions).to(tl.int64)
        s = tl.load(S + offs_n * stride_s, mask=mask_r, other=0).to(tl.float32)
        row_e = E + offs_n * stride_en + offs_t * stride_et
        row_a = A + offs_n * stride_an + offs_t * stride_at
        mask_e, mask_a = mask_r[:, None] & mask_o[None, :], mask_r[:, None] & mask_i[None, :]
        e = tl.load(row_e[:, None] + offs_o[None, :] * stride_eo, mask=mask_e, other=0)  # [BK, BO]
        a = tl.load(row_a[:, None] + offs_i[None, :] * stride_ai, mask=mask_a, other=0)  # [BK, BI]
        scaled = e.to(tl.float32) * s[:, None]  # [BK, BO]
        if WITH_BIAS:
            acc_b += scaled
        # Rounded once: a relative error of 2^-9 (bf16) or 2^-12 (fp16) per term, none if s is a power of two.
        acc = dot(tl.trans(rounded(scaled, e.dtype)), a, acc, PRECISION)  # [BO, BI]

    tile_w = W + pid_p * stride_p + offs_o[:, None] * stride_wo + offs_i[None, :]
    tl.store(tile_w, rounded(acc, W.dtype.element_ty), mask=mask_o[:, None] & mask_i[None, :])
    if WITH_BIAS:
        b = rounded(tl.sum(acc_b, 0), B.dtype.element_ty)  # [BO]
        tl.store(B + pid_p * stride_p + offs_o, b, mask=mask_o & (pid_i == 0))


@triton.jit(do_not_specialize=["parts"])
def _sum_parts_kernel(
    PARTS, W, B, parts, weights, biases, stride_p, WITH_BIAS: tl.constexpr, BD: tl.constexpr
):
    offs = tl.program_id(0).to(tl.int64) * BD + tl.arange(0, BD)
    acc = tl.zeros([BD], dtype=tl.float32)
    for _ in range(parts):
        acc += tl.load(PARTS + offs, mask=offs < weights + biases, other=0)
        PARTS += stride_p
    tl.store(W + offs, rounded(acc, W.dtype.element_ty), mask=offs < weights)
    if WITH_BIAS:
        mask_b = (offs >= weights) & (offs < weights + biases)
        tl.store(B + offs - weights, rounded(acc, B.dtype.element_ty), mask=mask_b)


@lru_cache(maxsize=4096)
def parts_of(steps: int, tiles: int, processors: int, limit: int) -> int:
    """Return in how many parts, at most `limit`, a product of `steps` steps and `tiles` tiles is fastest.

    parts programs for each tile run in ceil(tiles parts / processors) waves of ceil(steps / parts) steps.
    """

    def cost(parts: int) -> int:
        waves = triton.cdiv(tiles * parts, processors)
        return waves * (triton.cdiv(steps, parts) + (PART_STEPS if parts > 1 else 0))

    return min(range(1, max(1, min(steps, limit, processors)) + 1), key=cost)


def combine(a: Tensor, e: Tensor, s: Tensor, bias: bool, precision: str = "ieee") -> list[Tensor]:
    """Return [sum_n s_n E_n^T A_n (O,I)] and with bias sum_n s_n sum_t E_nt (O,), for a, e of 2 or 3 axes.

    Costs NTIO MACs. If there are too few tiles to fill the device, several programs share the rows of one,
    and their partial sums (parts,O,I) are summed in order.
    """
    a, e = (t if t.ndim == 3 else t.unsqueeze(1) for t in (a, e))
    (n, t, inputs), outputs = a.shape, e.shape[2]
    rows = n * t
    if rows > 1 << 30:
        raise ValueError(f"a: expected at most 2^30 positions, got {rows}")
    kernel = "combine" if aligned(a, e) else "combine_unaligned"
    chosen = tile(kernel, capability(a.device), a.itemsize)
    bo, bi, bk = (chosen.blocks[name] for name in ("BO", "BI", "BK"))
    grid_i, grid_o = max(1, triton.cdiv(inputs, bi)), triton.cdiv(outputs, bo)
    # Weight and bias of a part are neighbours in memory, so that one launch sums both.
    weights, biases = outputs * inputs, outputs if bias else 0
    limit = default_workspace() // max(1, 4 * (weights + biases))
    parts = parts_of(triton.cdiv(rows, bk), grid_i * grid_o, multiprocessors(a.device), limit)

    w = a.new_empty((outputs, inputs))
    b = a.new_empty(outputs) if bias else None
    if parts == 1:
        partial_w, partial_b = w, b
    else:
        partial_w = a.new_empty((parts, weights + biases), dtype=torch.float32)
        partial_b = partial_w[:, weights:]
    _combine_kernel[(grid_i, grid_o, parts)](
        A=a,
        E=e,
        S=s,
        W=partial_w,
        B=partial_b,
        rows=rows,
        positions=t,
        inputs=inputs,
        outputs=outputs,
        part_rows=triton.cdiv(triton.cdiv(rows, parts), bk) * bk,
        stride_an=a.stride(0),
        stride_at=a.stride(1),
        stride_ai=a.stride(2),
        stride_en=e.stride(0),
        stride_et=e.stride(1),
        stride_eo=e.stride(2),
        stride_s=s.stride(0),
        stride_p=partial_w.stride(0),
        stride_wo=inputs,
        WITH_BIAS=bias,
        PRECISION=precision,
        **chosen.launch,
    )
    if parts > 1:
        summing = tile("combine_sum", capability(a.device), 4)
        _sum_parts_kernel[(triton.cdiv(weights + biases, summing.blocks["BD"]),)](
            PARTS=partial_w,
            W=w,
            B=b,
            parts=parts,
            weights=weights,
            biases=biases,
            stride_p=partial_w.stride(0),
            WITH_BIAS=bias,
            **summing.launch,
        )
    return [w] if b is None else [w, b]
