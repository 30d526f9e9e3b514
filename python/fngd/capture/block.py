"""What is captured: modules whose calls are routed, and the blocks of parameters that they own together."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn, strided
from torch.nn import Parameter

from ..distributed import is_dtensor
from ..event_log import EventLog
from ..rules import GenericModule, GenericRule, InputProjection, PartRule, Rule, Use
from ..torch_private import has_gradient_hooks, parameters_of, unusual_context

NO_GRADIENT = "no gradient is recorded"
EVAL_MODE = "its module is in eval mode"
EMPTY = "its batch is empty"
FROZEN = "its weight is frozen"
MOVED = "its weight or bias is no longer in place (pruned, parametrized or removed)"


class RoutedModule:
    """A module whose calls are routed, and its rule.

    owner is the module in the model; module is what the rule works on: the owner itself, or a view of it.
    """

    block: "ParameterBlock"

    def __init__(self, name: str, owner: nn.Module, rule: Rule) -> None:
        self.name, self.owner, self.rule = name, owner, rule
        self.module: Any = owner
        self._pair = ("weight", "bias")
        if isinstance(rule, GenericRule):
            self.module = GenericModule(owner)
        elif isinstance(rule, PartRule):
            self.module = rule.part_of(owner)
            self._pair = (self.module.name, "")
        elif isinstance(owner, nn.MultiheadAttention):
            self.module, self._pair = InputProjection(owner), ("in_proj_weight", "in_proj_bias")
        self._is_generic = isinstance(rule, GenericRule)
        standing = self.standing()
        names = standing if self._is_generic else self._pair
        self._names = tuple(name for name in names if standing.get(name) is not None)
        self.time_first = False  # whether dimension 1 of its input (T, N, D) counts the samples
        self.served_through: Any = None  # the forward by which its last collected call came

    @property
    def parameters(self) -> Sequence[Parameter | None]:
        """Return (weight, bias), None for a bias that the module does not have; all of a generic module."""
        if self._is_generic:
            return self.module.parameters
        standing = self.standing()
        return standing.get(self._pair[0]), standing.get(self._pair[1])

    def parts(self) -> list[nn.Module]:
        """Return the modules that hold its parameters: parametrizations are modules of their own."""
        return list(self.owner.modules()) if self._is_generic else [self.owner]

    def standing(self) -> Mapping[str, Any]:
        """Return what stands in the places of its parameters now, by name."""
        return dict(self.owner.named_parameters()) if self._is_generic else parameters_of(self.owner)

    def reason_against_parameters(self) -> str:
        """Return why what stands in its parameters' places keeps the plain gradient, "" if it need not."""
        standing = self.standing() if self._is_generic else parameters_of(self.owner)
        for name in self._names:
            p = standing.get(name)
            if p is None:
                return MOVED
            if type(p) is not Parameter:
                if is_dtensor(p):
                    return "its weight is split over ranks by tensor parallelism"
                if not isinstance(p, Parameter):  # as in torch.func.functional_call
                    return "other tensors stand in the place of its parameters"
        if self._is_generic:
            if len(standing) > len(self._names):
                return MOVED
            return "" if self.trains() else FROZEN
        return "" if standing[self._names[0]].requires_grad else FROZEN

    def trains(self) -> bool:
        """Return whether any of its parameters asks for a gradient."""
        return any(p is not None and p.requires_grad for p in self.standing().values())

    def reason_against_places(self) -> str:
        """Return why a parameter is not in its place, also between calls, when it may be sharded."""
        standing = self.standing()
        return "" if all(standing.get(name) is not None for name in self._names) else MOVED

    def reason_against_call(self, x: Any) -> str:
        """Return why a call on x, samples first, keeps the plain gradient in any mode, "" if it need not."""
        if not is_grad_enabled():
            return NO_GRADIENT
        if not isinstance(x, Tensor) or x.is_nested or x.layout is not strided:
            return "its input is not a dense tensor"
        reason = unusual_context() or self.reason_against_parameters()
        if not reason and not self.rule.batched(self.module, x):
            return "its input has no dimension for samples"
        return reason


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
        self.why_shared = ""  # why its parameters are no longer its own, see shared.py
        self.fallbacks = EventLog(f"layer {self.name}" if self.name else "the model itself")
        for module in modules:
            module.block = self

    def keep_plain(self, reason: str, detail: str = "") -> None:
        """Note why a batch takes the plain gradient here; `detail` is reported in place of the reason."""
        self.why_plain = detail or reason
        if not torch.compiler.is_compiling():
            self.fallbacks.count(reason, detail=f"plain gradient, {self.why_plain}")

    def note_eval_mode(self) -> None:
        """Count a call in eval mode; as parts of a model often are in it, no line is logged."""
        if not torch.compiler.is_compiling():
            self.fallbacks.counts[EVAL_MODE] += 1

    def has_gradient_hooks(self) -> bool:
        """Return whether a hook waits for the gradient of one of its parameters."""
        return any(
            p is not None and has_gradient_hooks(p)
            for module in self.modules
            for p in module.standing().values()
        )

    @property
    def why_refused(self) -> str:
        """Return why a module of any kind refused a call that was captured already, "" if none did."""
        return next(filter(None, (getattr(module.module, "refused", "") for module in self.modules)), "")

    @property
    def kind(self) -> str:
        """Return the names of its rules."""
        return "+".join(dict.fromkeys(module.rule.name for module in self.modules))

    @property
    def parameters(self) -> list[Parameter]:
        """Return the parameters of all modules, each once."""
        return list(dict.fromkeys(p for module in self.modules for p in module.parameters if p is not None))
