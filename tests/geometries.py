"""Geometries of the convolutions that tests describe as torch does."""

from fngd_kernels.geometry import ConvGeometry


def conv_geometry(weight_shape, stride=1, padding=0, dilation=1, groups=1):
    """Return the ConvGeometry of torch's arguments, which may be one number for all dimensions."""
    dims = len(weight_shape) - 2
    axes = [
        (value,) * dims if isinstance(value, int) else tuple(value) for value in (stride, padding, dilation)
    ]
    return ConvGeometry(tuple(weight_shape), *axes, groups)
