"""Kernels of fast natural gradients: Gram matrices of per-sample contributions, solves, weighted sums.

Tensors in, tensors out; no modules and no optimizer. `plan` tells how a Gram matrix is formed, `reference`
what each function computes.
"""

import importlib
import importlib.util
import warnings

import torch

from . import reference
from .cost_model import Plan, plan
from .ops.combine import combine, combine_conv, combine_embedding, combine_rows
from .ops.gram import gram, gram_conv, gram_embedding, gram_rows
from .ops.solve import solve

if torch.version.cuda is not None and importlib.util.find_spec("triton") is not None:
    importlib.import_module("fngd_kernels.ops.cuda")  # registers the fused kernels
elif torch.version.cuda is not None:
    warnings.warn(
        "fngd_kernels works without triton, but Gram matrices and weighted sums of CUDA tensors go through "
        "plain torch and are slower. Install triton to have the fused kernels",
        stacklevel=2,
    )

__all__ = [
    "Plan",
    "combine",
    "combine_conv",
    "combine_embedding",
    "combine_rows",
    "gram",
    "gram_conv",
    "gram_embedding",
    "gram_rows",
    "plan",
    "reference",
    "solve",
]
