"""Weighted gradient of a linear layer: the ordinary product with scaled gradients at the output."""

import math

from torch import Tensor

from .scaling import scaled


def weighted_gradients(
    a: Tensor, e: Tensor, s: Tensor | None, weight: bool, bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return sum_n s_n E_n^T A_n and sum_n s_n sum_t E_nt, each if asked for; without s all s_n are 1."""
    # By reshape: the vmap of autograd.grad(is_grads_batched=True) has no rule for flatten.
    positions = math.prod(e.shape[:-1])
    e = scaled(e, s, e.dtype).reshape(positions, e.shape[-1])
    return e.T @ a.reshape(positions, a.shape[-1]) if weight else None, e.sum(0) if bias else None
