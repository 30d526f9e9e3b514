"""One test of many tensors for NaN and infinity."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native  # noqa: F401 - registers the CPU kernel
from .library import LIBRARY, register

LIBRARY.define("all_finite(Tensor[] tensors) -> Tensor")


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether every element of every tensor is finite.

    tensors: dense floating tensors of any shapes and strides, one or more

    Returns: () bool, on the device of the first tensor
    Raises: ValueError without tensors.
    """
    if not tensors:
        raise ValueError("tensors: expected one or more, got none")
    return torch.ops.fngd.all_finite.default(tensors)


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    # A sum carries every NaN and infinity; a sum of halves in their own dtype could overflow by itself.
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.stack([s.to(sums[0].device) for s in sums]).isfinite().all()


def _fake(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.bool)


register("all_finite", _all_finite, _fake)
