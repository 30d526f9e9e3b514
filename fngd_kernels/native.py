"""The compiled extension, when there is one: importing it registers its kernels with torch."""

import importlib
import os
import warnings
from typing import Any

import torch  # noqa: F401 - loads the libraries that the extension links to

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
        "solves and backward passes of linear and convolution layers go through plain torch and are slower. "
        "To build it, install a C++ compiler and run `pip install --no-build-isolation -e .`",
        stacklevel=2,
    )
