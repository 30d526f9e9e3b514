"""Routes the calls of supported modules through their rules, and finds which modules those are."""

import fnmatch
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .rules import Rule, rule_for

SKIPPED = "skipped"
NORMALISATION = 'normalisation (norms="plain")'
WISHES = (SKIPPED, NORMALISATION)
"""Reasons for the plain gradient that the user gave."""


class Layer:
    """A module served by a rule: one block of parameters, one row of the coefficient table."""

    def __init__(self, name: str, module: nn.Module, rule: Rule, index: int) -> None:
        self.module: Any = module
        self.name, self.rule, self.index = name, rule, index
        self.note = ""  # why the last batches that could not be weighted were not
        self.solves = 0
        self.weights: Tensor | None = None  # of the last solve
        self.open_uses = 0  # solving forwards whose backward has not come yet
        self.answered_task = -1  # the last backward in which a use had to be answered at once

    @property
    def parameters(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """Return (weight, bias), None for a bias that the module does not have."""
        return self.module.weight, getattr(self.module, "bias", None)

    def takes(self, x: Tensor) -> bool:
        """Return whether this call is a training call on a non-empty batch."""
        module = self.module
        weight = module._parameters["weight"]  # without nn.Module's slower attribute look-up
        training = module.training and torch.is_grad_enabled() and weight.requires_grad
        return bool(training) and self.rule.batched(module, x) and x.shape[0] > 0

    def plain(self, x: Tensor) -> Tensor:
        """Return what the module computes without being routed."""
        return type(self.module).forward(self.module, x)


class Router(Protocol):
    """What a routed module hands its calls to."""

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        """Return the layer's output."""


class RoutedForward:
    """The `forward` of a routed module, set on the instance.

    It holds its router weakly: a model outlives its optimizer unharmed. A copied module is not routed.
    """

    def __init__(self, layer: Layer, router: Router) -> None:
        self.layer = layer
        self.router = weakref.ref(router)

    def __call__(self, input: Tensor) -> Tensor:
        """Return the module's output; the argument has torch's name, which callers may use."""
        router = self.router()
        return self.layer.plain(input) if router is None else router.forward(self.layer, input)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[[Tensor], Tensor]:
        return _own_forward(memo[id(self.layer.module)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self.layer.module,)


def _is_replaced(module: nn.Module) -> bool:
    """Return whether somebody else put a forward of its own on the instance."""
    forward = module.__dict__.get("forward")
    return not (
        forward is None
        or isinstance(forward, RoutedForward)
        or getattr(forward, "__func__", None) is type(module).forward  # left by a copy of a routed module
    )


def _own_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return types.MethodType(type(module).forward, module)


def route(layers: Iterable[Layer], router: Router) -> Callable[[], None]:
    """Send the layers' calls to the router; return a function that puts back what was there before."""
    routed = [(layer, RoutedForward(layer, router)) for layer in layers]
    previous = [layer.module.__dict__.get("forward") for layer, _ in routed]
    for layer, forward in routed:
        layer.module.forward = forward

    def restore() -> None:
        for (layer, forward), before in zip(routed, previous, strict=True):
            if layer.module.__dict__.get("forward") is not forward:
                continue  # routed anew by another optimizer since
            if before is None:
                del layer.module.__dict__["forward"]
            else:
                layer.module.forward = before

    return restore


def release(model: nn.Module) -> None:
    """Undo the routing that a living optimizer left on the model's modules, with a warning."""
    taken = False
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, RoutedForward):
            taken |= forward.router() is not None
            del module.__dict__["forward"]
    if taken:
        warnings.warn(
            "this model was routed by another FNGD optimizer, which is detached from it now", stacklevel=3
        )


def find_layers(
    model: nn.Module, parameters: Iterable[Tensor], *, affine: bool, skip: Sequence[str] = ()
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers that rules serve and, for every other module with parameters, the reason against it.

    parameters: those to be optimized; a module whose weight is not among them is left alone.
    affine: whether normalisation layers are served.
    skip: fnmatch patterns of module names to leave plain.
    """
    wanted = {id(p) for p in parameters}
    owners: dict[int, list[str]] = {}
    modules = list(model.named_modules())
    for name, module in modules:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    attention = [f"{name}." for name, module in modules if isinstance(module, nn.MultiheadAttention)]

    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for name, module in modules:
        own = [p for p in module.parameters(recurse=False) if id(p) in wanted]
        if not own:
            continue
        rule, reason = rule_for(module)
        shared = sorted({owner for p in own for owner in owners[id(p)]} - {name})
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
            rule, reason = None, SKIPPED
        elif shared:
            rule, reason = None, f"shares a parameter with {', '.join(shared)}"
        elif _is_replaced(module):
            rule, reason = None, "its forward was replaced on the instance"
        elif any(name.startswith(prefix) for prefix in attention):
            rule, reason = None, "MultiheadAttention reads its weight without calling it"
        elif rule is not None and "weight" not in module._parameters:
            rule, reason = None, "its weight is computed by a parametrization"
        elif rule is not None and id(module.weight) not in wanted:
            rule, reason = None, "its weight is not optimized here"
        elif rule is not None and rule.name == "affine" and not affine:
            rule, reason = None, NORMALISATION
        if rule is None:
            reasons[name] = reason
        else:
            layers.append(Layer(name, module, rule, len(layers)))
    return layers, reasons
