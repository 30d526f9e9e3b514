"""Differentiable maps whose parameter gradients are weighted sums over samples.

Each function computes what its torch counterpart computes. Its backward returns the ordinary input gradient
and, for the parameters, sum_n s_n C_n: C_n is the contribution of sample n (row n of the input) and s are the
weights `scale`. With a `sink` instead, backward calls sink(a, e, biased, selective) when a parameter gradient
is asked for: a and e are the sample-first factors of the contributions, `biased` tells that the bias takes
part (in a derivative of the map it does not), `selective` that the caller asked for some gradients only
(autograd.grad), and the answer is (weight gradient, bias gradient), or None for neither.
Source: the weighted form of the natural gradient, Ou et al. 2024 (arXiv 2403.03473).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..backends.torch.convolution import Geometry
from . import nodes_python
from .registration import LIBRARY

Gradients = tuple[Tensor | None, Tensor | None]
Sink = Callable[[Any, Tensor, bool, bool], Sequence[Tensor | None] | None]

LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scale) -> Tensor")
LIBRARY.define(
    "conv(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, int[] stride, int[] padding, "
    "int[] dilation, bool transposed, int[] output_padding, int groups) -> Tensor"
)
LIBRARY.define("embedding(Tensor ids, Tensor weight, Tensor? scale, int padding_idx) -> Tensor")
LIBRARY.define("rows(Tensor parameter, int samples, Tensor? scale) -> Tensor")


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, sink: Sink | None = None
) -> Tensor:
    """Return x W^T + b.

    x: (N, ..., I); weight: (O, I); bias: (O,) or None; scale: (N,), the weights of the samples.
    """
    _check_scale(scale, x.shape[:1])
    if not native.AVAILABLE:
        return nodes_python.linear(x, weight, bias, scale, sink)
    if sink is not None:
        return native.extension.captured_linear(x, weight, bias, sink)
    return torch.ops.fngd.linear(x, weight, bias, scale)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None = None,
    sink: Sink | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool = False,
    output_padding: Sequence[int] | None = None,
) -> Tensor:
    """Return the 1-3 d convolution of x, or the transposed one.

    x: (N, C, *space); weight: (O, C / groups, *kernel), transposed (C, O / groups, *kernel); bias: (O,) or
    None; scale: (N,), sample weights.
    """
    _check_scale(scale, x.shape[:1])
    output_padding = [0] * len(stride) if output_padding is None else list(output_padding)
    geometry = Geometry(list(stride), list(padding), list(dilation), transposed, output_padding, groups)
    if not native.AVAILABLE:
        return nodes_python.conv(x, weight, bias, scale, sink, geometry)
    if sink is not None:
        return native.extension.captured_conv(x, weight, bias, sink, *geometry)
    return torch.ops.fngd.conv(x, weight, bias, scale, *geometry)


def embedding(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    sink: Sink | None = None,
    *,
    padding_idx: int = -1,
) -> Tensor:
    """Return the rows of weight (V, D) that ids (N, ...) name; padding_idx is -1 where there is none."""
    _check_scale(scale, ids.shape[:1])
    if not native.AVAILABLE:
        return nodes_python.embedding(ids, weight, scale, sink, padding_idx)
    if sink is not None:
        return native.extension.captured_embedding(ids, weight, sink, padding_idx)
    return torch.ops.fngd.embedding(ids, weight, scale, padding_idx)


def rows(parameter: Tensor, samples: int, scale: Tensor | None = None, sink: Sink | None = None) -> Tensor:
    """Return (samples, *parameter.shape), a copy for every sample; a sink receives (None, e)."""
    _check_scale(scale, (samples,))
    if not native.AVAILABLE:
        return nodes_python.rows(parameter, samples, scale, sink)
    if sink is not None:
        return native.extension.captured_rows(parameter, samples, sink)
    return torch.ops.fngd.rows(parameter, samples, scale)


def _check_scale(scale: Tensor | None, shape: Sequence[int]) -> None:
    if scale is not None and scale.shape != shape:
        raise ValueError(f"scale: expected shape {tuple(shape)}, got {tuple(scale.shape)}")
