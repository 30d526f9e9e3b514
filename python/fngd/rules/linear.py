"""nn.Linear: C_n = E_n^T A_n."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fngd_kernels as fk
from fngd_kernels.ops import nodes
from fngd_kernels.ops.nodes import Gradients, Sink

from .base import Use, pair, trainable_bias


class LinearRule:
    """Linear layers on (N, I) or (N, ..., I); the dimensions between are positions."""

    name = "linear"

    def reason_against(self, module: Any) -> str | None:
        return None

    def batched(self, module: Any, x: Tensor) -> bool:
        return x.ndim >= 2

    def forward(self, module: Any, x: Tensor, scale: Tensor | None, sink: Sink | None) -> Tensor:
        return nodes.linear(x, module.weight, module.bias, scale, sink)

    def gram(self, module: Any, uses: Sequence[Use]) -> Tensor:
        return fk.gram(*_positions(uses), bias=trainable_bias(module))

    def combine(self, module: Any, uses: Sequence[Use], s: Tensor) -> Gradients:
        a, e = _positions(uses)
        return pair(fk.combine(a, e, s, bias=trainable_bias(module)))


def _positions(uses: Sequence[Use]) -> Use:
    """Return all uses as one (N, T, I), (N, T, O); a single use without positions stays (N, I), (N, O)."""
    if len(uses) == 1 and uses[0][0].ndim <= 3:
        return uses[0]
    a = torch.cat([a.reshape(a.shape[0], -1, a.shape[-1]) for a, _ in uses], dim=1)
    return a, torch.cat([e.reshape(e.shape[0], -1, e.shape[-1]) for _, e in uses], dim=1)
