"""What is captured: modules whose calls are routed, and the blocks of parameters that they own together."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import is_dtensor
from ..event_log import EventLog
from ..rules import GenericModule, GenericRule, InputProjection, PartRule, Rule, Use, trainable_bias
from ..torch_private import has_gradient_hooks, parameters_of


class RoutedModule:
    """A module whose calls are routed, and its rule.

    owner is the module in the model; module is what the rule works on: the owner itself, or a view of it.
    """

    block: "ParameterBlock"

    def __init__(self, name: str, owner: nn.Module, rule: Rule) -> None:
        self.name, self.owner, self.rule = name, owner, rule
        self.module: Any = owner
        if isinstance(rule, GenericRule):
            self.module = GenericModule(owner)
        elif isinstance(rule, PartRule):
            self.module = rule.part_of(owner)
        elif isinstance(owner, nn.MultiheadAttention):
            self.module = InputProjection(owner)
        self._is_view = self.module is not owner
        self.time_first = False  # whether dimension 1 of its input (T, N, D) counts the samples

    @property
    def parameters(self) -> Sequence[nn.Parameter | None]:
        """Return (weight, bias), None for a bias that the module does not have; all of a generic module."""
        if isinstance(self.module, GenericModule):
            return self.module.parameters
        return self.module.weight, getattr(self.module, "bias", None)

    def standing(self) -> Collection[Tensor | None]:
        """Return what stands in the places of its parameters now."""
        return self.module.standing() if self._is_view else parameters_of(self.owner).values()

    def reason_against_parameters(self) -> str:
        """Return why what stands in its parameters' place keeps the plain gradient, "" if it need not."""
        for p in self.standing():
            if p is not None and is_dtensor(p):
                return "its weight is split over ranks by tensor parallelism"
            if p is not None and not isinstance(p, nn.Parameter):  # as in torch.func.functional_call
                return "other tensors stand in the place of its parameters"
        return ""

    def takes(self, x: Tensor) -> bool:
        """Return whether this call is a training call on a non-empty batch."""
        if not (self.owner.training and torch.is_grad_enabled()):
            return False
        trains = self.module.trains() if self._is_view else parameters_of(self.owner)["weight"].requires_grad
        if not trains and trainable_bias(self.module):
            self.block.keep_plain("its weight is frozen")
        return trains and self.rule.batched(self.module, x) and x.shape[0] > 0

    def plain(self, x: Tensor, *arguments: Any) -> Any:
        """Return what the module computes without being routed."""
        return type(self.module).forward(self.module, x, *arguments)


Uses = dict[RoutedModule, list[Use]]
"""The uses of a block's modules, by module."""

Gradients = Sequence[Tensor | None]
"""The gradient of each of a module's parameters, None for one without."""


class ParameterBlock:
    """One block of the Fisher matrix: the parameters of a module, or of several that share a weight."""

    def __init__(self, modules: Sequence[RoutedModule], index: int) -> None:
        self.modules, self.index = tuple(modules), index
        self.name = "+".join(module.name for module in modules)
        self.why_plain = ""  # why the last batch that could not be weighted was not
        self.fallbacks = EventLog(f"layer {self.name}")
        for module in modules:
            module.block = self

    def keep_plain(self, reason: str, detail: str = "") -> None:
        """Note why a batch takes the plain gradient here; `detail` is reported in place of the reason."""
        self.why_plain = detail or reason
        if not torch.compiler.is_compiling():
            self.fallbacks.count(reason, detail=f"plain gradient, {self.why_plain}")

    def has_gradient_hooks(self) -> bool:
        """Return whether a hook waits for the gradient of one of its parameters."""
        return any(
            p is not None and has_gradient_hooks(p) for module in self.modules for p in module.standing()
        )

    @property
    def kind(self) -> str:
        """Return the names of its rules."""
        return "+".join(dict.fromkeys(module.rule.name for module in self.modules))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all modules, each once."""
        return list(dict.fromkeys(p for module in self.modules for p in module.parameters if p is not None))
