"""The operator library that every module of this folder adds its schemas and implementations to."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fngd", "FRAGMENT")
"""Plain torch registers as `CompositeExplicitAutograd`; native code as `CPU` or `CUDA`, which win."""


def register(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the plain-torch form of an operator and its fake."""
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fngd::{name}", fake, lib=LIBRARY)


def call(op: Callable[..., Any], tensor: torch.Tensor, *args: Any) -> Any:
    """Call an operator without gradients and without autocast, which would round what is summed in fp32."""
    device = tensor.device.type
    with torch.no_grad():
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return op(tensor, *args)
        return op(tensor, *args)
