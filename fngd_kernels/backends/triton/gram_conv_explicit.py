"""Gram matrix of a convolution from its per-sample contributions; patches are read from x, never formed."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from ...workspace import WORKSPACE
from .common import capability, dot
from .contributions import (
    Weight,
    default_precision,
    extent,
    gram_by_chunks,
    launch_options,
    store_contributions,
)
from .tiles import tile

TAP_CHANNELS = 32
"""From this many channels per group on, a tile holds channels of one kernel offset, with one mask."""

# Specialized code (for 1 or multiples of 16) would not load wider, so all layers share one version.
NOT_SPECIALIZED = [
    "first_tile",
    "tiles_o",
    "tiles_i",
    *(f"{name}_{axis}" for name in ("size", "kernel", "step", "padding", "dilation") for axis in "dhw"),
    "out_h",
    "out_w",
]


@triton.jit
def _divided(x, divisor, reciprocal):
    """Return x // divisor and x % divisor of 0 <= x < 2^31; reciprocal is (2^31 - 1) // divisor."""
    quotient = tl.umulhi(2 * x.to(tl.uint32), reciprocal.to(tl.uint32)).to(tl.int32)
    rest = x - quotient * divisor
    # The rounded reciprocal makes the quotient too small by at most one.
    short = rest >= divisor
    return tl.where(short, quotient + 1, quotient), tl.where(short, rest - divisor, rest)


@triton.jit
def _inside(offs, corner, size):
    """Return whether 0 <= offs + corner < size for all pairs; on unsigned numbers this is one comparison."""
    return (offs[:, None] + corner[None, :]).to(tl.uint32) < size.to(tl.uint32)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _contributions_conv_kernel(
    X,
    E,
    C,
    channels,
    outputs,
    positions,
    first_tile,
    tiles_o,
    tiles_i,
    extent_o,
    extent_i,
    size_d,
    size_h,
    size_w,
    kernel_d,
    kernel_h,
    kernel_w,
    out_h,
    out_w,
    stride_xn,
    stride_xc,
    stride_xd,
    stride_xh,
    stride_xw,
    stride_en,
    stride_eo,
    stride_ed,
    stride_eh,
    stride_ew,
    stride_et,
    stride_cn,
    step_d,
    step_h,
    step_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    HAS_DEPTH: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    ONE_TAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
):
    pid_w, pid_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = first_tile + pid_w
    pid_i, pid_o, pid_g = at % tiles_i, at // tiles_i % tiles_o, at // (tiles_i * tiles_o)
    offs_o = pid_o * extent_o + tl.arange(0, BO)
    # Columns of the weight are ordered (kernel offset, channel); K does not depend on their order.
    taps = kernel_d * kernel_h * kernel_w
    if ONE_TAP:
        tiles_c = tiles_i // taps
        tap = tl.zeros([1], dtype=tl.int32) + pid_i // tiles_c  # [1]
        offs_c = pid_i % tiles_c * extent_i + tl.arange(0, BI)
    else:
        offs_i = pid_i * extent_i + tl.arange(0, BI)
        tap, offs_c = offs_i // channels, offs_i % channels  # [BI]
    mask_o, mask_i = offs_o < outputs, (offs_c < channels) & (tap < taps)
    # The pixel that output position 0 reads for each kernel offset.
    corner_d = tap // (kernel_h * kernel_w) * dilation_d - padding_d
    corner_h = tap // kernel_w % kernel_h * dilation_h - padding_h
    corner_w = tap % kernel_w * dilation_w - padding_w
    corner = corner_h.to(tl.int64) * stride_xh + corner_w.to(tl.int64) * stride_xw
    if HAS_DEPTH:
        corner += corner_d.to(tl.int64) * stride_xd
    offs_xc, offs_eo = (pid_g * channels + offs_c).to(tl.int64), (pid_g * outputs + offs_o).to(tl.int64)
    column_x = X + pid_n * stride_xn + offs_xc * stride_xc + corner  # [BI]
    column_e = E + pid_n * stride_en + offs_eo * stride_eo  # [BO]

    # Two plain divisions for each position would be most of the integer work of the loop.
    reciprocal_h, reciprocal_w = 0x7FFFFFFF // out_h, 0x7FFFFFFF // out_w
    c = tl.zeros([BO, BI], dtype=tl.float32)
    for start in range(0, positions, BT):
        offs_t = start + tl.arange(0, BT)
        mask_t = offs_t < positions
        at_h, at_w = _divided(offs_t, out_w, reciprocal_w)
        if HAS_DEPTH:
            at_d, at_h = _divided(at_h, out_h, reciprocal_h)
        if stride_et is None:
            offs_e = at_h.to(tl.int64) * stride_eh + at_w.to(tl.int64) * stride_ew
            if HAS_DEPTH:
                offs_e += at_d.to(tl.int64) * stride_ed
        else:
            offs_e = offs_t.to(tl.int64) * stride_et
        # Relative to the pixel that output position 0 reads, which column_x contains for each kernel offset.
        h, w = at_h * step_h, at_w * step_w
        pixel = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
        if IN_PAIRS:
            # Makes a warp read along positions.
            pixel = tl.max_contiguous(pixel, 2)
        inside = _inside(h, corner_h, size_h) & _inside(w, corner_w, size_w)  # [BT, 1 or BI]
        if HAS_DEPTH:
            d = at_d * step_d
            pixel += d.to(tl.int64) * stride_xd
            inside &= _inside(d, corner_d, size_d)
        mask_e, mask_x = mask_t[:, None] & mask_o[None, :], mask_t[:, None] & inside & mask_i[None, :]
        e = tl.load(column_e[None, :] + offs_e[:, None], mask=mask_e, other=0)  # [BT, BO]
        x = tl.load(column_x[None, :] + pixel[:, None], mask=mask_x, other=0)  # [BT, BI]
        c = dot(tl.trans(e), x, c, PRECISION)  # [BO, BI]
    store_contributions(C, c, pid_w, pid_n, extent_o, extent_i, stride_cn, PRECISION, BO, BI)


def _position_stride(e: Tensor) -> int | None:
    """Return the stride of the positions of e (N,O,D,H,W) if they can be read as one axis, else None."""
    axes = [axis for axis in zip(e.shape[2:], e.stride()[2:], strict=True) if axis[0] > 1]
    if any(outer[1] != inner[0] * inner[1] for outer, inner in pairwise(axes)):
        return None
    return axes[-1][1] if axes else 1


def _axes(name: str, values: Sequence[int | None]) -> dict[str, int | None]:
    return {f"{name}{axis}": value for axis, value in zip("dhw", values, strict=True)}


def _form(x: Tensor, e: Tensor, geometry: ConvGeometry, precision: str, workspace: int) -> Weight:
    _, stride, padding, dilation, groups = geometry
    kernel = geometry.kernel
    channels, outputs = x.shape[1] // groups, e.shape[1] // groups
    taps, positions = prod(kernel), prod(e.shape[2:])
    one_tap = channels >= TAP_CHANNELS
    inputs = channels if one_tap else taps * channels
    kernel_tile = "contributions_conv" if one_tap else "contributions_conv_taps"
    chosen = tile(kernel_tile, capability(x.device), x.itemsize)
    options = launch_options(chosen, len(x), outputs, inputs, positions, workspace)
    if not one_tap:
        # Each column then has its own offset and mask, and more columns would not fit into registers.
        options["BI"] = min(options["BI"], 16 * options["num_warps"])
    extent_o, extent_i = extent(outputs, options["BO"]), extent(inputs, options["BI"])
    tiles_o = triton.cdiv(outputs, extent_o)
    tiles_i = triton.cdiv(inputs, extent_i) * (taps if one_tap else 1)
    stride_et = _position_stride(e)
    # Whether an even position and the next one always read neighbouring pixels, because they are in one row.
    in_pairs = x.stride(4) == stride[2] == 1 and e.shape[4] % 2 == 0
    has_depth = any(sizes[0] > 1 for sizes in (x.shape[2:], e.shape[2:], kernel)) or padding[0] > 0

    def form(scratch: Tensor, first: int, count: int) -> None:
        _contributions_conv_kernel[(count, len(x))](
            X=x,
            E=e,
            C=scratch,
            channels=channels,
            outputs=outputs,
            positions=positions,
            first_tile=first,
            tiles_o=tiles_o,
            tiles_i=tiles_i,
            extent_o=extent_o,
            extent_i=extent_i,
            **_axes("size_", x.shape[2:]),
            **_axes("kernel_", kernel),
            out_h=e.shape[3],
            out_w=e.shape[4],
            stride_xn=x.stride(0),
            stride_xc=x.stride(1),
            **_axes("stride_x", x.stride()[2:]),
            stride_en=e.stride(0),
            stride_eo=e.stride(1),
            **_axes("stride_e", e.stride()[2:] if stride_et is None else (None,) * 3),
            stride_et=stride_et,
            stride_cn=scratch.stride(0),
            **_axes("step_", stride),
            **_axes("padding_", padding),
            **_axes("dilation_", dilation),
            HAS_DEPTH=has_depth,
            IN_PAIRS=in_pairs,
            ONE_TAP=one_tap,
            PRECISION=precision,
            **options,
        )

    return Weight(groups * tiles_o * tiles_i, extent_o * extent_i, form)


def _in_three_dimensions(geometry: ConvGeometry) -> ConvGeometry:
    """Return the geometry of the same convolution with leading dimensions of size 1."""
    (outputs, inputs, *kernel), stride, padding, dilation, groups = geometry
    ones, zeros = (1,) * (3 - len(kernel)), (0,) * (3 - len(kernel))
    return ConvGeometry(
        (outputs, inputs, *ones, *kernel), (*ones, *stride), (*zeros, *padding), (*ones, *dilation), groups
    )


def gram_conv_explicit(
    x: Tensor,
    e: Tensor,
    geometry: ConvGeometry,
    bias: bool,
    precision: str | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Return K = sum over tiles of the weight of C C^T, for x (N,C,*space) and e (N,O,*space_out).

    Forming C costs N P O (C/groups) prod(kernel) MACs, with P output positions, and the product N^2/2 MACs
    for each weight.

    Args:
        x: Input of the convolution.
        e: Gradient at its output.
        geometry: The convolution.
        bias: Whether the bias belongs to the block.
        precision: For float32 inputs, how both products are computed; for others, how the second one is. By
            default "ieee" for float32 and "tf32" for the others.
        workspace: Upper bound of scratch memory in bytes.
    """
    precision = precision or default_precision(x.dtype)
    missing = (slice(None),) * 2 + (None,) * (5 - x.ndim)
    x, e = x[missing], e[missing]
    weights = [_form(x, e, _in_three_dimensions(geometry), precision, workspace)]
    if bias:
        # A convolution of an image of ones with kernels of one pixel.
        pixel = x.new_ones(()).expand(len(x), 1, *e.shape[2:])
        ones = ConvGeometry((e.shape[1], 1, 1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1)
        weights.append(_form(pixel, e, ones, precision, workspace))
    return gram_by_chunks(weights, x, precision, workspace)
