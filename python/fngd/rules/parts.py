"""Layers of which only the weight, or only the bias, is optimized here; the other has its ordinary gradient.

The rule of such a layer works on a view of it, which holds the one parameter as `weight`, and no bias.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fngd_kernels.ops import nodes
from fngd_kernels.ops.nodes import Gradients, UseHandler

from ..torch_private import parameters_of
from .attention import ALL, InputProjection, ProjectionRule
from .base import Rule, Use, plus_bias
from .conv import ConvRule, ConvTransposeRule
from .linear import LinearRule, TransposedLinearRule


class PartRule(ABC):
    """The rule of one parameter of a layer."""

    @abstractmethod
    def part_of(self, module: Any) -> Any:
        """Return the view of the layer that the rule works on."""


def weight_rule(rule: Rule) -> Rule | None:
    """Return the rule of the weight alone of a layer that a rule serves, None where there is none."""
    return _WEIGHT_RULES.get(type(rule))


def bias_rule(rule: Rule) -> Rule | None:
    """Return the rule of the bias alone of a layer that a rule serves, None where there is none."""
    return _BIAS_RULES.get(type(rule))


class LayerPart:
    """A layer with one of its parameters, as `weight`, and no bias; all other attributes are the layer's."""

    bias = None

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.owner, name)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        return parameters_of(self.owner)[self.name]


class InputPart(InputProjection):
    """The input projection of an attention with one of its parameters, as `weight`, and no bias."""

    def __init__(self, attention: nn.MultiheadAttention, name: str) -> None:
        super().__init__(attention)
        self.name = name

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        return parameters_of(self.attention)[self.name]

    @property
    def bias(self) -> None:
        """None."""


class _WeightRule(PartRule):
    """Mixed into the rule of a layer: the bias is added outside of the node."""

    channel: int

    def part_of(self, module: Any) -> Any:
        return LayerPart(module, "weight")

    def forward(
        self, module: Any, x: Tensor, coefficients: Tensor | None, on_use: UseHandler | None, *arguments: Any
    ) -> Tensor:
        y = super().forward(module, x, coefficients, on_use, *arguments)  # type: ignore[misc]
        return plus_bias(y, self.bias_of(module, *arguments), self.channel)

    def bias_of(self, module: Any, *arguments: Any) -> Tensor:
        """Return the bias that is added in this call."""
        return parameters_of(module.owner)["bias"]


class LinearWeightRule(_WeightRule, LinearRule):
    """Linear layers."""


class TransposedLinearWeightRule(_WeightRule, TransposedLinearRule):
    """Linear layers with a weight (I, O)."""


class ConvWeightRule(_WeightRule, ConvRule):
    """Convolutions."""


class ConvTransposeWeightRule(_WeightRule, ConvTransposeRule):
    """Transposed convolutions."""


class ProjectionWeightRule(_WeightRule, ProjectionRule):
    """The input projections of an attention."""

    def part_of(self, module: Any) -> Any:
        return InputPart(module, "in_proj_weight")

    def bias_of(self, module: Any, rows: slice = ALL) -> Tensor:
        return parameters_of(module.attention)["in_proj_bias"][rows]


class BiasRule(PartRule, Rule):
    """The bias of a layer: C_n = sum_t E_nt (O,), over positions or output pixels t.

    The layer's weight has its ordinary gradient if it asks for one.
    """

    name = "bias"

    def __init__(self, layer: LinearRule | ConvRule) -> None:
        self.layer: Any = layer

    def part_of(self, module: Any) -> Any:
        return LayerPart(module, "bias")

    def batched(self, module: Any, x: Tensor) -> bool:
        return self.layer.batched(module, x)

    def forward(
        self, module: Any, x: Tensor, coefficients: Tensor | None, on_use: UseHandler | None, *arguments: Any
    ) -> Tensor:
        y = self.layer.without_bias(module.owner, x, *arguments)
        bias = nodes.rows(module.weight, x.shape[0], coefficients, on_use)
        return plus_bias(y, bias, self.layer.channel)

    def contributions(self, module: Any, uses: Sequence[Use]) -> Gradients:
        return torch.stack([use.e for use in uses]).sum(0), None


class ProjectionBiasRule(BiasRule):
    """The biases of an attention's input projections."""

    def part_of(self, module: Any) -> Any:
        return InputPart(module, "in_proj_bias")

    def forward(
        self,
        module: Any,
        x: Tensor,
        coefficients: Tensor | None,
        on_use: UseHandler | None,
        rows: slice = ALL,
    ) -> Tensor:
        y = self.layer.without_bias(module, x, rows)
        bias = nodes.rows(module.weight, x.shape[0], coefficients, on_use)
        return plus_bias(y, bias[:, rows], self.layer.channel)


_WEIGHT_RULES: dict[type[Rule], Rule] = {
    LinearRule: LinearWeightRule(),
    TransposedLinearRule: TransposedLinearWeightRule(),
    ConvRule: ConvWeightRule(),
    ConvTransposeRule: ConvTransposeWeightRule(),
    ProjectionRule: ProjectionWeightRule(),
}
_BIAS_RULES: dict[type[Rule], Rule] = {
    LinearRule: BiasRule(LinearRule()),
    TransposedLinearRule: BiasRule(TransposedLinearRule()),
    ConvRule: BiasRule(ConvRule()),
    ConvTransposeRule: BiasRule(ConvTransposeRule()),
    ProjectionRule: ProjectionBiasRule(ProjectionRule()),
}
