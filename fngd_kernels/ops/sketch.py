"""Channels compressed to fewer by sums with random signs."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.torch.sketch import signs
from ..backends.torch.sketch import sketch as torch_sketch
from ..sketch import Sketch
from . import choose, devices
from .registration import call, register

IMPLEMENTATIONS: dict[str, Callable[[Tensor, int, int, int, Tensor], None]] = {"torch": torch_sketch}
"""By backend; for x (N,P,C) and the result (N,P,groups * size), which is written to."""


def sketched(x: Tensor, side: int, sketch: Sketch | None) -> Tensor:
    """Return x (N,C) or (N,T,C) with its channels summed in buckets, or x itself where there is no need.

    y_b = sum_{i mod r = b} sign_i x_i

    Args:
        x: The tensor, float.
        side: One of those named in `fngd_kernels.sketch`, which has signs of its own.
        sketch: The sketch, None for no compression.

    Returns:
        y of x's dtype, summed in at least float32 and rounded once.
    """
    if sketch is None or x.shape[-1] <= sketch.buckets(side):
        return x
    rows = x.unsqueeze(1) if x.ndim == 2 else x
    return _compressed(rows, 1, side, sketch, True).view(*x.shape[:-1], sketch.buckets(side))


def sketched_images(x: Tensor, side: int, sketch: Sketch, groups: int) -> Tensor:
    """Return x (N,C,*space) with the channels of each group compressed; see `sketched`.

    The result's channels are innermost in memory where Triton kernels will read it, else outermost, as the
    convolutions on a CPU want them.
    """
    if x.shape[1] // groups <= sketch.buckets(side):
        return x
    innermost = devices.runs_triton(x.device)
    y = _compressed(x.flatten(2).mT, groups, side, sketch, innermost)
    return y.mT.unflatten(2, x.shape[2:])


def sketched_ids(
    ids: Tensor, e: Tensor, rows: int, side: int, sketch: Sketch | None
) -> tuple[Tensor, Tensor]:
    """Return ids and gradients of the embedding whose contributions have their rows compressed.

    Args:
        ids: (N,T) int, input of an embedding.
        e: (N,T,D) float, gradient at its output.
        rows: Rows of its weight; as channels they would be the side named.
        side: As for `sketched`.
        sketch: The sketch, None for no compression.
    """
    if sketch is None or rows <= sketch.buckets(side):
        return ids, e
    return ids % sketch.buckets(side), e * signs(ids, sketch.key(side)).unsqueeze(-1)


def _compressed(x: Tensor, groups: int, side: int, sketch: Sketch, innermost: bool) -> Tensor:
    size, key = sketch.buckets(side), sketch.key(side)
    return call(torch.ops.fngd.sketch.default, x, groups, size, key, innermost)


def _sketch(x: Tensor, groups: int, size: int, key: int, innermost: bool) -> Tensor:
    y = _fake(x, groups, size, key, innermost)
    if y.numel():
        IMPLEMENTATIONS[choose.sketch(devices.triton_serves(x))](x, groups, size, key, y)
    return y


def _fake(x: Tensor, groups: int, size: int, key: int, innermost: bool) -> Tensor:
    samples, positions, channels = x.shape[0], x.shape[1], groups * size
    if innermost:
        return x.new_empty((samples, positions, channels))
    return x.new_empty((samples, channels, positions)).mT


register("sketch(Tensor x, int groups, int size, int key, bool innermost) -> Tensor", _sketch, _fake)
