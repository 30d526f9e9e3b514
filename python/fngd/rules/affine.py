"""Scale and shift of normalisation layers, one block: C_n = (sum_t E_nt x_hat_nt, sum_t E_nt)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fngd_kernels as fk
from fngd_kernels.ops import nodes
from fngd_kernels.ops.nodes import Gradients, Sink

from .base import Use, trainable_bias


class AffineRule:
    """Layer, RMS, group and batch normalisation; x_hat is the module's output without its scale and shift.

    Batch normalisation couples samples; a sample's contribution is what its own rows give, as in K-FAC.
    """

    name = "affine"

    def reason_against(self, module: Any) -> str | None:
        return None if module.weight is not None else "no scale and shift"

    def batched(self, module: Any, x: Tensor) -> bool:
        return x.ndim > (len(module.normalized_shape) if _over_last_dimensions(module) else 1)

    def forward(self, module: Any, x: Tensor, scale: Tensor | None, sink: Sink | None) -> Tensor:
        x_hat = normalised(module, x)
        shape = broadcast_shape(module, x)
        if not trainable_bias(module):
            weight = nodes.rows(module.weight, x.shape[0], scale, sink)
            y = x_hat * weight.view(-1, *shape)
            bias = getattr(module, "bias", None)
            return (y if bias is None else y + bias.view(shape)).to(x_hat.dtype)
        parameters = torch.stack([module.weight, module.bias])
        rows = nodes.rows(parameters, x.shape[0], scale, sink and _stacked_gradients(sink))
        weight, bias = rows.view(-1, 2, *shape).unbind(1)
        return torch.addcmul(bias, x_hat, weight).to(x_hat.dtype)

    def gram(self, module: Any, uses: Sequence[Use]) -> Tensor:
        return fk.gram_rows(_summed(uses))

    def combine(self, module: Any, uses: Sequence[Use], s: Tensor) -> Gradients:
        gradient = fk.combine_rows(_summed(uses), s)
        return (gradient[0], gradient[1]) if trainable_bias(module) else (gradient, None)


def normalised(module: Any, x: Tensor) -> Tensor:
    """Return the module's output without its scale and shift, in training mode, with its side effects."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    momentum = module.momentum or 0.0
    if module.track_running_stats:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # torch's cumulative average
            momentum = 1.0 / float(module.num_batches_tracked)
    return F.batch_norm(x, module.running_mean, module.running_var, None, None, True, momentum, module.eps)


def broadcast_shape(module: Any, x: Tensor) -> tuple[int, ...]:
    """Return the shape in which the weight multiplies one sample of x_hat."""
    if _over_last_dimensions(module):
        shape = tuple(module.normalized_shape)
        return (1,) * (x.ndim - 1 - len(shape)) + shape
    return (module.weight.numel(),) + (1,) * (x.ndim - 2)


def _over_last_dimensions(module: Any) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm))


def _stacked_gradients(sink: Sink) -> Sink:
    """Return a sink for the stacked parameter (2, *shape) from one that answers with two gradients."""

    def stacked(a: Tensor, e: Tensor, selective: bool) -> Gradients | None:
        gradients = sink(a, e, selective)
        return gradients if gradients is None else (torch.stack(gradients), None)  # type: ignore[arg-type]

    return stacked


def _summed(uses: Sequence[Use]) -> Tensor:
    """Return the contributions (N, *shape), summed over the uses."""
    return uses[0][1] if len(uses) == 1 else torch.stack([e for _, e in uses]).sum(0)
