"""Per-sample contributions of a convolution, formed."""

from collections.abc import Sequence

from torch import Tensor

from .. import checks
from ..backends.torch.conv_contributions import conv_contributions


def contributions_conv(
    x: Tensor,
    e: Tensor,
    weight_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return C_n = E_n^T P_n, with P_n the patches of sample n, for every sample.

    Args:
        x: (N,C,*space) float, layer input, in any memory format.
        e: (N,O,*space_out) float of x's dtype, gradient at the layer output.
        weight_shape: (O,C/groups,*kernel).
        stride: As in torch.conv2d.
        padding: As in torch.conv2d, with zeros.
        dilation: As in torch.conv2d.
        groups: As in torch.conv2d.

    Returns:
        (N, *weight_shape) of x's dtype.

    Raises:
        ValueError: Shapes or devices do not fit, or a number is out of range.
        TypeError: Dtypes do not fit, or an argument has the wrong type.
    """
    geometry = checks.check_conv(x, e, weight_shape, stride, padding, dilation, groups)
    grouped = (geometry.groups, -1)
    rows = conv_contributions(x.unflatten(1, grouped), e.unflatten(1, grouped), geometry, x.dtype)
    return rows.view(-1, *geometry.weight_shape)
