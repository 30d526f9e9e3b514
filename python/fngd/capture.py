"""Routes the calls of supported modules through their rules, and finds which modules those are."""

import fnmatch
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .rules import InputProjection, Rule, attention, rule_for

SKIPPED = "skipped"
NORMALISATION = 'normalisation (norms="plain")'
WISHES = (SKIPPED, NORMALISATION)
"""Reasons for the plain gradient that the user gave."""


class Layer:
    """A module served by a rule: one block of parameters, one row of the coefficient table."""

    def __init__(self, name: str, owner: nn.Module, rule: Rule, index: int) -> None:
        self.owner = owner  # whose calls are routed
        self.module: Any = InputProjection(owner) if isinstance(owner, nn.MultiheadAttention) else owner
        self.name, self.rule, self.index = name, rule, index
        self.time_first = False  # whether dimension 1 of its input (T, N, D) counts the samples
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

    def plain(self, x: Tensor, *arguments: Any) -> Tensor:
        """Return what the module computes without being routed."""
        return type(self.module).forward(self.module, x, *arguments)


class Router(Protocol):
    """What a routed module hands its calls to."""

    def forward(self, layer: Layer, x: Tensor, *arguments: Any) -> Tensor:
        """Return the layer's output; more arguments are for its rule."""


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
        if router is None:
            return self.layer.plain(input)
        if self.layer.time_first and input.ndim == 3:
            return router.forward(self.layer, input.transpose(0, 1)).transpose(0, 1)
        return router.forward(self.layer, input)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return _own_forward(memo[id(self.layer.owner)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self.layer.owner,)


class RoutedAttention(RoutedForward):
    """The `forward` of a routed nn.MultiheadAttention: its input projections go through the router."""

    def __call__(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what the module returns; the arguments are its own."""
        router, layer = self.router(), self.layer
        if router is None or not layer.takes(query) or query.is_nested:
            return type(layer.owner).forward(layer.owner, query, key, value, *args, **kwargs)
        project = partial(router.forward, layer)
        return attention(layer.owner, project, query, key, value, *args, **kwargs)


def _is_replaced(module: nn.Module) -> bool:
    """Return whether somebody else put a forward of its own on the instance."""
    forward = module.__dict__.get("forward")
    return not (
        forward is None
        or isinstance(forward, RoutedForward)
        or getattr(forward, "__func__", None) is type(module).forward  # left by a copy of a routed module
    )


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    return types.MethodType(type(module).forward, module)


def route(layers: Iterable[Layer], router: Router) -> Callable[[], None]:
    """Send the layers' calls to the router; return a function that puts back what was there before."""
    routed = [
        (layer.owner, (RoutedForward if layer.module is layer.owner else RoutedAttention)(layer, router))
        for layer in layers
    ]
    previous = [module.__dict__.get("forward") for module, _ in routed]
    for module, forward in routed:
        module.forward = forward  # type: ignore[method-assign, assignment]

    def restore() -> None:
        for (module, forward), before in zip(routed, previous, strict=True):
            if module.__dict__.get("forward") is not forward:
                continue  # routed anew by another optimizer since
            if before is None:
                del module.__dict__["forward"]
            else:
                module.forward = before

    return restore


def release(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Undo the routing that another optimizer left on modules with these parameters; warn if it lives."""
    wanted, taken = {id(p) for p in parameters}, False
    for module in model.modules():
        forward = module.__dict__.get("forward")
        own = module.parameters(recurse=False)
        if isinstance(forward, RoutedForward) and any(id(p) in wanted for p in own):
            taken |= forward.router() is not None
            del module.__dict__["forward"]
    if taken:
        warnings.warn(
            "layers of this model were routed by another FNGD optimizer, which is detached from them now",
            stacklevel=3,
        )


def _weight(module: nn.Module) -> nn.Parameter | None:
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    return module._parameters.get(name)


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
    unserved_attention: list[str] = []
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
        elif name.rpartition(".")[0] in unserved_attention:
            rule, reason = None, "MultiheadAttention reads its weight without calling it"
        elif rule is not None and _weight(module) is None:
            rule, reason = None, "its weight is computed by a parametrization"
        elif rule is not None and id(_weight(module)) not in wanted:
            rule, reason = None, "its weight is not optimized here"
        elif rule is not None and rule.name == "affine" and not affine:
            rule, reason = None, NORMALISATION
        if rule is None:
            reasons[name] = reason
            if isinstance(module, nn.MultiheadAttention):
                unserved_attention.append(name)
        else:
            layers.append(Layer(name, module, rule, len(layers)))
    time_first = _time_first(model)
    for layer in layers:
        layer.time_first = layer.owner in time_first
    return layers, reasons


def _time_first(model: nn.Module) -> set[nn.Module]:
    """Return the modules between the attentions of torch's Transformer layers with batch_first=False."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            if not module.self_attn.batch_first:
                found.update(
                    child for child in module.children() if not isinstance(child, nn.MultiheadAttention)
                )
        elif (
            isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder))
            and module.norm is not None
            and not module.layers[0].self_attn.batch_first
        ):
            found.add(module.norm)
    return found
