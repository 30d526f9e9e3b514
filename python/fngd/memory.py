"""Work that takes less scratch memory when memory runs out."""

from collections.abc import Callable
from typing import TypeVar

import torch

from fngd_kernels.workspace import default_workspace, limited

Result = TypeVar("Result")

HALVINGS = 6
"""How often the workspace is halved, from 64 MiB to 1 MiB, before there is no result."""


def within_memory(compute: Callable[[], Result]) -> Result | None:
    """Return what compute returns; where memory runs out, try again with half the workspace, at last None."""
    workspace = default_workspace()
    for _ in range(HALVINGS + 1):
        try:
            with limited(workspace):
                return compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        workspace //= 2
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed: on CUDA, in torch's CPU allocator, or in a C++ library."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        text in str(error) for text in ("DefaultCPUAllocator: ", "std::bad_alloc")
    )
