"""Samples times their coefficients."""

import torch
from torch import Tensor


def scaled(e: Tensor, s: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return s_n e_n, rounded once to `dtype`; e itself where there are no coefficients."""
    return e if s is None else (e * s.view(-1, *[1] * (e.ndim - 1))).to(dtype)
