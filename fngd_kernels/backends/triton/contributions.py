"""Forms per-sample contributions of linear layers and convolutions, a range of tiles of the weight at a time.

The rows of a product are output positions, taken in blocks of some rows and columns of the image, so that the
offsets in a block never change: a step of the loop moves it by a number that is the same for all threads. A
convolution reads its patches from x; a linear layer is a convolution with kernels of one pixel.
"""

from collections.abc import Callable, Sequence
from math import ceil, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from .common import alignment, capability, dot
from .costs import WIDE_CHANNELS
from .rounding import rounded
from .tiles import Tile, position_block, tile

# Specialized code (for 1 or multiples of 16) would not load wider, so all layers share one version.
NOT_SPECIALIZED = [
    "first_tile",
    "tiles_o",
    "tiles_i",
    "height",
    "width",
    *(f"{name}_{axis}" for name in ("size", "kernel", "step", "padding", "dilation") for axis in "dhw"),
]


@triton.jit
def _inside(offs, corner, size):
    """Return whether 0 <= offs + corner < size for all pairs; on unsigned numbers this is one comparison."""
    return (offs[:, None] + corner[None, :]).to(tl.uint32) < size.to(tl.uint32)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _contributions_kernel(
    X,
    E,
    C,
    channels,
    outputs,
    depth,
    height,
    width,
    steps_h,
    steps_w,
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
    PADDED: tl.constexpr,
    ONE_TAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    COLUMNS: tl.constexpr,
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
    corner = (
        corner_d.to(tl.int64) * stride_xd
        + corner_h.to(tl.int64) * stride_xh
        + corner_w.to(tl.int64) * stride_xw
    )
    offs_xc, offs_eo = (pid_g * channels + offs_c).to(tl.int64), (pid_g * outputs + offs_o).to(tl.int64)
    column_x = X + pid_n * stride_xn + offs_xc * stride_xc + corner  # [BI]
    column_e = E + pid_n * stride_en + offs_eo * stride_eo  # [BO]

    # Positions of a block, and the pixels that they read.
    offs_h, offs_w = tl.arange(0, BT) // COLUMNS, tl.arange(0, BT) % COLUMNS
    row_e = offs_h.to(tl.int64) * stride_eh + offs_w.to(tl.int64) * stride_ew  # [BT]
    row_x = (offs_h * step_h).to(tl.int64) * stride_xh + (offs_w * step_w).to(tl.int64) * stride_xw  # [BT]
    tile_e, tile_x = column_e[None, :] + row_e[:, None], column_x[None, :] + row_x[:, None]

    c = tl.zeros([BO, BI], dtype=tl.float32)
    for step in range(0, depth * steps_h * steps_w):
        first_h, first_w = step // steps_w * (BT // COLUMNS), step % steps_w * COLUMNS
        move_e, move_x = tl.zeros([], dtype=tl.int64), tl.zeros([], dtype=tl.int64)
        if HAS_DEPTH:
            at_d, first_h = step // (steps_h * steps_w), step // steps_w % steps_h * (BT // COLUMNS)
            move_e += at_d.to(tl.int64) * stride_ed
            move_x += (at_d * step_d).to(tl.int64) * stride_xd
        move_e += first_h.to(tl.int64) * stride_eh + first_w.to(tl.int64) * stride_ew
        move_x += (first_h * step_h).to(tl.int64) * stride_xh + (first_w * step_w).to(tl.int64) * stride_xw
        at_h, at_w = offs_h + first_h, offs_w + first_w
        inside_e = ((at_h < height) & (at_w < width))[:, None]  # [BT, 1]
        inside_x = inside_e
        if PADDED:
            inside_x &= _inside(at_h * step_h, corner_h, size_h) & _inside(at_w * step_w, corner_w, size_w)
            if HAS_DEPTH:
                inside_x &= _inside(tl.zeros([1], dtype=tl.int32) + at_d * step_d, corner_d, size_d)
        e = tl.load(tile_e + move_e, mask=inside_e & mask_o[None, :], other=0)  # [BT, BO]
        x = tl.load(tile_x + move_x, mask=inside_x & mask_i[None, :], other=0)  # [BT, BI]
        c = dot(tl.trans(e), x, c, PRECISION)  # [BO, BI]

    if PRECISION == "tf32" and C.dtype.element_ty == tl.float32:
        # Rounded to nearest here, because the product truncates: K would be 7e-4 too small.
        bits = (c.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        c = tl.where(c == c, bits.to(tl.float32, bitcast=True), c)
    # The extent_o x extent_i elements of the tile, without gaps.
    rows, columns = tl.arange(0, BO), tl.arange(0, BI)
    row_c = C + pid_n * stride_cn + pid_w.to(tl.int64) * extent_o * extent_i
    mask = (rows < extent_o)[:, None] & (columns < extent_i)[None, :]
    tl.store(row_c + rows[:, None] * extent_i + columns[None, :], rounded(c, C.dtype.element_ty), mask=mask)


class Weight(NamedTuple):
    """A weight divided into tiles of equal size, and the launch that forms C of a range of its tiles.

    Attributes:
        tiles: How many tiles there are.
        area: Elements of a tile.
        form: Called with scratch memory (N, count * area), the first tile and the count of tiles.
    """

    tiles: int
    area: int
    form: Callable[[Tensor, int, int], None]


def contributions(
    x: Tensor, e: Tensor, geometry: ConvGeometry, precision: str, dtype: torch.dtype, room: int
) -> Weight:
    """Return how C of x (N,C,D,H,W) and e (N,O,D,H,W) is formed, in tiles of which `room` bytes hold one.

    Args:
        x: Input of the convolution.
        e: Gradient at its output.
        geometry: The convolution, in three dimensions.
        precision: How float32 inputs are multiplied; "tf32" also says that C in float32 will be.
        dtype: The dtype of C.
        room: Bytes for a tile of all samples, exceeded by the smallest tile only.
    """
    _, stride, padding, dilation, groups = geometry
    kernel = geometry.kernel
    channels, outputs = x.shape[1] // groups, e.shape[1] // groups
    taps = prod(kernel)
    # A tile then holds channels of one kernel offset, with one mask.
    one_tap = channels >= WIDE_CHANNELS
    inputs = channels if one_tap else taps * channels
    depth, height, width = e.shape[2:]
    suffix = alignment(x.movedim(1, -1), e.movedim(1, -1)) if one_tap else "_taps"
    chosen = tile("contributions" + suffix, capability(x.device), x.itemsize)
    options = _launch_options(chosen, len(x) * dtype.itemsize, outputs, inputs, height * width, room)
    if not one_tap:
        # Each column then has its own offset and mask, and more columns would not fit into registers.
        options["BI"] = min(options["BI"], 16 * options["num_warps"])
    block = position_block(height, width, options["BT"])
    extent_o, extent_i = _extent(outputs, options["BO"]), _extent(inputs, options["BI"])
    tiles_o = ceil(outputs / extent_o)
    tiles_i = ceil(inputs / extent_i) * (taps if one_tap else 1)

    def form(scratch: Tensor, first: int, count: int) -> None:
        _contributions_kernel[(count, len(x))](
            X=x,
            E=e,
            C=scratch,
            channels=channels,
            outputs=outputs,
            depth=depth,
            height=height,
            width=width,
            steps_h=ceil(height / block.rows),
            steps_w=ceil(width / block.columns),
            first_tile=first,
            tiles_o=tiles_o,
            tiles_i=tiles_i,
            extent_o=extent_o,
            extent_i=extent_i,
            **_axes("size_", x.shape[2:]),
            **_axes("kernel_", kernel),
            stride_xn=x.stride(0),
            stride_xc=x.stride(1),
            **_axes("stride_x", x.stride()[2:]),
            stride_en=e.stride(0),
            stride_eo=e.stride(1),
            **_axes("stride_e", e.stride()[2:]),
            stride_cn=scratch.stride(0),
            **_axes("step_", stride),
            **_axes("padding_", padding),
            **_axes("dilation_", dilation),
            HAS_DEPTH=any(sizes[0] > 1 for sizes in (x.shape[2:], e.shape[2:], kernel)) or padding[0] > 0,
            PADDED=any(padding),
            ONE_TAP=one_tap,
            PRECISION=precision,
            COLUMNS=block.columns,
            **options,
        )

    return Weight(groups * tiles_o * tiles_i, extent_o * extent_i, form)


def _axes(name: str, values: Sequence[int]) -> dict[str, int]:
    return {f"{name}{axis}": value for axis, value in zip("dhw", values, strict=True)}


def block_size(size: int, limit: int) -> int:
    """Return the smallest block that a matrix product accepts and that holds `size`; at most `limit`."""
    return min(limit, max(16, triton.next_power_of_2(size)))


def _extent(size: int, block: int) -> int:
    """Return the common size, at most `block`, of the fewest equal tiles that cover `size`.

    Tiles of more than 16 begin at multiples of 16, for wide loads and stores.
    """
    extent = ceil(size / ceil(size / block))
    return extent if extent <= 16 else ceil(extent / 16) * 16


def _launch_options(
    chosen: Tile, bytes_per_weight: int, outputs: int, inputs: int, positions: int, room: int
) -> dict[str, int]:
    """Return blocks and launch options for C of a layer: the tile, reduced to fit layer and room."""
    bo, bi = block_size(outputs, chosen.blocks["BO"]), block_size(inputs, chosen.blocks["BI"])
    while bytes_per_weight * bo * bi > room and max(bo, bi) > 16:
        bo, bi = (bo // 2, bi) if bo >= bi else (bo, bi // 2)
    return {
        "BO": bo,
        "BI": bi,
        "BT": block_size(positions, chosen.blocks["BT"]),
        "num_warps": min(chosen.num_warps, max(4, bo * bi // 2048)),
        "num_stages": chosen.num_stages,
    }
