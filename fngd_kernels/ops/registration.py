"""How operators are registered with torch and called.

An operator is registered once, for every device, as a Python function that asks `choose` which implementation
runs. Its schema has the types that torch's dispatcher knows; a ConvGeometry is spelled out there as five
arguments, `GEOMETRY`, which `*geometry` and `with_geometry` convert.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..geometry import ConvGeometry

LIBRARY = torch.library.Library("fngd", "FRAGMENT")

OPERATORS: dict[str, Callable[..., Any]] = {}
"""What the dispatcher runs for each operator, called with the arguments of its schema."""

GEOMETRY = "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups"
"""A ConvGeometry in a schema."""


def register(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator, and register what it runs and its fake, which computes the result's shape alone."""
    name = LIBRARY.define(schema)
    OPERATORS[name] = function
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fngd::{name}", fake, lib=LIBRARY)


def with_geometry(place: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function that takes a ConvGeometry as argument number `place` to take GEOMETRY there."""
    stop = place + len(ConvGeometry._fields)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def spelled_out(*arguments: Any) -> Any:
            geometry = ConvGeometry.from_schema(*arguments[place:stop])
            return function(*arguments[:place], geometry, *arguments[stop:])

        return spelled_out

    return decorate


def call(op: Callable[..., Any], first: torch.Tensor | Sequence[torch.Tensor], *args: Any) -> Any:
    """Call an operator without gradients, and without autocast, which would round its float32 sums.

    Args:
        op: The operator.
        first: Its first argument, a tensor or several.
        args: Its other arguments.
    """
    device = (first if isinstance(first, torch.Tensor) else first[0]).device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return call(op, first, *args)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return op(first, *args)
    return op(first, *args)
