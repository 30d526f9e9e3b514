"""Rows of a Jacobian for parameters that no rule serves, by torch's own differentiation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from .residuals import PerSample

CHUNK = 64
"""Residuals differentiated at a time: bounds the memory."""


def differentiated_rows(
    residuals: Tensor, parameters: Sequence[Tensor], scale: float
) -> dict[Tensor, Tensor]:
    """Return scale * d residuals / d parameter (N, *shape) by parameter, for residuals (N,) with a graph.

    A few numbers, such as the unknown coefficient of an equation, cost a pass each, whatever N: the gradient
    J^T v is linear in v, and its derivative by v is a column of J. More numbers than residuals cost a
    vectorised pass for each residual.
    """
    if not parameters:
        return {}
    if sum(p.numel() for p in parameters) <= len(residuals):
        rows = _by_number(residuals, parameters)
    else:
        rows = _by_residual(residuals, parameters)
    return {p: scale * r.detach() for p, r in zip(parameters, rows, strict=True)}


def _by_number(residuals: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    v = torch.zeros_like(residuals, requires_grad=True)
    gradients = torch.autograd.grad(residuals, parameters, v, create_graph=True, allow_unused=True)
    rows = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            rows.append(residuals.new_zeros((len(residuals), *parameter.shape)))
            continue
        columns = [torch.autograd.grad(x, v, retain_graph=True)[0] for x in gradient.flatten()]
        rows.append(torch.stack(columns, 1).view(-1, *parameter.shape))
    return rows


def _by_residual(residuals: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    samples = len(residuals)
    rows = [residuals.new_zeros((samples, *p.shape)) for p in parameters]
    for begin in range(0, samples, CHUNK):
        chunk = residuals[begin : begin + CHUNK]
        seeds = torch.eye(len(chunk), dtype=residuals.dtype, device=residuals.device)
        gradients = torch.autograd.grad(
            chunk, parameters, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        for row, gradient in zip(rows, gradients, strict=True):
            if gradient is not None:
                row[begin : begin + CHUNK] = gradient
    return rows


def per_sample_rows(block: PerSample, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return d residual / d parameter (N, C, *shape) by name, one sample at a time under vmap."""
    detached = {name: p.detach() for name, p in parameters.items()}
    in_dims = (None,) + (0,) * len(block.inputs)
    rows = vmap(jacrev(block.function), in_dims, chunk_size=CHUNK)(detached, *block.inputs)
    with_components = vmap(block.function, in_dims)
    components = with_components(detached, *(x[:1] for x in block.inputs)).ndim == 2
    return {name: r if components else r.unsqueeze(1) for name, r in rows.items()}
