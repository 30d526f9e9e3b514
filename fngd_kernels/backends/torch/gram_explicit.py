"""Gram matrix of a layer from its per-sample contributions, formed by chunks of the weight."""

import torch
from torch import Tensor

from ...plans import Plan
from .products import accumulation_dtype, add_gram, mirror


def gram_explicit(a: Tensor, e: Tensor, bias: bool, plan: Plan) -> Tensor:
    """Return K = sum over chunks of C C^T with C_n = E_n^T A_n, for a (N,T,I) and e (N,T,O)."""
    n, inputs, outputs = a.shape[0], a.shape[2], e.shape[2]
    dtype = accumulation_dtype(a.dtype)
    k = a.new_zeros((n, n), dtype=dtype)
    for o in range(0, outputs, plan.out_chunk):
        for i in range(0, inputs, plan.in_chunk):
            e_chunk, a_chunk = e[:, :, o : o + plan.out_chunk], a[:, :, i : i + plan.in_chunk]
            c = a.new_empty((n, e_chunk.shape[2], a_chunk.shape[2]), dtype=dtype)
            for m in range(0, n, plan.sample_chunk):
                e_m, a_m = (rows[m : m + plan.sample_chunk].to(dtype) for rows in (e_chunk, a_chunk))
                torch.bmm(e_m.mT, a_m, out=c[m : m + plan.sample_chunk])
            add_gram(k, c.flatten(1))
            del c
    if bias:
        add_gram(k, e.sum(1, dtype=dtype))
    return mirror(k)
