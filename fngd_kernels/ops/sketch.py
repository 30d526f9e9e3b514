"""Channels compressed to fewer by sums with random signs."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.torch.sketch import signs
from ..backends.torch.sketch import sketch as torch_sketch
from ..sketch import Sketch
from . import choose, devices
from .registration import call, register

IMPLEMENTATIONS: dict[str, Callable[[Tensor, int, int, int, int], Tensor]] = {"torch": torch_sketch}
"""By backend."""


def sketched(x: Tensor, channel: int, side: int, sketch: Sketch | None, groups: int = 1) -> Tensor:
    """Return x with the channels of each group summed in buckets, or x itself where nothing is to be done.

    y_b = sum_{i mod r = b} sign_i x_i

    Args:
        x: (N,...) float.
        channel: The dimension of channels, not the first.
        side: One of those named in `fngd_kernels.sketch`, which has signs of its own.
        sketch: The sketch, None for no compression.
        groups: Groups of channels; each has signs of its own.

    Returns:
        y of x's dtype, summed in at least float32 and rounded once; its channels are innermost in memory.
    """
    if sketch is None or x.shape[channel] // groups <= sketch.buckets(side):
        return x
    size, key = sketch.buckets(side), sketch.key(side)
    return call(torch.ops.fngd.sketch.default, x, channel, groups, size, key)


def sketched_ids(ids: Tensor, e: Tensor, rows: int, side: int, sketch: Sketch) -> tuple[Tensor, Tensor]:
    """Return ids and gradients of the embedding whose contributions have their rows compressed.

    Args:
        ids: (N,T) int, input of an embedding.
        e: (N,T,D) float, gradient at its output.
        rows: Rows of its weight; as channels they would be the side named.
        side: As for `sketched`.
        sketch: The sketch.
    """
    if rows <= sketch.buckets(side):
        return ids, e
    return ids % sketch.buckets(side), e * signs(ids, sketch.key(side), e.dtype).unsqueeze(-1)


def _sketch(x: Tensor, channel: int, groups: int, size: int, key: int) -> Tensor:
    return IMPLEMENTATIONS[choose.sketch(devices.triton_serves(x))](x, channel, groups, size, key)


def _fake(x: Tensor, channel: int, groups: int, size: int, key: int) -> Tensor:
    rows = x.movedim(channel, -1)
    return rows.new_empty((*rows.shape[:-1], groups * size)).movedim(-1, channel)


register("sketch(Tensor x, int channel, int groups, int size, int key) -> Tensor", _sketch, _fake)
