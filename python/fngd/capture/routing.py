"""Routes the calls of modules to whoever collects or weights them."""

import types
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..rules import GenericModule, InputProjection, attention, reason_against_call
from ..torch_private import TRANSPOSED_CONVOLUTIONS
from .block import RoutedModule


class Router(Protocol):
    """What a routed module hands its calls to."""

    def forward(self, module: RoutedModule, x: Tensor, *arguments: Any) -> Any:
        """Return the module's output; more arguments are for its rule."""


class RoutedForward:
    """The `forward` of a routed module, set on the instance.

    It holds its router weakly: a model outlives its optimizer unharmed. A copied module is not routed.
    """

    def __init__(self, routed: RoutedModule, router: Router) -> None:
        self.routed = routed
        self.router = weakref.ref(router)

    def __call__(self, input: Tensor) -> Tensor:
        """Return the module's output; the argument has torch's name, which callers may use."""
        router, routed = self.router(), self.routed
        if router is None:
            return routed.plain(input)
        if routed.time_first and input.ndim == 3:
            return router.forward(routed, input.transpose(0, 1)).transpose(0, 1)
        return router.forward(routed, input)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return _own_forward(memo[id(self.routed.owner)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self.routed.owner,)


class RoutedTransposedConv(RoutedForward):
    """The `forward` of a routed transposed convolution, which may be told the size of its output."""

    def __call__(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the module's output."""
        router = self.router()
        if router is None:
            return self.routed.plain(input, output_size)
        return router.forward(self.routed, input, output_size)


class RoutedAttention(RoutedForward):
    """The `forward` of a routed nn.MultiheadAttention: its input projections go through the router."""

    def __call__(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what the module returns; the arguments are its own."""
        router, routed = self.router(), self.routed
        if router is None or not routed.takes(query) or query.is_nested:
            return type(routed.owner).forward(routed.owner, query, key, value, *args, **kwargs)
        project = partial(router.forward, routed)
        return attention(routed.owner, project, query, key, value, *args, **kwargs)


class RoutedGenericModule(RoutedForward):
    """The `forward` of a routed module that the generic rule serves."""

    @torch.compiler.disable(reason="hooks weight the gradients of modules that the generic rule serves")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns; the arguments are its own."""
        router, routed = self.router(), self.routed
        x = routed.module.samples_first(args, kwargs)
        reason = ""
        if x is None or routed.time_first:
            reason = "its input has no row per sample"
        elif router is not None and routed.takes(x):
            reason = reason_against_call(routed.module, args, kwargs)
            if not reason:
                return router.forward(routed, x, args, kwargs)
        if reason and routed.owner.training:
            routed.block.keep_plain(reason)
        return routed.plain(x, args, kwargs)


def _forward_for(routed: RoutedModule, router: Router) -> RoutedForward:
    if isinstance(routed.module, GenericModule):
        return RoutedGenericModule(routed, router)
    if isinstance(routed.module, InputProjection):
        return RoutedAttention(routed, router)
    if isinstance(routed.owner, TRANSPOSED_CONVOLUTIONS):
        return RoutedTransposedConv(routed, router)
    return RoutedForward(routed, router)


def is_replaced(module: nn.Module) -> bool:
    """Return whether somebody else put a forward of its own on the instance."""
    forward = module.__dict__.get("forward")
    return not (
        forward is None
        or isinstance(forward, RoutedForward)
        or getattr(forward, "__func__", None) is type(module).forward  # left by a copy of a routed module
    )


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    return types.MethodType(type(module).forward, module)


def route(modules: Iterable[RoutedModule], router: Router) -> Callable[[], None]:
    """Send the modules' calls to the router; return a function that puts back what was there before."""
    routed = [(module.owner, _forward_for(module, router)) for module in modules]
    previous = [owner.__dict__.get("forward") for owner, _ in routed]
    for owner, forward in routed:
        owner.forward = forward  # type: ignore[method-assign, assignment]

    def restore() -> None:
        for (owner, forward), before in zip(routed, previous, strict=True):
            if owner.__dict__.get("forward") is not forward:
                continue  # routed anew by another optimizer since
            if before is None:
                del owner.__dict__["forward"]
            else:
                owner.forward = before

    return restore


def release(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Undo the routing that another optimizer left on modules with these parameters; warn if it lives."""
    wanted, taken = {id(p) for p in parameters}, False
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, RoutedForward) and any(id(p) in wanted for p in module.parameters()):
            taken |= forward.router() is not None
            del module.__dict__["forward"]
    if taken:
        warnings.warn(
            "layers of this model were routed by another FNGD optimizer, which is detached from them now",
            stacklevel=3,
        )
