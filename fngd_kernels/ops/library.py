"""The operator library that every module of this folder adds its schemas and implementations to."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fngd", "FRAGMENT")
"""Plain torch registers as `CompositeExplicitAutograd`; native code as `CPU` or `CUDA`, which win."""


def call(op: Callable[..., Any], tensor: torch.Tensor, *args: Any) -> Any:
    """Call an operator with autocast off: it would round inputs that are accumulated in fp32 here."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return op(tensor, *args)
    return op(tensor, *args)
