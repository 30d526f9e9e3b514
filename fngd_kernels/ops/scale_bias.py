"""The gradient at a layer's output, scaled per sample, and its weighted sum over samples and positions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..arguments import flag, integer
from ..backends.torch.products import accumulation_dtype
from ..backends.torch.scaling import scaled as scaled_tensor
from ..checks import check_coefficients, check_floating
from . import choose
from .registration import register

Results = tuple[Any, Any]
"""Tensors, or None for one that is not asked for."""


def scale_bias(e: Tensor, s: Tensor, channel: int, scaled: bool, bias: bool) -> Results:
    """Return s_n e_n and b = sum_n s_n sum_p E_np, each only if it is asked for.

    Args:
        e: (N, ...) float, gradient at the layer output.
        s: (N,) float, coefficients.
        channel: The dimension of e, after the first, that b keeps.
        scaled: Whether to return s_n e_n.
        bias: Whether to return b.

    Returns:
        s_n e_n in the shape and layout of e, each product rounded once to e's dtype; b (channels,) of e's
        dtype, the sum of the products before they are rounded.

    Raises:
        ValueError: Shapes or devices do not fit, or a number is out of range.
        TypeError: Dtypes do not fit, or an argument has the wrong type.
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


def _torch(e: Tensor, s: Tensor, channel: int, scaled: bool, bias: bool) -> Results:
    dtype = accumulation_dtype(e.dtype)
    product = scaled_tensor(e.to(dtype), s.to(dtype), dtype)
    others = [axis for axis in range(e.ndim) if axis != channel]
    return product.to(e.dtype) if scaled else None, product.sum(others).to(e.dtype) if bias else None


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, int, bool, bool], Results]] = {
    "torch": _torch,
    "native": lambda e, s, channel, scaled, bias: native.extension.scale_bias(e, s, channel, scaled, bias),
}


def _scale_bias(e: Tensor, s: Tensor, channel: int, scaled: bool, bias: bool) -> Results:
    return IMPLEMENTATIONS[choose.scale_bias(native.serves(e))](e, s, channel, scaled, bias)


def _fake(e: Tensor, s: Tensor, channel: int, scaled: bool, bias: bool) -> Results:
    return torch.empty_like(e) if scaled else None, e.new_empty(e.shape[channel]) if bias else None


register(
    "scale_bias(Tensor e, Tensor s, int channel, bool scaled, bool bias) -> (Tensor, Tensor)",
    _scale_bias,
    _fake,
)
