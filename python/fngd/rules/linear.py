"""nn.Linear: C_n = E_n^T A_n."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fngd_kernels as fk
from fngd_kernels.ops import nodes
from fngd_kernels.ops.nodes import Gradients, UseHandler
from fngd_kernels.ops.sketch import sketched
from fngd_kernels.sketch import INPUTS, OUTPUTS

from .base import Rule, Use, bias_contributions, biased, combined_bias, pair, with_bias


class LinearRule(Rule):
    """Linear layers on (N, I) or (N, ..., I); the dimensions between are positions."""

    name = "linear"
    channel = -1
    """The dimension of the output that the bias belongs to."""

    def forward(
        self, module: Any, x: Tensor, coefficients: Tensor | None, on_use: UseHandler | None
    ) -> Tensor:
        return nodes.linear(x, module.weight, module.bias, coefficients, on_use)

    def without_bias(self, module: Any, x: Tensor) -> Tensor:
        """Return torch's own output, without the bias."""
        return F.linear(x, module.weight)

    def gram(self, module: Any, uses: Sequence[Use], sketch: fk.Sketch | None = None) -> Tensor:
        biases = len(biased(module, uses))
        if biases in (0, len(uses)):
            return fk.gram(*positions(uses), bias=biases > 0, sketch=sketch)
        k = fk.gram(*positions(uses), sketch=sketch)
        return with_bias(k, bias_contributions(module, uses, self.channel), sketch)

    def contributions(self, module: Any, uses: Sequence[Use]) -> Gradients:
        a, e = positions(uses)
        return e.mT @ a, bias_contributions(module, uses, self.channel)

    def combine(self, module: Any, uses: Sequence[Use], s: Tensor) -> Gradients:
        biases = len(biased(module, uses))
        if biases in (0, len(uses)):
            return pair(fk.combine(*positions(uses), s, bias=biases > 0))
        weight, _ = pair(fk.combine(*positions(uses), s))
        return weight, combined_bias(bias_contributions(module, uses, self.channel), s)


class TransposedLinearRule(LinearRule):
    """Hugging Face's Conv1D: a linear layer that keeps its weight as (I, O)."""

    name = "transposed linear"

    def forward(
        self, module: Any, x: Tensor, coefficients: Tensor | None, on_use: UseHandler | None
    ) -> Tensor:
        return nodes.linear(x, module.weight.T, module.bias, coefficients, on_use)

    def without_bias(self, module: Any, x: Tensor) -> Tensor:
        return F.linear(x, module.weight.T)

    def contributions(self, module: Any, uses: Sequence[Use]) -> Gradients:
        weight, bias = super().contributions(module, uses)
        assert weight is not None
        return weight.mT, bias

    def combine(self, module: Any, uses: Sequence[Use], s: Tensor) -> Gradients:
        weight, bias = super().combine(module, uses, s)
        assert weight is not None
        return weight.T, bias


def is_linear_map(rule: Rule) -> bool:
    """Return whether C_n of a rule's weight is E_n^T A_n (O, I), with A and E as `positions` gives them.

    Rules that inherit from LinearRule and say something else of C_n override `contributions`.
    """
    return getattr(type(rule), "contributions", None) is LinearRule.contributions


def positions(uses: Sequence[Use]) -> tuple[Tensor, Tensor]:
    """Return all uses as one: a (N, T, I), e (N, T, O)."""
    a, e = [_rows(use.a) for use in uses], [_rows(use.e) for use in uses]
    return (a[0], e[0]) if len(uses) == 1 else (torch.cat(a, 1), torch.cat(e, 1))


class Layer(NamedTuple):
    """The only use of a linear layer, for `fngd_kernels.ops.gram.gram_batch`."""

    a: Tensor
    """(N, T, I)"""
    e: Tensor
    """(N, T, O)"""
    bias: bool

    @property
    def kind(self) -> Hashable:
        """Return what the layers of one batch have in common, down to the alignment, which kernels know."""
        tensors = (
            (t.shape, t.stride(), t.dtype, t.device, t.storage_offset() * t.itemsize % 16)
            for t in (self.a, self.e)
        )
        return *tensors, self.bias

    def sketched(self, sketch: fk.Sketch) -> "Layer":
        """Return the layer of compressed channels."""
        return Layer(sketched(self.a, INPUTS, sketch), sketched(self.e, OUTPUTS, sketch), self.bias)


def layer_of(uses: Mapping[Any, Sequence[Use]]) -> Layer | None:
    """Return the only use of a block, by module, whose Gram matrix is that of a linear layer; or None."""
    if len(uses) != 1:
        return None
    ((routed, found),) = uses.items()
    if len(found) != 1 or getattr(type(routed.rule), "gram", None) is not LinearRule.gram:
        return None
    return Layer(*positions(found), bool(biased(routed.module, found)))


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
