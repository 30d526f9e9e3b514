"""Gradient of a convolution's output scaled per sample, and its weighted sum over samples and space."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, multiprocessors
from .rounding import rounded
from .tiles import tile

PROGRAMS_PER_PROCESSOR = 8
"""Enough small programs in flight to keep the memory busy; more would lengthen the sum of their biases."""


@triton.jit
def _scale_bias_kernel(
    E,
    S,
    OUT,
    PARTS,
    outputs,
    size_z,
    size_y,
    size_x,
    units,
    tiles_p,
    program_units,
    stride_en,
    stride_eo,
    stride_ez,
    stride_ey,
    stride_ex,
    stride_on,
    stride_oo,
    stride_oz,
    stride_oy,
    stride_ox,
    stride_s,
    WITH_BIAS: tl.constexpr,
    BO: tl.constexpr,
    BP: tl.constexpr,
):
    pid_o, pid_u = tl.program_id(0), tl.program_id(1)
    offs_o = (pid_o * BO + tl.arange(0, BO)).to(tl.int64)
    mask_o = offs_o < outputs
    # Summed over space once, after the loop: no exchange between threads in each step.
    acc_b = tl.zeros([BO, BP], dtype=tl.float32)
    first = pid_u * program_units
    for unit in range(first, tl.minimum(first + program_units, units)):
        n = (unit // tiles_p).to(tl.int64)
        offs_p = (unit % tiles_p) * BP + tl.arange(0, BP)
        x, y, z = offs_p % size_x, offs_p // size_x % size_y, offs_p // size_x // size_y
        x, y, z = x.to(tl.int64), y.to(tl.int64), z.to(tl.int64)
        mask = mask_o[:, None] & (z < size_z)[None, :]
        row_e = E + n * stride_en + offs_o * stride_eo
        row_out = OUT + n * stride_on + offs_o * stride_oo
        e = tl.load(
            row_e[:, None] + (x * stride_ex + y * stride_ey + z * stride_ez)[None, :], mask=mask, other=0
        )  # [BO, BP]
        scaled = e.to(tl.float32) * tl.load(S + n * stride_s).to(tl.float32)
        tl.store(
            row_out[:, None] + (x * stride_ox + y * stride_oy + z * stride_oz)[None, :],
            rounded(scaled, OUT.dtype.element_ty),
            mask=mask,
        )
        if WITH_BIAS:
            acc_b += scaled
    if WITH_BIAS:
        tl.store(PARTS + pid_u.to(tl.int64) * outputs + offs_o, tl.sum(acc_b, 1), mask=mask_o)


@triton.jit
def _sum_rows_kernel(PARTS, B, parts, outputs, BM: tl.constexpr, BO: tl.constexpr):
    offs_o = tl.program_id(0) * BO + tl.arange(0, BO)
    mask_o = offs_o < outputs
    acc = tl.zeros([BM, BO], dtype=tl.float32)
    for start in range(0, parts, BM):
        offs_m = start + tl.arange(0, BM)
        mask = (offs_m < parts)[:, None] & mask_o[None, :]
        acc += tl.load(PARTS + offs_m.to(tl.int64)[:, None] * outputs + offs_o[None, :], mask=mask, other=0)
    tl.store(B + offs_o, rounded(tl.sum(acc, 0), B.dtype.element_ty), mask=mask_o)


def scale_bias(e: Tensor, s: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Return s_n e_n in the layout of e (N,O,*space), and with_bias sum_n s_n sum_p E_np (O,), else None.

    One pass over e. The bias sums what is not rounded yet, in parts of each program that are added in order.
    """
    n, outputs = e.shape[:2]
    out = torch.empty_like(e)
    (size_z, ez, oz), (size_y, ey, oy), (size_x, ex, ox) = _space_axes(e, out)
    positions = size_z * size_y * size_x
    chosen = tile("scale_bias", capability(e.device), e.itemsize)
    # The longer side of a tile lies along the memory.
    area = chosen.blocks["BOP"]
    if e.stride(1) < ex:
        bo = min(triton.next_power_of_2(outputs), area // 4)
        bp = min(triton.next_power_of_2(positions), area // bo)
    else:
        bp = min(triton.next_power_of_2(positions), area // 4)
        bo = min(triton.next_power_of_2(outputs), area // bp)
    tiles_o, tiles_p = triton.cdiv(outputs, bo), triton.cdiv(positions, bp)
    units = n * tiles_p
    programs = max(1, PROGRAMS_PER_PROCESSOR * multiprocessors(e.device) // max(1, tiles_o))
    program_units = max(1, triton.cdiv(units, programs))
    parts = triton.cdiv(units, program_units)
    partial_b = e.new_empty((parts, outputs), dtype=torch.float32) if with_bias else None
    _scale_bias_kernel[(tiles_o, parts)](
        E=e,
        S=s,
        OUT=out,
        PARTS=partial_b,
        outputs=outputs,
        size_z=size_z,
        size_y=size_y,
        size_x=size_x,
        units=units,
        tiles_p=tiles_p,
        program_units=program_units,
        stride_en=e.stride(0),
        stride_eo=e.stride(1),
        stride_ez=ez,
        stride_ey=ey,
        stride_ex=ex,
        stride_on=out.stride(0),
        stride_oo=out.stride(1),
        stride_oz=oz,
        stride_oy=oy,
        stride_ox=ox,
        stride_s=s.stride(0),
        WITH_BIAS=with_bias,
        BO=bo,
        BP=bp,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    if partial_b is None:
        return out, None
    b = e.new_empty(outputs)
    summing = tile("scale_bias_sum", capability(e.device), 4)
    _sum_rows_kernel[(triton.cdiv(outputs, summing.blocks["BO"]),)](
        PARTS=partial_b, B=b, parts=parts, outputs=outputs, **summing.launch
    )
    return out, b


def _space_axes(e: Tensor, out: Tensor) -> list[tuple[int, int, int]]:
    """Return size, stride in e, stride in out of three axes, outermost first; even ones are merged."""
    axes: list[tuple[int, int, int]] = []
    for size, in_e, in_out in zip(e.shape[2:], e.stride()[2:], out.stride()[2:], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1:] == (size * in_e, size * in_out):
            axes[-1] = (axes[-1][0] * size, in_e, in_out)
        else:
            axes.append((size, in_e, in_out))
    return [(1, 0, 0)] * (3 - len(axes)) + axes
