"""The weighted gradient of a convolution; properties as in `combine`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import checks
from ..arguments import flag
from ..backends.torch.combine_conv import combine_conv as torch_combine_conv
from ..backends.torch.combine_conv import conv_weight_gradient
from ..geometry import ConvGeometry
from . import choose, devices
from .registration import GEOMETRY, call, register, with_geometry
from .scale_bias import scale_bias


def _one_pass(x: Tensor, e: Tensor, s: Tensor, geometry: ConvGeometry, bias: bool) -> list[Tensor]:
    """Scale e and sum it for the bias in one pass, then take the library's weight gradient."""
    scaled, bias_gradient = scale_bias(e, s, 1, True, bias)
    weight = conv_weight_gradient(x, scaled, geometry)
    return [weight] if bias_gradient is None else [weight, bias_gradient]


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, ConvGeometry, bool], list[Tensor]]] = {
    "torch": torch_combine_conv,
    "one pass": _one_pass,
}


def combine_conv(
    x: Tensor,
    e: Tensor,
    s: Tensor,
    weight_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the weighted gradient of a 1-3 d convolution.

    W = sum_n s_n E_n^T P_n with P_n the patches of sample n, b = sum_n s_n sum_p E_np

    Source: the natural gradient as a weighted sum, Ou et al. 2024 (arXiv 2403.03473).

    Args:
        x: (N,C,*space) float, layer input, in any memory format.
        e: (N,O,*space_out) float of x's dtype, gradient at the layer output.
        s: (N,) float, coefficients.
        weight_shape: (O,C/groups,*kernel).
        stride: As in torch.conv2d.
        padding: As in torch.conv2d, with zeros.
        dilation: As in torch.conv2d.
        groups: As in torch.conv2d.
        bias: Whether to return b as well.

    Returns:
        W of weight_shape; with bias the pair of W and b (O,).

    Raises:
        ValueError: Shapes or devices do not fit, or a number is out of range.
        TypeError: Dtypes do not fit, or an argument has the wrong type.
    """
    geometry = checks.check_conv(x, e, weight_shape, stride, padding, dilation, groups)
    flag("bias", bias)
    checks.check_coefficients(s, "x", x)
    sums = call(torch.ops.fngd.combine_conv.default, x, e, s, *geometry, bias)
    return (sums[0], sums[1]) if bias else sums[0]


@with_geometry(3)
def _combine_conv(x: Tensor, e: Tensor, s: Tensor, geometry: ConvGeometry, bias: bool) -> list[Tensor]:
    return IMPLEMENTATIONS[choose.combine_conv(devices.triton_serves(x, e))](x, e, s, geometry, bias)


@with_geometry(3)
def _fake(x: Tensor, e: Tensor, s: Tensor, geometry: ConvGeometry, bias: bool) -> list[Tensor]:
    return [x.new_empty(geometry.weight_shape), *([e.new_empty(e.shape[1])] if bias else [])]


register(
    f"combine_conv(Tensor x, Tensor e, Tensor s, {GEOMETRY}, bool bias) -> Tensor[]", _combine_conv, _fake
)
