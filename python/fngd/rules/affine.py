"""Scale and shift of normalisation layers, one block: C_n = (sum_t E_nt x_hat_nt, sum_t E_nt)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fngd_kernels as fk
from fngd_kernels.ops import nodes
from fngd_kernels.ops.nodes import Gradients, UseHandler

from .base import Rule, Use, trainable_bias


class AffineRule(Rule):
    """Layer, RMS and group normalisation; x_hat is the module's output without its scale and shift."""

    name = "affine"

    def reason_against(self, module: Any) -> str | None:
        return None if module.weight is not None else "no scale and shift"

    def batched(self, module: Any, x: Tensor) -> bool:
        return x.ndim > (1 if isinstance(module, nn.GroupNorm) else len(module.normalized_shape))

    def forward(
        self, module: Any, x: Tensor, coefficients: Tensor | None, on_use: UseHandler | None
    ) -> Tensor:
        x_hat, shape = _normalised(module, x)
        weight, bias = sample_parameters(module, x.shape[0], coefficients, on_use)
        y = x_hat * weight.view(-1, *shape)
        return (y if bias is None else y + bias.view(-1, *shape)).to(x_hat.dtype)

    def gram(self, module: Any, uses: Sequence[Use], sketch: fk.Sketch | None = None) -> Tensor:
        return fk.gram_rows(_summed(uses), sketch=sketch)

    def contributions(self, module: Any, uses: Sequence[Use]) -> Gradients:
        rows = _summed(uses)
        return (rows[:, 0], rows[:, 1]) if trainable_bias(module) else (rows, None)

    def combine(self, module: Any, uses: Sequence[Use], s: Tensor) -> Gradients:
        gradient = fk.combine_rows(_summed(uses), s)
        return (gradient[0], gradient[1]) if trainable_bias(module) else (gradient, None)


def sample_parameters(
    module: Any, samples: int, coefficients: Tensor | None, on_use: UseHandler | None
) -> tuple[Tensor, Tensor | None]:
    """Return (weight, bias) with a copy per sample each, (samples, *shape); one copy of a frozen bias."""
    if not trainable_bias(module):
        bias = getattr(module, "bias", None)
        weight = nodes.rows(module.weight, samples, coefficients, on_use)
        return weight, None if bias is None else bias.unsqueeze(0)
    parameters = torch.stack([module.weight, module.bias])
    weight, bias = nodes.rows(parameters, samples, coefficients, on_use and _stacked(on_use)).unbind(1)
    return weight, bias


def _stacked(on_use: UseHandler) -> UseHandler:
    """Return a handler for the stacked parameters (2, *shape) from one that returns two gradients."""

    def stacked(a: Tensor, e: Tensor, biased: bool, must_return: bool) -> Gradients | None:
        gradients = on_use(a, e, biased, must_return)
        return None if gradients is None else (torch.stack(gradients), None)  # type: ignore[arg-type]

    return stacked


def _normalised(module: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return x_hat, and the shape in which the weight multiplies one sample of it."""
    if isinstance(module, nn.GroupNorm):
        x_hat = F.group_norm(x, module.num_groups, None, None, module.eps)
        return x_hat, (module.num_channels,) + (1,) * (x.ndim - 2)
    shape = tuple(module.normalized_shape)
    if isinstance(module, nn.RMSNorm):
        x_hat = F.rms_norm(x, shape, None, module.eps)
    else:
        x_hat = F.layer_norm(x, shape, None, None, module.eps)
    return x_hat, (1,) * (x.ndim - 1 - len(shape)) + shape


def _summed(uses: Sequence[Use]) -> Tensor:
    """Return the contributions (N, *shape), summed over the uses."""
    return uses[0].e if len(uses) == 1 else torch.stack([use.e for use in uses]).sum(0)
