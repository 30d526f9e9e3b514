"""Channels compressed by sums with random signs, which are computed where they are used."""

from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from .common import capability
from .rounding import rounded
from .tiles import tile


@triton.jit
def _signs(channels, key):
    """Return 1 or -1 for each number of a channel: a bit of it after MurmurHash3's last steps."""
    x = channels.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return 1.0 - 2.0 * (x >> 31).to(tl.float32)


@triton.jit(do_not_specialize=["key"])
def _sketch_kernel(
    X,
    Y,
    rows,
    positions,
    channels,
    size,
    stride_xn,
    stride_xp,
    stride_xc,
    stride_yn,
    stride_yp,
    stride_yc,
    key,
    BP: tl.constexpr,
    BR: tl.constexpr,
):
    group = tl.program_id(1)
    offs_p = tl.program_id(0) * BP + tl.arange(0, BP)
    offs_r = tl.program_id(2) * BR + tl.arange(0, BR)
    mask_p, mask_r = offs_p < rows, offs_r < size
    samples = (offs_p // positions).to(tl.int64)
    places = (offs_p % positions).to(tl.int64)
    x_rows = X + samples * stride_xn + places * stride_xp
    acc = tl.zeros([BP, BR], dtype=tl.float32)
    for start in range(0, channels, size):
        mask_c = mask_r & (start + offs_r < channels)
        offs_c = group * channels + start + offs_r
        x = tl.load(
            x_rows[:, None] + offs_c.to(tl.int64)[None, :] * stride_xc,
            mask=mask_p[:, None] & mask_c[None, :],
            other=0.0,
        )  # [BP, BR]
        acc += x.to(tl.float32) * _signs(offs_c, key)[None, :]
    y_rows = Y + samples * stride_yn + places * stride_yp
    columns = (group * size + offs_r).to(tl.int64) * stride_yc
    y = rounded(acc, Y.dtype.element_ty)
    tl.store(y_rows[:, None] + columns[None, :], y, mask=mask_p[:, None] & mask_r[None, :])


def sketch(x: Tensor, groups: int, size: int, key: int, y: Tensor) -> None:
    """Write x (N,P,C), its channels compressed within groups, to y (N,P,groups * size).

    Reads x once, and is fastest where its channels or its positions are contiguous.

    Args:
        x: What is compressed.
        groups: Groups of channels.
        size: Buckets of a group.
        key: What the signs are computed from.
        y: The result, of x's dtype.
    """
    samples, positions, channels = x.shape
    chosen = tile("sketch", capability(x.device), x.itemsize)
    blocks = {**chosen.launch, "BR": min(chosen.blocks["BR"], triton.next_power_of_2(size))}
    rows = samples * positions
    _sketch_kernel[(ceil(rows / blocks["BP"]), groups, ceil(size / blocks["BR"]))](
        X=x,
        Y=y,
        rows=rows,
        positions=positions,
        channels=channels // groups,
        size=size,
        stride_xn=x.stride(0),
        stride_xp=x.stride(1),
        stride_xc=x.stride(2),
        stride_yn=y.stride(0),
        stride_yp=y.stride(1),
        stride_yc=y.stride(2),
        key=key,
        **blocks,
    )
