"""One test of many tensors for NaN and infinity."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from .registration import register

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def found_non_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return 1 if any element of any tensor is NaN or infinite, else 0: torch's `found_inf`.

    The native kernels are registered with torch's dispatcher by the extension (see `choose`).

    Args:
        tensors: One or more of float64, float32, bfloat16 or float16, of any shapes and strides.

    Returns:
        (1,) float32, on the device of the first tensor. Nothing waits for the device.

    Raises:
        ValueError: There are no tensors.
        TypeError: A tensor has another dtype.
    """
    if not isinstance(tensors, Sequence):
        raise TypeError(f"tensors: expected a sequence of tensors, got {type(tensors).__name__}")
    if not tensors:
        raise ValueError("tensors: expected one or more, got none")
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"tensors: expected dense tensors, got {getattr(tensor, 'layout', type(tensor))}")
        if tensor.is_meta != tensors[0].is_meta:
            raise ValueError("tensors: expected all on the meta device or none")
    return torch.ops.fngd.found_non_finite.default(tensors)


def _found_non_finite(tensors: Sequence[Tensor]) -> Tensor:
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise TypeError(f"tensors: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")
    if tensors[0].is_cuda:
        native.warn_of_missing_cuda()
    # Unlike a sum, the largest magnitude cannot overflow. It is NaN where any element is.
    device = tensors[0].device
    largest = [torch.linalg.vector_norm(t, math.inf).to(device, torch.float64) for t in tensors if t.numel()]
    if not largest:
        return torch.zeros(1, dtype=torch.float32, device=device)
    return torch.stack(largest).isfinite().all().logical_not().float().reshape(1)


def _fake(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty(1, dtype=torch.float32)


register("found_non_finite(Tensor[] tensors) -> Tensor", _found_non_finite, _fake)

unchecked = torch.ops.fngd.found_non_finite.default
"""`found_non_finite` of a list of dense tensors, without a look at each of them first."""
