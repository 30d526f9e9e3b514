"""nn.Linear: C_n = E_n^T A_n."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fngd_kernels as fk
from fngd_kernels.ops import nodes
from fngd_kernels.ops.nodes import Gradients, Sink

from .base import Use, biased, pair


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
        with_bias = biased(module, uses)
        if len(with_bias) in (0, len(uses)):
            return fk.gram(*_positions(uses), bias=bool(with_bias))
        return fk.gram(*_positions(uses)) + fk.gram_rows(_bias_rows(with_bias))

    def combine(self, module: Any, uses: Sequence[Use], s: Tensor) -> Gradients:
        with_bias = biased(module, uses)
        if len(with_bias) in (0, len(uses)):
            return pair(fk.combine(*_positions(uses), s, bias=bool(with_bias)))
        weight, _ = pair(fk.combine(*_positions(uses), s))
        return weight, fk.combine_rows(_bias_rows(with_bias), s)


def _bias_rows(uses: Sequence[Use]) -> Tensor:
    """Return the contributions (N, O) to the bias."""
    _, e = _positions(uses)
    return e if e.ndim == 2 else e.sum(1)


def _positions(uses: Sequence[Use]) -> tuple[Tensor, Tensor]:
    """Return all uses as one (N, T, I), (N, T, O); a single use without positions stays (N, I), (N, O)."""
    if len(uses) == 1 and uses[0].a.ndim <= 3:
        return uses[0].a, uses[0].e
    a = torch.cat([a.reshape(a.shape[0], -1, a.shape[-1]) for a, *_ in uses], dim=1)
    return a, torch.cat([e.reshape(e.shape[0], -1, e.shape[-1]) for _, e, _ in uses], dim=1)
