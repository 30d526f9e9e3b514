"""Weighted gradient of a convolution: torch's weight gradient for scaled gradients at the output."""

import torch
from torch import Tensor

from ...geometry import ConvGeometry
from .convolution import arguments_of, weight_gradient
from .scaling import scaled


def combine_conv(x: Tensor, e: Tensor, s: Tensor, geometry: ConvGeometry, bias: bool) -> list[Tensor]:
    """Return the weight gradient of the convolution for s_n E_n, and with bias the bias gradient."""
    if not x.shape[0]:
        shape = geometry.weight_shape
        return [x.new_zeros(shape), *([e.new_zeros(shape[0])] if bias else [])]
    # On a CPU float16 is summed in float32 anyway, so scaled gradients need not be rounded before.
    dtype = torch.float32 if e.dtype == torch.float16 and e.device.type == "cpu" else e.dtype
    scaled_e = scaled(e, s, dtype)
    weight = conv_weight_gradient(x.to(dtype), scaled_e, geometry)
    # Not by the library's own bias gradient, which torch sums in bfloat16 where oneDNN does not support it.
    bias_gradient = [scaled_e.sum([0, *range(2, e.ndim)]).to(e.dtype)] if bias else []
    return [weight.to(e.dtype), *bias_gradient]


def conv_weight_gradient(x: Tensor, e: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return the ordinary gradient of a convolution's weight."""
    weight = x.new_empty(()).expand(geometry.weight_shape)
    return weight_gradient(e, x, weight, arguments_of(geometry)).contiguous()
