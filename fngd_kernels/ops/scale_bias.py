"""The gradient at a layer's output, scaled per sample, and its weighted sum over samples and positions."""

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..arguments import flag, integer
from ..backends.torch.products import accumulation_dtype
from .checks import check_coefficients, check_floating
from .registration import LIBRARY, register

LIBRARY.define("scale_bias(Tensor e, Tensor s, int channel, bool scaled, bool bias) -> (Tensor, Tensor)")

Results = tuple[Any, Any]
"""Tensors, None where one is not asked for."""


def scale_bias(e: Tensor, s: Tensor, channel: int, scaled: bool, bias: bool) -> Results:
    """Return s_n e_n and b = sum_n s_n sum_p E_np, each only if it is asked for.

    e: (N, ...) float; s: (N,) float; channel: the dimension of e, after the first, that b keeps

    Returns: the shape and layout of e, each product rounded once to e's dtype; (channels,) of e's dtype, the
        sum of the products before they are rounded
    Raises: ValueError, TypeError when shapes, devices or dtypes do not fit.
    """
    check_floating("e", e)
    if e.ndim < 2:
        raise ValueError(f"e: expected shape (N, channels, ...), got {tuple(e.shape)}")
    check_coefficients(s, "e", e)
    if integer("channel", channel, 1) >= e.ndim:
        raise ValueError(f"channel: expected 1 to {e.ndim - 1}, got {channel}")
    flag("scaled", scaled)
    flag("bias", bias)
    return torch.ops.fngd.scale_bias.default(e, s, channel, scaled, bias)


def _scale_bias(e: Tensor, s: Tensor, channel: int, scaled: bool, bias: bool) -> Results:
    if e.is_cuda:
        native.warn_of_missing_cuda()
    dtype = accumulation_dtype(e.dtype)
    product = e.to(dtype) * s.to(dtype).view(-1, *[1] * (e.ndim - 1))
    others = [axis for axis in range(e.ndim) if axis != channel]
    return product.to(e.dtype) if scaled else None, product.sum(others).to(e.dtype) if bias else None


def _fake(e: Tensor, s: Tensor, channel: int, scaled: bool, bias: bool) -> Results:
    return torch.empty_like(e) if scaled else None, e.new_empty(e.shape[channel]) if bias else None


register("scale_bias", _scale_bias, _fake)
