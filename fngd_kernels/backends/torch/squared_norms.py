"""Squared norms ||C_n||^2, the diagonals of the Gram matrices, computed for some samples at a time."""

from math import prod

import torch
from torch import Tensor

from ...geometry import ConvGeometry
from .conv_contributions import conv_contributions
from .products import accumulation_dtype


def linear_norms(a: Tensor, e: Tensor, bias: bool, workspace: int) -> Tensor:
    """Return ||C_n||^2 for a (N,T,I) and e (N,T,O): from pairs of positions or, if cheaper, from C_n."""
    t, inputs, outputs = a.shape[1], a.shape[2], e.shape[2]
    dtype = accumulation_dtype(a.dtype)
    pairs = t * (inputs + outputs) < inputs * outputs
    elements = (2 * t * t if pairs else inputs * outputs) + t * (inputs + outputs)
    norms = []
    chunk = _samples(elements, dtype, workspace)
    for a_n, e_n in zip(a.split(chunk), e.split(chunk), strict=True):
        a_n, e_n = a_n.to(dtype), e_n.to(dtype)
        if pairs:
            norms.append(((a_n @ a_n.mT).add_(int(bias)) * (e_n @ e_n.mT)).sum((1, 2)))
        else:
            norms.append(_squares(e_n.mT @ a_n) + (_squares(e_n.sum(1)) if bias else 0))
    return torch.cat(norms)


def conv_norms(x: Tensor, e: Tensor, geometry: ConvGeometry, bias: bool, workspace: int) -> Tensor:
    """Return ||C_n||^2 for x (N,C,*space) and e (N,O,*space_out), from C_n."""
    dtype = accumulation_dtype(x.dtype)
    # Twice, because the library makes copies in a layout of its own.
    elements = 2 * (prod(geometry.weight_shape) + prod(x.shape[1:]) + prod(e.shape[1:]))
    chunk = _samples(elements, dtype, workspace)
    x_chunks, e_chunks = (t.unflatten(1, (geometry.groups, -1)).split(chunk) for t in (x, e))
    norms = []
    for x_n, e_n in zip(x_chunks, e_chunks, strict=True):
        norms.append(_squares(conv_contributions(x_n, e_n, geometry, dtype)))
    total = torch.cat(norms)
    return total + _squares(e.flatten(2).sum(2, dtype=dtype)) if bias else total


def embedding_norms(ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int) -> Tensor:
    """Return ||C_n||^2 for ids (N,T) and e (N,T,D): e is summed over equal ids of a sample, then squared."""
    dtype = accumulation_dtype(e.dtype)
    t, dim = e.shape[1:]
    norms = []
    chunk = _samples(t * (t + 2 * dim), dtype, workspace)
    for ids_n, e_n in zip(ids.split(chunk), e.split(chunk), strict=True):
        equal, e_n = ids_n.unsqueeze(2) == ids_n.unsqueeze(1), e_n.to(dtype)
        # Zeros in `equal` would not do: 0 times NaN is NaN.
        if padding_idx is not None:
            e_n = e_n.masked_fill((ids_n == padding_idx).unsqueeze(2), 0)
        # sum_t <e_t, sum_{u: id_u = id_t} e_u>
        norms.append((e_n * (equal.to(dtype) @ e_n)).sum((1, 2)))
    return torch.cat(norms)


def rows_norms(g: Tensor) -> Tensor:
    """Return ||g_n||^2 for g (N,D)."""
    return torch.linalg.vector_norm(g, dim=1, dtype=accumulation_dtype(g.dtype)).square()


def _squares(c: Tensor) -> Tensor:
    return c.flatten(1).square().sum(1)


def _samples(elements: int, dtype: torch.dtype, workspace: int) -> int:
    """Return how many samples are taken at a time if each needs that many elements of scratch memory."""
    return max(1, workspace // max(1, elements * dtype.itemsize))
