"""The Gram matrix of a block: several modules with one weight are summed before it, cross terms included."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

import fngd_kernels as fk
from fngd_kernels.ops.gram_embedding import gram_embedding_linear
from fngd_kernels.ops.sketch import sketched, sketched_ids
from fngd_kernels.sketch import INPUTS, OUTPUTS

from . import embedding, linear
from .base import Rule, Use, bias_contributions


class Ruled(Protocol):
    """A module and its rule."""

    rule: Rule
    module: Any


def block_gram(uses: Mapping[Any, Sequence[Use]], sketch: fk.Sketch | None) -> Tensor:
    """Return K (N, N), K_ij = <C_i, C_j>, with C_n summed over the uses of all modules of a block.

    Args:
        uses: By module (`Ruled`); every use has the same N samples.
        sketch: Compresses all contributions alike, so that cross terms are right in expectation, too.
    """
    if len(uses) == 1:
        ((routed, found),) = uses.items()
        # A rule of somebody's own may not know of sketches.
        options = () if sketch is None else (sketch,)
        return routed.rule.gram(routed.module, found, *options)
    linears = {routed: found for routed, found in uses.items() if linear.is_linear_map(routed.rule)}
    embeddings = {
        routed: found for routed, found in uses.items() if isinstance(routed.rule, embedding.EmbeddingRule)
    }
    if len(linears) + len(embeddings) < len(uses):
        return _gram_of_formed(uses, sketch)
    shares = _bias_grams(linears, sketch)
    if linears:
        a, e = linear.positions([use for found in linears.values() for use in found])
        a, e = sketched(a, INPUTS, sketch), sketched(e, OUTPUTS, sketch)
        shares.append(fk.gram(a, e))
    if embeddings:
        pairs = [embedding.masked_positions(routed.module, found) for routed, found in embeddings.items()]
        ids, g = (torch.cat(column, 1) for column in zip(*pairs, strict=True))
        g = sketched(g, INPUTS, sketch)
        if linears:
            rows = next(iter(embeddings)).module.num_embeddings
            ids, g = sketched_ids(ids, g, rows, OUTPUTS, sketch)
        shares.append(fk.gram_embedding(ids, g))
    if linears and embeddings:
        cross = gram_embedding_linear(ids, g, a, e)
        shares.append(cross + cross.T)
    return torch.stack(shares).sum(0)


def _bias_grams(uses: Mapping[Any, Sequence[Use]], sketch: fk.Sketch | None) -> list[Tensor]:
    """Return the share of each bias in K."""
    found = (
        (routed.module.bias, c)
        for routed, own in uses.items()
        if (c := bias_contributions(routed.module, own, -1)) is not None
    )
    return [fk.gram_rows(c, sketch=sketch) for c in _summed(found)]


def _gram_of_formed(uses: Mapping[Any, Sequence[Use]], sketch: fk.Sketch | None) -> Tensor:
    """Return K of contributions that are formed, for modules without a way to avoid it."""
    found = (
        (parameter, c)
        for routed, own in uses.items()
        for parameter, c in zip(
            (routed.module.weight, getattr(routed.module, "bias", None)),
            routed.rule.contributions(routed.module, own),
            strict=True,
        )
        if parameter is not None and c is not None
    )
    return torch.stack([fk.gram_rows(c, sketch=sketch) for c in _summed(found)]).sum(0)


def _summed(contributions: Iterable[tuple[Parameter, Tensor]]) -> Iterable[Tensor]:
    """Return the contributions to each parameter, summed over the modules that it belongs to."""
    sums: dict[Parameter, Tensor] = {}
    for parameter, c in contributions:
        sums[parameter] = sums[parameter] + c if parameter in sums else c
    return sums.values()
