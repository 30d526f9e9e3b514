"""The weighted sum of contributions that are already formed; properties as in `combine`."""

import torch
from torch import Tensor

from .. import checks
from ..backends.torch import combine_rows as backend
from .registration import call, register


def combine_rows(g: Tensor, s: Tensor) -> Tensor:
    """Return the weighted sum of contributions that are already formed.

    G = sum_n s_n g_n

    Source: the natural gradient as a weighted sum, Ou et al. 2024 (arXiv 2403.03473).

    Args:
        g: (N,...) float, contribution of each sample.
        s: (N,) float, coefficients.

    Returns:
        G of shape g.shape[1:].

    Raises:
        ValueError: Shapes or devices do not fit.
        TypeError: Dtypes do not fit, or an argument has the wrong type.
    """
    checks.check_rows(g)
    checks.check_coefficients(s, "g", g)
    return call(torch.ops.fngd.combine_rows.default, g, s)


register(
    "combine_rows(Tensor g, Tensor s) -> Tensor", backend.combine_rows, lambda g, s: g.new_empty(g.shape[1:])
)
