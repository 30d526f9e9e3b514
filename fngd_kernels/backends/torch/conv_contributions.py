"""Per-sample contributions of a convolution, all in one call of the library."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .convolution import Geometry, weight_gradient


def conv_contributions(
    x: Tensor,
    e: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return C_n as rows (N, groups O C prod(kernel)), for x (N,groups,C,*space) and e (N,groups,O,*space).

    The weight gradient of a convolution whose groups are the samples holds every C_n; the library forms the
    patches of one group at a time, so the patch tensor of the batch never exists.
    """
    (samples, groups, inputs), outputs = x.shape[:3], e.shape[2]
    c = weight_gradient(
        e.to(dtype).reshape(1, -1, *e.shape[3:]),
        x.to(dtype).reshape(1, -1, *x.shape[3:]),
        x.new_zeros((), dtype=dtype).expand(samples * groups * outputs, inputs, *kernel),
        Geometry(stride, padding, dilation, False, [0] * len(kernel), samples * groups),
    )
    return c.reshape(samples, -1)
