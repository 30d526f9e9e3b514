"""Gram matrix of a layer from all pairs of positions."""

from torch import Tensor

from ...plans import Plan
from .products import accumulation_dtype, mirror, rows_product


def gram_pairs(a: Tensor, e: Tensor, bias: bool, plan: Plan) -> Tensor:
    """Return K_ij = sum_{t,u} <a_it, a_ju> <e_it, e_ju> for a (N,T,I) and e (N,T,O), by blocks of samples."""
    n, t = a.shape[:2]
    dtype = accumulation_dtype(a.dtype)
    k = a.new_zeros((n, n), dtype=dtype)
    block = plan.sample_chunk
    for i in range(0, n, block):
        a_i, e_i = (rows[i : i + block].to(dtype).flatten(0, 1) for rows in (a, e))
        for j in range(i, n, block):
            a_j, e_j = a_i, e_i
            if j > i:
                a_j, e_j = (rows[j : j + block].to(dtype).flatten(0, 1) for rows in (a, e))
            pairs = rows_product(a_i, a_j)
            if bias:
                pairs += 1
            pairs *= rows_product(e_i, e_j)
            k[i : i + block, j : j + block] = pairs.view(-1, t, len(a_j) // t, t).sum((1, 3))
    return mirror(k)
