"""What one would write in plain torch without the package; in float64 it is the truth of the gate."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.shapes import Conv

CHUNK_BYTES = 1 << 30
"""Scratch of one step: far more than the kernels get, so that no baseline is slowed by small steps."""


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def gram_explicit(a: Tensor, e: Tensor, bias: bool) -> Tensor:
    """Return K from per-sample gradients, which a batched product forms in chunks of outputs."""
    n, _, inputs = a.shape
    k = a.new_zeros((n, n), dtype=_accumulated(a.dtype))
    for e_chunk in e.split(max(1, CHUNK_BYTES // (n * inputs * a.itemsize)), 2):
        c = torch.bmm(e_chunk.mT, a).flatten(1)
        k += c @ c.T
    if bias:
        b = e.sum(1)
        k += b @ b.T
    return k


def gram_pairs(a: Tensor, e: Tensor, bias: bool) -> Tensor:
    """Return K from the products of all pairs of positions, in chunks of samples."""
    n, t, _ = a.shape
    k = a.new_empty((n, n), dtype=_accumulated(a.dtype))
    rows_a, rows_e = a.flatten(0, 1), e.flatten(0, 1)
    block = max(1, CHUNK_BYTES // (t * n * t * a.itemsize))
    for i in range(0, n, block):
        pairs = a[i : i + block].flatten(0, 1) @ rows_a.T
        if bias:
            pairs += 1
        pairs *= e[i : i + block].flatten(0, 1) @ rows_e.T
        k[i : i + block] = pairs.view(-1, t, n, t).sum((1, 3), dtype=k.dtype)
    return k


def gram_hadamard(layers: Sequence[tuple[Tensor, Tensor]], bias: bool) -> Tensor:
    """Return K of each layer, from two products."""
    return torch.stack([(a @ a.T + float(bias)) * (e @ e.T) for a, e in layers])


def gram_conv(x: Tensor, e: Tensor, layer: Conv, bias: bool) -> Tensor:
    """Return K from per-sample gradients of unfolded patches, in chunks of samples."""
    n, columns = x.shape[0], layer.weights // layer.outputs
    c = x.new_empty((n, layer.outputs, columns))
    samples = max(1, CHUNK_BYTES // (columns * layer.space**2 * x.itemsize))
    for i in range(0, n, samples):
        patches = F.unfold(x[i : i + samples], layer.kernel, padding=layer.padding, stride=layer.stride)
        torch.bmm(e[i : i + samples].flatten(2), patches.mT, out=c[i : i + samples])
    k = (c.flatten(1) @ c.flatten(1).T).to(_accumulated(x.dtype))
    if bias:
        b = e.sum((2, 3))
        k += b @ b.T
    return k


def gram_embedding(ids: Tensor, e: Tensor) -> Tensor:
    """Return K from all pairs of positions where their ids agree, in chunks of samples."""
    n, t, _ = e.shape
    k = e.new_empty((n, n), dtype=_accumulated(e.dtype))
    rows, flat = e.flatten(0, 1), ids.flatten()
    block = max(1, CHUNK_BYTES // (t * n * t * e.itemsize))
    for i in range(0, n, block):
        pairs = e[i : i + block].flatten(0, 1) @ rows.T
        pairs *= ids[i : i + block].flatten()[:, None] == flat
        k[i : i + block] = pairs.view(-1, t, n, t).sum((1, 3), dtype=k.dtype)
    return k


def combine(a: Tensor, e: Tensor, s: Tensor, bias: bool) -> list[Tensor]:
    """Return the weighted gradient, with an extra pass that scales."""
    scaled = (e * s[:, None, None]).to(e.dtype).flatten(0, 1)
    weight = scaled.T @ a.flatten(0, 1)
    return [weight, scaled.sum(0)] if bias else [weight]


def unweighted(a: Tensor, e: Tensor, bias: bool) -> list[Tensor]:
    """Return the ordinary gradient: a matrix product of the same shape."""
    e = e.flatten(0, 1)
    return [e.T @ a.flatten(0, 1), e.sum(0)] if bias else [e.T @ a.flatten(0, 1)]


def scale_bias(e: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scaled gradients and their sum, by two passes."""
    scaled = (e * s[:, None, None, None]).to(e.dtype)
    return scaled, scaled.sum((0, 2, 3))


def unweighted_conv(x: Tensor, e: Tensor, layer: Conv, bias: bool) -> tuple[Tensor, Tensor | None]:
    """Return the ordinary gradient of a convolution's weight and, if asked for, bias."""
    weight = x.new_zeros(()).expand(layer.weight_shape)
    geometry = ([layer.stride] * 2, [layer.padding] * 2, [1, 1], False, [0, 0], 1)
    _, w, b = torch.ops.aten.convolution_backward(
        e, x, weight, [layer.outputs], *geometry, [False, True, bias]
    )
    return w, b


def combine_embedding(ids: Tensor, e: Tensor, s: Tensor, num_embeddings: int) -> Tensor:
    """Return the weighted gradient, by indexed addition."""
    weight = e.new_zeros((num_embeddings, e.shape[2]), dtype=_accumulated(e.dtype))
    scaled = (e * s[:, None, None]).to(weight.dtype)
    return weight.index_add_(0, ids.flatten(), scaled.flatten(0, 1)).to(e.dtype)


def unweighted_embedding(ids: Tensor, e: Tensor, num_embeddings: int) -> Tensor:
    """Return the ordinary gradient of an embedding."""
    return torch.ops.aten.embedding_dense_backward(e, ids, num_embeddings, -1, False)


def solve(k: Tensor, damping: float) -> Tensor:
    """Return solutions by Cholesky factors of the damped matrices, then triangular solves."""
    shifted = k.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping)
    lower, _ = torch.linalg.cholesky_ex(shifted)
    # Not by cholesky_solve: it may go to MAGMA, which allocates, and a CUDA graph cannot capture that.
    half = torch.linalg.solve_triangular(lower, torch.ones_like(k[..., :1]), upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)[..., 0]
