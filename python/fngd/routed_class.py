"""The class of a routed module: a subclass of its own class, whose `forward` finds out whose call it is.

As torch's parametrizations do. A callable on the instance would not know: copies that share the instance's
dictionary (copy.copy, replicas of nn.DataParallel, clones of meta-learning packages) would take it along, and
compute with the weights of the module that it was made for.
"""

import copyreg
from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, Protocol

from torch import nn

ENTRY = "_fngd_routing"
"""The attribute of a routed module that says where its calls go."""


class Entry(Protocol):
    """Takes the calls of its owner, and of no other module."""

    owner: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the owner's forward returns."""


class RoutedClass:
    """First base of every routed class; the second is the module's own class, whose name it has."""

    _fngd_routing = None

    def __init_subclass__(cls, **options: Any) -> None:
        # The module's own class does not hear of a routed one: users keep registers of their subclasses.
        if RoutedClass not in cls.__bases__:
            super().__init_subclass__(**options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Describe the module to copy and pickle as one of its own class, which is not routed."""
        reduced = super().__reduce_ex__(protocol)
        kind = type(self)
        if isinstance(reduced, str) or RoutedClass not in kind.__bases__:
            return reduced
        make, arguments, *rest = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make = kind.__bases__[1].__new__  # pickle takes __newobj__ for the object's present class only
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != ENTRY}
        return make, tuple(kind.__bases__[1] if a is kind else a for a in arguments), *rest


def _routed_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that hands the call to the module's entry, and else does what `plain` does."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        entry = getattr(self, "_fngd_routing", None)
        if entry is None or entry.owner is not self:
            return plain(self, *args, **kwargs)
        return entry(*args, **kwargs)

    # torch.jit compiles the source of what is wrapped, with the globals of what wraps it.
    names = getattr(plain, "__globals__", globals())
    return wraps(plain)(FunctionType(forward.__code__, names, closure=forward.__closure__))


_CODE = _routed_forward(nn.Module.forward).__code__  # type: ignore[attr-defined]


def reaches_entry(forward: Any) -> bool:
    """Return whether a forward is that of a routed class, or was wrapped around it by the usual means."""
    while forward is not None:
        if getattr(forward, "__code__", None) is _CODE:
            return True
        forward = getattr(forward, "__wrapped__", None) or getattr(forward, "func", None)
    return False


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module has, or that its routed class was made of."""
    kind = type(module)
    return kind.__bases__[1] if RoutedClass in kind.__bases__ else kind


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the module's forward as its own class defines it, a function of (module, *args, **kwargs)."""
    own: Any = (kind for kind in type(module).__mro__ if RoutedClass not in kind.__bases__)
    return next(kind for kind in own if "forward" in vars(kind)).forward


def set_entry(module: nn.Module, entry: Entry) -> None:
    """Let an entry take the module's calls; the module keeps a class that was derived from a routed one."""
    if not reaches_entry(type(module).forward):
        object.__setattr__(module, "__class__", _routed_class(type(module)))
    module.__dict__[ENTRY] = entry


def entry_of(module: nn.Module) -> Any:
    """Return the entry that takes the module's calls, None without one."""
    return module.__dict__.get(ENTRY)


def remove_entry(module: nn.Module) -> None:
    """Let the module be as it was; a class that somebody derived from the routed one stays, and is plain."""
    module.__dict__.pop(ENTRY, None)
    object.__setattr__(module, "__class__", own_class(module))


def _routed_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the routed class of a class; the class itself knows it, as long as a module is of it."""
    for derived in kind.__subclasses__():
        if derived.__bases__ == (RoutedClass, kind):
            return derived
    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__annotations__": getattr(kind, "__annotations__", {}),
        "forward": _routed_forward(kind.forward),
    }
    return type(kind.__name__, (RoutedClass, kind), namespace)
