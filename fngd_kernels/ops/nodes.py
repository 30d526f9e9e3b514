"""Differentiable maps whose parameter gradients are weighted sums over samples.

Each function computes what its torch counterpart computes. Its backward returns the ordinary input gradient.
For the parameters it returns sum_n s_n C_n, where C_n is the contribution of sample n (row n of the input)
and s are the `coefficients`, by default 1.

With `on_use` instead of coefficients, backward calls on_use(a, e, biased, must_return) when a parameter
gradient is needed, and returns its answer: (weight gradient, bias gradient), or None for neither.

    a, e: the sample-first factors of the contributions, input and gradient at the output
    biased: whether the bias takes part; in a derivative of the map it does not
    must_return: whether autograd wants this gradient returned now (autograd.grad, or backward with inputs)

Source: the weighted form of the natural gradient, Ou et al. 2024 (arXiv 2403.03473).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..backends.torch.convolution import ConvolutionArguments
from . import choose, nodes_python
from .registration import LIBRARY

Gradients = tuple[Tensor | None, Tensor | None]
UseHandler = Callable[[Any, Tensor, bool, bool], Sequence[Tensor | None] | None]

# The extension registers what these run; without it, nodes_python takes their place.
LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? coefficients) -> Tensor")
LIBRARY.define(
    "conv(Tensor x, Tensor weight, Tensor? bias, Tensor? coefficients, int[] stride, int[] padding, "
    "int[] dilation, bool transposed, int[] output_padding, int groups) -> Tensor"
)
LIBRARY.define("embedding(Tensor ids, Tensor weight, Tensor? coefficients, int padding_idx) -> Tensor")
LIBRARY.define("rows(Tensor parameter, int samples, Tensor? coefficients) -> Tensor")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    coefficients: Tensor | None = None,
    on_use: UseHandler | None = None,
) -> Tensor:
    """Return x W^T + b.

    Args:
        x: (N, ..., I).
        weight: (O, I).
        bias: (O,) or None.
        coefficients: (N,), one for each sample.
        on_use: Called with each use of the parameters.
    """
    _check_coefficients(coefficients, x.shape[:1])
    if choose.node(native.AVAILABLE) == "python":
        return nodes_python.linear(x, weight, bias, coefficients, on_use)
    if _goes_through_the_dispatcher(x, on_use):
        return torch.ops.fngd.linear(x, weight, bias, coefficients)
    return native.extension.linear(x, weight, bias, coefficients, on_use)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    coefficients: Tensor | None = None,
    on_use: UseHandler | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool = False,
    output_padding: Sequence[int] | None = None,
) -> Tensor:
    """Return the 1-3 d convolution of x, or the transposed one.

    Args:
        x: (N, C, *space).
        weight: (O, C / groups, *kernel), transposed (C, O / groups, *kernel).
        bias: (O,) or None.
        coefficients: (N,), one for each sample.
        on_use: Called with each use of the parameters.
        stride: One number for each dimension of space, as in torch.convolution.
        padding: One number for each dimension of space, as in torch.convolution.
        dilation: One number for each dimension of space, as in torch.convolution.
        groups: As in torch.convolution.
        transposed: Whether the convolution is transposed.
        output_padding: As in torch.convolution, zeros by default.
    """
    _check_coefficients(coefficients, x.shape[:1])
    output_padding = [0] * len(stride) if output_padding is None else list(output_padding)
    arguments = ConvolutionArguments(
        list(stride), list(padding), list(dilation), transposed, output_padding, groups
    )
    if choose.node(native.AVAILABLE) == "python":
        return nodes_python.conv(x, weight, bias, coefficients, on_use, arguments)
    if _goes_through_the_dispatcher(x, on_use):
        return torch.ops.fngd.conv(x, weight, bias, coefficients, *arguments)
    return native.extension.conv(x, weight, bias, coefficients, on_use, *arguments)


def embedding(
    ids: Tensor,
    weight: Tensor,
    coefficients: Tensor | None = None,
    on_use: UseHandler | None = None,
    *,
    padding_idx: int = -1,
) -> Tensor:
    """Return the rows of weight that the ids name.

    Args:
        ids: (N, ...) int.
        weight: (V, D).
        coefficients: (N,), one for each sample.
        on_use: Called with each use of the weight.
        padding_idx: Id that contributes nothing, -1 for none.
    """
    _check_coefficients(coefficients, ids.shape[:1])
    if choose.node(native.AVAILABLE) == "python":
        return nodes_python.embedding(ids, weight, coefficients, on_use, padding_idx)
    if _goes_through_the_dispatcher(ids, on_use):
        return torch.ops.fngd.embedding(ids, weight, coefficients, padding_idx)
    return native.extension.embedding(ids, weight, coefficients, on_use, padding_idx)


def rows(
    parameter: Tensor,
    samples: int,
    coefficients: Tensor | None = None,
    on_use: UseHandler | None = None,
) -> Tensor:
    """Return (samples, *parameter.shape), a copy for every sample.

    Args:
        parameter: Of any shape.
        samples: How many copies.
        coefficients: (samples,), one for each sample.
        on_use: Called with each use of the parameter; a is None, and e holds the contributions themselves.
    """
    _check_coefficients(coefficients, (samples,))
    if choose.node(native.AVAILABLE) == "python":
        return nodes_python.rows(parameter, samples, coefficients, on_use)
    if _goes_through_the_dispatcher(parameter, on_use):
        return torch.ops.fngd.rows(parameter, samples, coefficients)
    return native.extension.rows(parameter, samples, coefficients, on_use)


def _goes_through_the_dispatcher(x: Tensor, on_use: UseHandler | None) -> bool:
    """Return whether torch's dispatcher has to see the call, which takes the host longer.

    It has to where the call is compiled, and on the meta device, which knows no autocast.
    """
    return on_use is None and (torch.compiler.is_compiling() or x.is_meta)


def _check_coefficients(coefficients: Tensor | None, shape: Sequence[int]) -> None:
    if coefficients is not None and coefficients.shape != shape:
        raise ValueError(f"coefficients: expected shape {tuple(shape)}, got {tuple(coefficients.shape)}")
