"""The operators of fngd on meta tensors, which have no data, as on a GPU that is not there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import fngd_kernels.ops.triton  # noqa: F401 - adds the Triton kernels to the operators' tables
from fngd_kernels.ops import devices

PROCESSORS = 132


@contextmanager
def launching(run: Callable[..., Any], capability: tuple[int, int]) -> Iterator[None]:
    """Take the ways of a GPU of this capability, and call `run` in place of each launch of a Triton kernel.

    run receives the kernel, its arguments, and `grid`, `warmup` and the launch options by keyword.
    """

    def instead(kernel: Any, *arguments: Any, **options: Any) -> Any:
        return run(kernel, *arguments, **options)

    properties = SimpleNamespace(multi_processor_count=PROCESSORS)
    with (
        mock.patch.object(JITFunction, "run", instead),
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
        mock.patch.object(devices, "runs_triton", return_value=True),
    ):
        yield


def meta(x: Any) -> Any:
    """Return a tensor, or several, of the same shape, strides and dtype without data; all else as it is."""
    if isinstance(x, (list, tuple)):
        return [meta(part) for part in x]
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
