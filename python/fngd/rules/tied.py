"""Several modules with one weight: their contributions are summed before the Gram, cross terms included."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

import fngd_kernels as fk
from fngd_kernels.ops.gram_embedding import gram_embedding_linear

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
