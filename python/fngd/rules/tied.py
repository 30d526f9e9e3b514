"""Several modules with one weight: their contributions are summed before the Gram, cross terms included."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

import fngd_kernels as fk
from fngd_kernels.workspace import default_workspace

from . import embedding, linear
from .base import Rule, Use, bias_rows


class Part(NamedTuple):
    """The uses of one of the modules in a batch."""

    rule: Rule
    module: Any
    uses: Sequence[Use]


def tied_gram(parts: Sequence[Part]) -> Tensor:
    """Return K (N, N), K_ij = <C_i, C_j>, with C_n summed over the uses of all modules."""
    if len(parts) == 1:
        return parts[0].rule.gram(parts[0].module, parts[0].uses)
    linears = [part for part in parts if isinstance(part.rule, linear.LinearRule)]
    linears = [part for part in linears if not isinstance(part.rule, linear.TransposedLinearRule)]
    embeddings = [part for part in parts if isinstance(part.rule, embedding.EmbeddingRule)]
    if len(linears) + len(embeddings) < len(parts):
        return _gram_of_formed(parts)
    shares = _grams_of_biases(linears)
    if linears:
        a, e = linear.positions([use for part in linears for use in part.uses])
        shares.append(fk.gram(a, e))
    if embeddings:
        rows = [embedding.masked_positions(part.module, part.uses) for part in embeddings]
        ids, g = (torch.cat(column, 1) for column in zip(*rows, strict=True))
        shares.append(fk.gram_embedding(ids, g))
    if linears and embeddings:
        cross = gram_embedding_linear(ids, g, a, e)
        shares.append(cross + cross.T)
    return torch.stack(shares).sum(0)


def gram_embedding_linear(
    ids: Tensor, g: Tensor, a: Tensor, e: Tensor, workspace: int | None = None
) -> Tensor:
    """Return X_ij = <C_i of an embedding, C_j of a linear layer> for one weight (V, D) of both.

    X_ij = sum_{t,u} E_ju[ids_it] <g_it, A_ju>, in chunks of i and j.

    ids: (N, T) int; g: (N, T, D), gradient at the embedding's output
    a: (N, U, D), the linear layer's input; e: (N, U, V), gradient at its output
    workspace: bound of the two scratch matrices in bytes, where one sample fits, by default 64 MiB

    Returns: (N, N) of the inputs' common dtype, at least float32.
    """
    workspace = default_workspace() if workspace is None else workspace
    dtype = torch.promote_types(torch.promote_types(g.dtype, e.dtype), torch.float32)
    (samples, t), u = ids.shape, e.shape[1]
    x = g.new_empty((samples, samples), dtype=dtype)
    chunk = max(1, int((workspace / max(1, 2 * dtype.itemsize * t * u)) ** 0.5))
    for i in range(0, samples, chunk):
        rows = slice(i, i + chunk)
        g_rows, ids_rows = g[rows].to(dtype).flatten(0, 1), ids[rows].flatten()
        for j in range(0, samples, chunk):
            columns = slice(j, j + chunk)
            inner = a[columns].to(dtype).flatten(0, 1) @ g_rows.T  # (J U, I T)
            inner *= e[columns].flatten(0, 1).index_select(1, ids_rows)
            x[rows, columns] = inner.view(-1, u, len(g_rows) // t, t).sum((1, 3)).T
    return x


def _grams_of_biases(parts: Sequence[Part]) -> list[Tensor]:
    """Return the share of each bias in K; a bias of several modules is summed over them first."""
    rows: dict[Parameter, Tensor] = {}
    for part in parts:
        found = bias_rows(part.module, part.uses, -1)
        if found is not None:
            bias = part.module.bias
            rows[bias] = rows[bias] + found if bias in rows else found
    return [fk.gram_rows(r) for r in rows.values()]


def _gram_of_formed(parts: Sequence[Part]) -> Tensor:
    """Return K of contributions that are formed, for modules without a way to avoid it."""
    rows: dict[Parameter, Tensor] = {}
    for part in parts:
        parameters = part.module.weight, getattr(part.module, "bias", None)
        contributions = part.rule.contributions(part.module, part.uses)
        for parameter, found in zip(parameters, contributions, strict=True):
            if parameter is not None and found is not None:
                rows[parameter] = rows[parameter] + found if parameter in rows else found
    return torch.stack([fk.gram_rows(r) for r in rows.values()]).sum(0)
