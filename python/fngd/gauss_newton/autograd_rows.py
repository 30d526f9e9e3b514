"""Rows of a Jacobian for parameters that no rule serves, by torch's own differentiation."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from .residuals import PerSample

CHUNK = 64
"""Numbers differentiated at a time: bounds the memory."""


def differentiated_rows(
    residuals: Tensor, parameters: Sequence[Tensor], scale: float
) -> dict[Tensor, Tensor]:
    """Return scale * d residuals / d parameter (N, *shape) by parameter, for residuals (N,) with a graph.

    A residual may depend on anything. Passes are made for each residual or, where the parameters have fewer
    numbers, as the unknown coefficient of an equation has, for each of these: the gradient J^T v is linear in
    v, and its derivative by v is a column of J.
    """
    if not parameters:
        return {}
    rows: list[Tensor] = []
    if sum(p.numel() for p in parameters) <= len(residuals):
        with suppress(RuntimeError):  # not every operation can be differentiated twice
            rows = _by_number(residuals, parameters)
    rows = rows or _derivatives(residuals, parameters, allow_unused=True)
    return {p: scale * r.detach() for p, r in zip(parameters, rows, strict=True)}


def _by_number(residuals: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    v = torch.zeros_like(residuals, requires_grad=True)
    gradients = torch.autograd.grad(residuals, parameters, v, create_graph=True, allow_unused=True)
    rows = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            rows.append(residuals.new_zeros((len(residuals), *parameter.shape)))
        else:
            (columns,) = _derivatives(gradient.flatten(), [v], allow_unused=False)
            rows.append(columns.T.reshape(-1, *parameter.shape))
    return rows


def _derivatives(y: Tensor, by: Sequence[Tensor], *, allow_unused: bool) -> list[Tensor]:
    """Return d y / d x (M, *shape) for y (M,) and each x."""
    derivatives = [x.new_zeros((len(y), *x.shape)) for x in by]
    options = {"retain_graph": True, "allow_unused": allow_unused}
    for begin in range(0, len(y), CHUNK):
        chunk = y[begin : begin + CHUNK]
        seeds = torch.eye(len(chunk), dtype=y.dtype, device=y.device)
        found: Sequence[Tensor | None]
        try:
            found = torch.autograd.grad(chunk, by, seeds, is_grads_batched=True, **options)
        except RuntimeError:  # not every operation is made for vmap
            passes = zip(*(torch.autograd.grad(chunk, by, seed, **options) for seed in seeds), strict=True)
            found = [None if parts[0] is None else torch.stack(parts) for parts in passes]
        for derivative, part in zip(derivatives, found, strict=True):
            if part is not None:
                derivative[begin : begin + CHUNK] = part
    return derivatives


def per_sample_rows(block: PerSample, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return d residual / d parameter (N, C, *shape) by name, one sample at a time under vmap."""
    detached = {name: p.detach() for name, p in parameters.items()}
    in_dims = (None,) + (0,) * len(block.inputs)

    def function(*arguments: Any) -> Tensor:
        values = block.function(*arguments)
        return torch.view_as_real(values).flatten() if values.is_complex() else values

    rows = vmap(jacrev(function), in_dims, chunk_size=CHUNK)(detached, *block.inputs)
    components = vmap(function, in_dims)(detached, *(x[:1] for x in block.inputs)).ndim == 2
    return {name: r if components else r.unsqueeze(1) for name, r in rows.items()}
