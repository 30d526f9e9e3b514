"""Routes the calls of supported modules through their rules."""

import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .journal import Journal
from .rules import InputProjection, Opaque, Rule, attention


class Member:
    """A module whose calls are routed, and its rule."""

    layer: "Layer"

    def __init__(self, name: str, owner: nn.Module, rule: Rule) -> None:
        self.name, self.rule = name, rule
        self.owner = owner  # whose calls are routed
        self.module: Any = owner  # what the rule works on
        if rule.name == "generic":
            self.module = Opaque(owner)
        elif isinstance(owner, nn.MultiheadAttention):
            self.module = InputProjection(owner)
        self.time_first = False  # whether dimension 1 of its input (T, N, D) counts the samples

    @property
    def parameters(self) -> Sequence[nn.Parameter | None]:
        """Return (weight, bias), None for a bias that the module does not have; of an opaque module all."""
        if isinstance(self.module, Opaque):
            return self.module.parameters
        return self.module.weight, getattr(self.module, "bias", None)

    @property
    def substituted(self) -> bool:
        """Whether other tensors stand in the place of its parameters, as in torch.func.functional_call."""
        standing = self.module._parameters.values()
        return not all(p is None or isinstance(p, nn.Parameter) for p in standing)

    def takes(self, x: Tensor) -> bool:
        """Return whether this call is a training call on a non-empty batch."""
        module = self.module
        weight = module._parameters["weight"]  # without nn.Module's slower attribute look-up
        training = module.training and torch.is_grad_enabled() and weight.requires_grad
        return bool(training) and self.rule.batched(module, x) and x.shape[0] > 0

    def plain(self, x: Tensor, *arguments: Any) -> Any:
        """Return what the module computes without being routed."""
        return type(self.module).forward(self.module, x, *arguments)


class Layer:
    """One block of parameters, one row of the coefficient table: a module, or several that share a weight."""

    def __init__(self, members: Sequence[Member], index: int) -> None:
        self.members, self.index = tuple(members), index
        self.name = "+".join(member.name for member in members)
        self.note = ""  # why the last batches that could not be weighted were not
        self.journal = Journal(f"layer {self.name}")
        self.solves = 0
        self.weights: Tensor | None = None  # of the last solve
        # What was captured in forwards and still can be differentiated.
        self.open_uses: weakref.WeakSet[Any] = weakref.WeakSet()
        self.answered_task = -1  # the last backward in which a use had to be answered at once
        for member in members:
            member.layer = self

    def keep_plain(self, reason: str, detail: str = "") -> None:
        """Note why a batch takes the plain gradient here; detail: what is read in place of the reason."""
        self.note = detail or reason
        if not torch.compiler.is_compiling():
            self.journal.count(reason, detail=f"plain gradient, {self.note}")

    @property
    def kind(self) -> str:
        """Return the names of its rules."""
        return "+".join(dict.fromkeys(member.rule.name for member in self.members))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all members, each once."""
        return list(dict.fromkeys(p for member in self.members for p in member.parameters if p is not None))


class Router(Protocol):
    """What a routed module hands its calls to."""

    def forward(self, member: Member, x: Tensor, *arguments: Any) -> Any:
        """Return the module's output; more arguments are for its rule."""


class RoutedForward:
    """The `forward` of a routed module, set on the instance.

    It holds its router weakly: a model outlives its optimizer unharmed. A copied module is not routed.
    """

    def __init__(self, member: Member, router: Router) -> None:
        self.member = member
        self.router = weakref.ref(router)

    def __call__(self, input: Tensor) -> Tensor:
        """Return the module's output; the argument has torch's name, which callers may use."""
        router = self.router()
        if router is None:
            return self.member.plain(input)
        if self.member.time_first and input.ndim == 3:
            return router.forward(self.member, input.transpose(0, 1)).transpose(0, 1)
        return router.forward(self.member, input)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return _own_forward(memo[id(self.member.owner)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self.member.owner,)


class RoutedTransposedConv(RoutedForward):
    """The `forward` of a routed transposed convolution, which may be told the size of its output."""

    def __call__(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the module's output."""
        router = self.router()
        if router is None:
            return self.member.plain(input, output_size)
        return router.forward(self.member, input, output_size)


class RoutedAttention(RoutedForward):
    """The `forward` of a routed nn.MultiheadAttention: its input projections go through the router."""

    def __call__(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what the module returns; the arguments are its own."""
        router, member = self.router(), self.member
        if router is None or not member.takes(query) or query.is_nested:
            return type(member.owner).forward(member.owner, query, key, value, *args, **kwargs)
        project = partial(router.forward, member)
        return attention(member.owner, project, query, key, value, *args, **kwargs)


class RoutedOpaque(RoutedForward):
    """The `forward` of a routed module of any kind."""

    @torch.compiler.disable(reason="hooks weight the gradients of modules that the generic rule serves")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns; the arguments are its own."""
        router, member = self.router(), self.member
        x = member.module.samples_first(args, kwargs)
        reason = ""
        if x is None or member.time_first:
            reason = "its input has no row per sample"
        elif router is not None and member.takes(x):
            reason = member.module.reason_against_call(args, kwargs)
            if not reason:
                return router.forward(member, x, args, kwargs)
        if reason and member.module.training:
            member.layer.keep_plain(reason)
        return member.plain(x, args, kwargs)


def _routed(member: Member, router: Router) -> RoutedForward:
    if isinstance(member.module, Opaque):
        return RoutedOpaque(member, router)
    if isinstance(member.module, InputProjection):
        return RoutedAttention(member, router)
    if isinstance(member.module, nn.modules.conv._ConvTransposeNd):
        return RoutedTransposedConv(member, router)
    return RoutedForward(member, router)


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


def route(members: Iterable[Member], router: Router) -> Callable[[], None]:
    """Send the members' calls to the router; return a function that puts back what was there before."""
    routed = [(member.owner, _routed(member, router)) for member in members]
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
        if isinstance(forward, RoutedForward) and any(id(p) in wanted for p in module.parameters()):
            taken |= forward.router() is not None
            del module.__dict__["forward"]
    if taken:
        warnings.warn(
            "layers of this model were routed by another FNGD optimizer, which is detached from them now",
            stacklevel=3,
        )
