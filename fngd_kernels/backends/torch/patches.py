"""A convolution as a linear layer on its patches, and the layout in which channels are neighbours."""

import torch
from torch import Tensor

from ...geometry import ConvGeometry, output_size


def channels_last(x: Tensor) -> Tensor:
    """Return x (N,C,*space) with neighbouring channels, copied if they are not."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def patches(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return what each output position of x (N,C,*space) reads, (N,P,I).

    I = prod(kernel) C, ordered (kernel offset, channel). For a pointwise convolution it is a view of x.
    """
    if geometry.is_pointwise:
        return x.flatten(2).mT
    x = channels_last(x)
    if any(geometry.padding):
        around = [pad for padding in reversed(geometry.padding) for pad in (padding, padding)]
        x = torch.constant_pad_nd(x, around)
    x = x.movedim(1, -1)
    n, *space, channels = x.shape
    no_more = [0] * len(space)
    positions = map(output_size, space, geometry.kernel, geometry.stride, no_more, geometry.dilation)
    sample, *pixel, channel = x.stride()
    steps = [stride * step for stride, step in zip(pixel, geometry.stride, strict=True)]
    taps = [stride * step for stride, step in zip(pixel, geometry.dilation, strict=True)]
    windows = x.as_strided((n, *positions, *geometry.kernel, channels), (sample, *steps, *taps, channel))
    return windows.flatten(len(space) + 1).flatten(1, -2)
