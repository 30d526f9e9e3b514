"""Routes the calls of modules to whoever collects or weights them."""

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..routed_class import entry_of, own_forward, reaches_entry, remove_entry, set_entry
from ..rules import GenericModule, InputProjection, attention, reason_against_call
from .block import RoutedModule


class Router(Protocol):
    """What a routed module hands its calls to."""

    def serves(self, module: RoutedModule, x: Any) -> bool:
        """Return whether a call on x, samples first, goes through `forward`; note why if it does not."""

    def turn_away(self, module: RoutedModule, reason: str) -> None:
        """Note why a call keeps the plain gradient."""

    def forward(self, module: RoutedModule, x: Tensor, *arguments: Any) -> Any:
        """Return the module's output for a call that is served; more arguments are for its rule."""


class Routing:
    """Takes the calls of one module to a router, which it holds weakly: a model outlives its optimizer."""

    def __init__(self, routed: RoutedModule, router: Router) -> None:
        self.owner, self.routed, self.router = routed.owner, routed, weakref.ref(router)
        self.own = own_forward(routed.owner)
        code = getattr(inspect.unwrap(self.own), "__code__", None)
        self.names = code.co_varnames[1 : code.co_argcount] if code else ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle to None: a copied module is not routed."""
        return type(None), ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output; the arguments are its own."""
        router, routed = self.router(), self.routed
        if router is None:
            return self.own(self.owner, *args, **kwargs)
        if kwargs or not args:
            named = self.names[len(args) : len(args) + len(kwargs)]
            if not named or kwargs.keys() != set(named):
                self.turn_away(router, "called with arguments that its rule does not know")
                return self.own(self.owner, *args, **kwargs)
            args, kwargs = (*args, *(kwargs[name] for name in named)), {}
        if routed.time_first and _has_time(args[0]):
            x = args[0].transpose(0, 1)
            if router.serves(routed, x):
                return router.forward(routed, x).transpose(0, 1)
        elif router.serves(routed, args[0]):
            return router.forward(routed, *args)
        return self.own(self.owner, *args)

    def turn_away(self, router: Router, reason: str) -> None:
        """Have it noted why a call keeps the plain gradient, if it is to have one."""
        if torch.is_grad_enabled():
            router.turn_away(self.routed, reason)


class AttentionRouting(Routing):
    """Takes the input projections of an nn.MultiheadAttention to a router."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns; the arguments are its own."""
        router, routed = self.router(), self.routed
        if router is not None:
            exchanged = not routed.owner.batch_first and _has_time(query)
            if router.serves(routed, query.transpose(0, 1) if exchanged else query):
                project = partial(router.forward, routed)
                return attention(routed.owner, project, query, key, value, *args, **kwargs)
        return self.own(self.owner, query, key, value, *args, **kwargs)


class GenericRouting(Routing):
    """Takes the calls of a module that the generic rule serves to a router."""

    @torch.compiler.disable(reason="hooks weight the gradients of modules that the generic rule serves")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns; the arguments are its own."""
        router, routed = self.router(), self.routed
        if router is not None:
            x = routed.module.samples_first(args, kwargs)
            if x is None or routed.time_first:
                self.turn_away(router, "its input has no row per sample")
            elif router.serves(routed, x):
                reason = reason_against_call(routed.module, args, kwargs)
                if not reason:
                    return router.forward(routed, x, args, kwargs)
                self.turn_away(router, reason)
        return self.own(self.owner, *args, **kwargs)


def _has_time(x: Any) -> bool:
    """Return whether an input is a tensor (T, N, D)."""
    return isinstance(x, Tensor) and not x.is_nested and x.ndim == 3


def _routing(routed: RoutedModule, router: Router) -> Routing:
    if isinstance(routed.module, GenericModule):
        return GenericRouting(routed, router)
    if isinstance(routed.module, InputProjection):
        return AttentionRouting(routed, router)
    return Routing(routed, router)


def is_replaced(module: nn.Module) -> bool:
    """Return whether somebody put a forward on the instance from which calls do not get to be routed."""
    forward = module.__dict__.get("forward")
    return not (forward is None or reaches_entry(forward) or _is_own_method(module, forward))


def _is_own_method(module: nn.Module, forward: Any) -> bool:
    """Return whether it is the method of the module's own class, as accelerate leaves it on the instance."""
    return isinstance(forward, MethodType) and forward == MethodType(own_forward(module), module)


def reason_against_routing(module: RoutedModule, router: Router) -> str:
    """Return why the calls of a module that was routed no longer reach the router, "" if they may."""
    entry = entry_of(module.owner)
    if entry is None or entry.router() is not router:
        return "its calls go to another optimizer, or to none"
    forward = module.owner.forward
    reached = reaches_entry(forward) or forward is module.served_through
    return "" if reached else "its forward was replaced since the optimizer was made"


def route(modules: Iterable[RoutedModule], router: Router) -> Callable[[], None]:
    """Send the modules' calls to the router; return a function that puts back what was there before."""
    routings = [_routing(module, router) for module in modules]
    previous = [entry_of(routing.owner) for routing in routings]
    for routing in routings:
        if _is_own_method(routing.owner, routing.owner.__dict__.get("forward")):
            del routing.owner.__dict__["forward"]
        set_entry(routing.owner, routing)

    def restore() -> None:
        for routing, before in zip(routings, previous, strict=True):
            if entry_of(routing.owner) is not routing:
                continue  # routed anew by another optimizer since
            if before is None:
                remove_entry(routing.owner)
            else:
                set_entry(routing.owner, before)

    return restore


def release(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Undo the routing that another optimizer left on modules with these parameters; warn if it lives."""
    wanted, taken = {id(p) for p in parameters}, False
    for module in model.modules():
        entry = entry_of(module)
        if entry is not None and any(id(p) in wanted for p in module.parameters()):
            taken |= entry.owner is module and entry.router() is not None
            remove_entry(module)
    if taken:
        warnings.warn(
            "layers of this model were routed by another FNGD optimizer, which is detached from them now",
            stacklevel=3,
        )
