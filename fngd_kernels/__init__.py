"""Kernels of fast natural gradients: Gram matrices of per-sample contributions, solves, weighted sums.

Tensors in, tensors out; no modules and no optimizer. `plan` tells how a Gram matrix is formed, `reference`
what each function computes.
"""

from . import reference
from .cost_model import Plan, plan
from .ops.combine import combine, combine_conv, combine_embedding, combine_rows
from .ops.gram import gram, gram_conv, gram_embedding, gram_rows
from .ops.solve import solve

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
