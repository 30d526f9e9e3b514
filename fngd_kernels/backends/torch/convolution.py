"""torch's convolutions, called so that they avoid torch's faults on a CPU (docs/reliability.md).

csrc/convolution.cpp does the same for the native nodes.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry import ConvGeometry
from ...torch_private import HAS_ONEDNN_BFLOAT16


class ConvolutionArguments(NamedTuple):
    """What torch.convolution is told beside its tensors, in its order.

    Unlike a ConvGeometry it may be transposed, and it has no weight shape: torch is given the weight itself.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int


def arguments_of(geometry: ConvGeometry) -> ConvolutionArguments:
    """Return what torch.convolution is told of a convolution that is not transposed."""
    no_padding = (0,) * len(geometry.stride)
    return ConvolutionArguments(
        geometry.stride, geometry.padding, geometry.dilation, False, no_padding, geometry.groups
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, arguments: ConvolutionArguments) -> Tensor:
    """Return the convolution of x."""
    return torch.convolution(x, _in_usual_order(weight), bias, *arguments)


def input_gradient(e: Tensor, x: Tensor, weight: Tensor, arguments: ConvolutionArguments) -> Tensor:
    """Return the gradient by x, of which only the shape is read."""
    mask = [True, False, False]
    weight = _in_usual_order(weight)
    return torch.ops.aten.convolution_backward(e, x, weight, None, *arguments, mask)[0]


def weight_gradient(e: Tensor, x: Tensor, weight: Tensor, arguments: ConvolutionArguments) -> Tensor:
    """Return the gradient by the weight, of which only shape and memory format are read."""
    if x.device.type == "cpu":
        if _skips_pixels(weight, arguments):
            e, x, arguments = _without_strides(e, x, arguments)
        if not _is_in_usual_order(weight):
            weight = weight.new_empty(weight.shape)
        if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not _onednn_serves_bfloat16()):
            # Torch by itself rounds the sum to 16 bits after every sample.
            wide = partial(torch.Tensor.to, dtype=torch.float32, memory_format=torch.contiguous_format)
            return weight_gradient(wide(e), wide(x), wide(weight), arguments).to(x.dtype)
        if x.dtype == torch.bfloat16:
            # oneDNN leaves parts of it unwritten in some other memory formats.
            e, x, weight = e.contiguous(), x.contiguous(), weight.contiguous()
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(e, x, weight, None, *arguments, mask)[1]


def _onednn_serves_bfloat16() -> bool:
    return HAS_ONEDNN_BFLOAT16 and bool(torch.backends.mkldnn.enabled)


def _skips_pixels(weight: Tensor, arguments: ConvolutionArguments) -> bool:
    """Return whether the kernel has one offset, and steps over pixels that it never reads."""
    return max(arguments.stride) > 1 and not any(arguments.padding) and max(weight.shape[2:]) == 1


def _without_strides(
    e: Tensor, x: Tensor, arguments: ConvolutionArguments
) -> tuple[Tensor, Tensor, ConvolutionArguments]:
    """Return the same convolution on only those pixels that it reads.

    oneDNN copies them, too, but writes past the end of its scratch memory where channels come last and fill
    no vector register.
    """
    fine, coarse = (e, x) if arguments.transposed else (x, e)
    steps = zip(arguments.stride, coarse.shape[2:], strict=True)
    pixels = (slice(None), slice(None), *(slice(0, size * step, step) for step, size in steps))
    read = fine[pixels]
    ones, zeros = (1,) * len(arguments.stride), (0,) * len(arguments.stride)
    arguments = arguments._replace(stride=ones, output_padding=zeros)
    return (read, x, arguments) if arguments.transposed else (e, read, arguments)


def _is_in_usual_order(weight: Tensor) -> bool:
    """Return whether the weight is contiguous, or has channels last with the strides torch gives them."""
    step, strides = 1, [0] * weight.ndim
    for d in (1, *range(weight.ndim - 1, 1, -1), 0):
        strides[d] = step
        step *= weight.shape[d]
    return weight.is_contiguous() or weight.stride() == tuple(strides)


def _in_usual_order(weight: Tensor) -> Tensor:
    """Return the weight, copied if its order is one that oneDNN may misread in grouped convolutions."""
    return weight if weight.device.type != "cpu" or _is_in_usual_order(weight) else weight.contiguous()
