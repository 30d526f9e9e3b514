"""Per-sample contributions of a convolution, all in one call of the library."""

import torch
from torch import Tensor

from ...geometry import ConvGeometry
from .convolution import arguments_of, weight_gradient


def conv_contributions(x: Tensor, e: Tensor, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """Return C_n as rows (N, groups O C prod(kernel)).

    For x (N,groups,C,*space) and e (N,groups,O,*space_out). x and e may hold a chunk of the groups and
    channels: their sizes count, not those of the weight.

    The weight gradient of a convolution whose groups are the samples holds every C_n; the library forms the
    patches of one group at a time, so the patch tensor of the batch never exists.
    """
    (samples, groups, inputs), outputs = x.shape[:3], e.shape[2]
    count = samples * groups
    c = weight_gradient(
        e.to(dtype).reshape(1, -1, *e.shape[3:]),
        x.to(dtype).reshape(1, -1, *x.shape[3:]),
        x.new_empty((), dtype=dtype).expand(count * outputs, inputs, *geometry.kernel),
        arguments_of(geometry)._replace(groups=count),
    )
    return c.reshape(samples, -1)
