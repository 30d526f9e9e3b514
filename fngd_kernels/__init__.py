"""Kernels of fast natural gradients: Gram matrices of per-sample contributions, solves, weighted sums.

Tensors in, tensors out; no modules and no optimizer. In the formulas, e is the gradient at a layer's output
(grad_output), and the contribution C_n of a sample is its share in the gradient of the layer's parameters.
`plan` tells how a Gram matrix is formed, and `reference` defines what each function computes.
"""

import importlib
import warnings

import torch

from . import reference
from .cost_model import plan
from .ops import devices
from .ops.combine import combine
from .ops.combine_conv import combine_conv
from .ops.combine_embedding import combine_embedding
from .ops.combine_rows import combine_rows
from .ops.gram import gram
from .ops.gram_conv import gram_conv
from .ops.gram_embedding import gram_embedding
from .ops.gram_rows import gram_rows
from .ops.solve import solve
from .plans import Plan
from .sketch import Sketch

if devices.HAS_TRITON:
    # Adds the Triton kernels to the operators' tables.
    importlib.import_module("fngd_kernels.ops.triton")
elif torch.version.cuda is not None:
    warnings.warn(
        "fngd_kernels works without triton, but Gram matrices and weighted sums of CUDA tensors go through "
        "plain torch and are slower. Install triton to have the fused kernels",
        stacklevel=2,
    )

__all__ = [
    "Plan",
    "Sketch",
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
