"""The compiled extension, if there is one: importing it registers its kernels with torch."""

import functools
import importlib
import os
import warnings
from typing import Any

from torch import Tensor  # Importing torch loads the libraries that the extension is linked to.

extension: Any = None
try:
    if os.environ.get("FNGD_NO_EXTENSION") == "1":
        raise ImportError("FNGD_NO_EXTENSION=1")
    extension = importlib.import_module("fngd_kernels._C")
    AVAILABLE = True
except ImportError as error:
    AVAILABLE = False
    warnings.warn(
        f"fngd_kernels works without its native extension ({error}): results are the same, but batched "
        "solves, Gram matrices on a CPU, and backward passes of linear and convolution layers go through "
        "plain torch and are slower. To build it, install a C++ compiler and run "
        "`pip install --no-build-isolation -e .`",
        stacklevel=2,
    )

HAS_CUDA = AVAILABLE and extension.has_cuda
"""Whether the extension has kernels for CUDA tensors."""


def serves(tensor: Tensor) -> bool:
    """Return whether the extension has kernels for the device of this tensor; warn once if it should have."""
    if tensor.is_cuda:
        if not HAS_CUDA:
            warn_of_missing_cuda()
        return HAS_CUDA
    return AVAILABLE and tensor.device.type == "cpu"


@functools.cache
def warn_of_missing_cuda() -> None:
    """Say once what is slower if the extension lacks its CUDA part, when a CUDA tensor needs it."""
    if AVAILABLE:
        warnings.warn(
            "fngd_kernels works without the CUDA part of its native extension: results are the same, but "
            "batched solves, tests of gradients and weighted sums of CUDA tensors go through plain torch and "
            "are slower. To build it, install a CUDA toolkit of the version that torch was built with; "
            "`pip install --no-build-isolation -v -e .` says what is missing",
            stacklevel=2,
        )
