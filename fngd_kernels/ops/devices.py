"""What the device of a tensor offers."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
"""Whether there are Triton kernels for CUDA tensors."""


def triton_serves(*tensors: Tensor) -> bool:
    """Return whether Triton kernels support these tensors: on a CUDA device, not float64, none empty."""
    return runs_triton(tensors[0].device) and all(t.dtype != torch.float64 and t.numel() > 0 for t in tensors)


def float32_precision(switch: Any) -> str:
    """Return how Triton kernels multiply float32, as one of torch's switches says for its own products."""
    return "tf32" if switch.fp32_precision == "tf32" else "ieee"


def runs_triton(device: torch.device) -> bool:
    """Return whether Triton kernels run on this device."""
    return HAS_TRITON and device.type == "cuda"
