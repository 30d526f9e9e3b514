"""Index arithmetic of convolutions, one dimension at a time; standard library only."""

from collections.abc import Sequence
from typing import NamedTuple


class Tap(NamedTuple):
    """One kernel offset: the output positions it serves and the grid pixels they read."""

    outputs: slice
    pixels: slice


class PixelGrid(NamedTuple):
    """The input pixels that one residue of the stride reads, and the kernel offsets that read them."""

    pixels: slice
    size: int
    taps: tuple[Tap, ...]


def expand(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return a stride, padding or dilation as one number per dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return the number of output positions of a convolution along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def pixel_grids(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[PixelGrid]:
    """Split a strided convolution along one dimension into stride-1 correlations on pixel subgrids.

    Offset k of output p reads pixel `stride p + dilation k - padding`. Offsets with the same residue
    `dilation k mod stride` read one regular grid, on which they are plain shifts; padding is in no grid.
    """
    outputs = output_size(size, kernel, stride, padding, dilation)
    shifts: dict[int, list[int]] = {}
    for k in range(kernel):
        shift, residue = divmod(dilation * k, stride)
        shifts.setdefault(residue, []).append(shift)

    grids = []
    for residue, ms in shifts.items():
        # Grid index u is the pixel stride u + residue - padding.
        low = max(-((residue - padding) // stride), min(ms))
        high = min((size - 1 + padding - residue) // stride, outputs - 1 + max(ms)) + 1
        taps = []
        for m in ms:
            first, last = max(0, low - m), min(outputs, high - m)
            if first < last:
                taps.append(Tap(slice(first, last), slice(first + m - low, last + m - low)))
        if taps:
            start = stride * low + residue - padding
            stop = start + stride * (high - low - 1) + 1
            grids.append(PixelGrid(slice(start, stop, stride), high - low, tuple(taps)))
    return grids
