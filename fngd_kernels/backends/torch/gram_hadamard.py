"""Gram matrix of a layer with one position per sample."""

from torch import Tensor

from .products import accumulation_dtype, mirror, rows_product


def gram_hadamard(a: Tensor, e: Tensor, bias: bool) -> Tensor:
    """Return (A A^T + bias) * (E E^T) for a (N,1,I) and e (N,1,O)."""
    dtype = accumulation_dtype(a.dtype)
    a, e = a[:, 0].to(dtype), e[:, 0].to(dtype)
    k = rows_product(a, a)
    if bias:
        k += 1
    return mirror(k.mul_(rows_product(e, e)))
