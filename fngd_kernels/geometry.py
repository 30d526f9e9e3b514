"""Index arithmetic of convolutions; standard library only."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple


class ConvGeometry(NamedTuple):
    """The numbers that describe a convolution beside its input: hashable, in the order of the operators.

    Attributes:
        weight_shape: (O, C/groups, *kernel).
        stride: One number for each dimension of space, as the next two.
        padding: How many zeros are added on either side.
        dilation: Distance of neighbouring kernel offsets in pixels.
        groups: Into how many groups the channels are divided.
    """

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def from_schema(
        cls,
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> "ConvGeometry":
        """Return the geometry from an operator's arguments, which are lists; `*geometry` is the inverse."""
        return cls(tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Return the sizes of the kernel."""
        return self.weight_shape[2:]

    @property
    def is_pointwise(self) -> bool:
        """Return whether each output pixel depends only on the input pixel at the same place."""
        return prod(self.kernel) == prod(self.stride) == self.groups == 1 and not any(self.padding)


class Tap(NamedTuple):
    """One kernel offset: the output positions that use it, and the grid pixels that these read."""

    outputs: slice
    pixels: slice


class PixelGrid(NamedTuple):
    """The input pixels that belong to one residue of the stride, and the kernel offsets that read them."""

    pixels: slice
    size: int
    taps: tuple[Tap, ...]


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return the number of output positions of a convolution along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def pixel_grids(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[PixelGrid]:
    """Split a strided convolution along one dimension into stride-1 correlations on pixel subgrids.

    Kernel offset k of output p reads pixel `stride p + dilation k - padding`. All offsets with the same
    residue `dilation k mod stride` read one regular grid of pixels, and on that grid they are shifts of one
    another. Padding belongs to no grid.
    """
    outputs = output_size(size, kernel, stride, padding, dilation)
    shifts: dict[int, list[int]] = {}
    for k in range(kernel):
        shift, residue = divmod(dilation * k, stride)
        shifts.setdefault(residue, []).append(shift)

    grids = []
    for residue, ms in shifts.items():
        # Grid index u stands for the pixel stride u + residue - padding.
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
