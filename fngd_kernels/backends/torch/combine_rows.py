"""Weighted sum of contributions that are already formed."""

import torch
from torch import Tensor

from .products import accumulation_dtype


def combine_rows(g: Tensor, s: Tensor) -> Tensor:
    """Return sum_n s_n g_n."""
    dtype = accumulation_dtype(g.dtype)
    return torch.tensordot(s.to(dtype), g.to(dtype), 1).to(g.dtype)
