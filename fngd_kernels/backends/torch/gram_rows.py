"""Gram matrix of contributions that are already formed."""

from torch import Tensor

from .costs import column_chunk
from .products import accumulation_dtype, add_gram, mirror


def gram_rows(g: Tensor, workspace: int) -> Tensor:
    """Return K_ij = <g_i, g_j> for g (N,D), in chunks of columns if they have to be cast."""
    n, columns = g.shape
    dtype = accumulation_dtype(g.dtype)
    k = g.new_zeros((n, n), dtype=dtype)
    chunk = columns if g.dtype == dtype else column_chunk(n, k.itemsize, workspace)
    for part in g.split(chunk, 1):
        add_gram(k, part.to(dtype))
    return mirror(k)
