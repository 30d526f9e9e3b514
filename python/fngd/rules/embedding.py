"""nn.Embedding: a sample contributes its output gradients to the rows that its ids name."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fngd_kernels as fk
from fngd_kernels.ops import nodes
from fngd_kernels.ops.nodes import Gradients, UseHandler

from .base import Rule, Use


class EmbeddingRule(Rule):
    """Embeddings of ids (N,) or (N, ...)."""

    name = "embedding"

    def reason_against(self, module: Any) -> str | None:
        if module.max_norm is not None:
            return "Embedding with max_norm changes its weight in forward"
        if module.sparse:
            return "Embedding with sparse gradients"
        if module.scale_grad_by_freq:
            return "Embedding with scale_grad_by_freq couples samples"
        return None

    def batched(self, module: Any, x: Tensor) -> bool:
        return x.ndim >= 1

    def forward(
        self, module: Any, x: Tensor, coefficients: Tensor | None, on_use: UseHandler | None
    ) -> Tensor:
        padding_idx = -1 if module.padding_idx is None else module.padding_idx
        return nodes.embedding(x, module.weight, coefficients, on_use, padding_idx=padding_idx)

    def gram(self, module: Any, uses: Sequence[Use], sketch: fk.Sketch | None = None) -> Tensor:
        return fk.gram_embedding(*_positions(uses), padding_idx=module.padding_idx, sketch=sketch)

    def contributions(self, module: Any, uses: Sequence[Use]) -> Gradients:
        ids, e = masked_positions(module, uses)
        samples, rows = len(ids), module.num_embeddings
        cells = ids + rows * torch.arange(samples, dtype=torch.int64, device=ids.device).unsqueeze(1)
        # In a fixed order, which index_put_ does not keep on a CPU and index_add_ does not on CUDA.
        sums = torch.ops.aten.embedding_dense_backward(
            e.flatten(0, 1), cells.flatten(), samples * rows, -1, False
        )
        return sums.view(samples, *module.weight.shape), None

    def combine(self, module: Any, uses: Sequence[Use], s: Tensor) -> Gradients:
        ids, e = _positions(uses)
        weight = fk.combine_embedding(ids, e, s, module.num_embeddings, padding_idx=module.padding_idx)
        return weight, None


class ScaledEmbeddingRule(EmbeddingRule):
    """Hugging Face's embeddings that multiply what they look up by a constant."""

    name = "scaled embedding"

    def forward(
        self, module: Any, x: Tensor, coefficients: Tensor | None, on_use: UseHandler | None
    ) -> Tensor:
        factor = module.embed_scale
        y = super().forward(module, x, coefficients, on_use)
        return y * (factor.to(module.weight.dtype) if isinstance(factor, Tensor) else factor)


def _positions(uses: Sequence[Use]) -> tuple[Tensor, Tensor]:
    """Return all uses as one: ids (N, T), e (N, T, D)."""
    ids = [ids.reshape(ids.shape[0], -1) for ids, *_ in uses]
    e = [e.reshape(e.shape[0], -1, e.shape[-1]) for _, e, _ in uses]
    return (ids[0], e[0]) if len(uses) == 1 else (torch.cat(ids, 1), torch.cat(e, 1))


def masked_positions(module: Any, uses: Sequence[Use]) -> tuple[Tensor, Tensor]:
    """Return all uses as one, with a zero gradient where the id is padding."""
    ids, e = _positions(uses)
    if module.padding_idx is None:
        return ids, e
    return ids, e.masked_fill((ids == module.padding_idx).unsqueeze(-1), 0)
