"""nn.MultiheadAttention: its input projections are one block of parameters, its output projection another."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fngd_kernels.ops import nodes
from fngd_kernels.ops.nodes import Gradients, UseHandler

from ..torch_private import parameters_of
from .linear import LinearRule

ALL = slice(None)

Project = Callable[[Tensor, slice], Tensor]
"""(x (N, T, D), rows of in_proj_weight) -> x W[rows]^T + b[rows]."""


class InputProjection:
    """The packed input projection of an nn.MultiheadAttention, seen as a linear layer of its own."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        self.attention = attention

    @property
    def weight(self) -> nn.Parameter:
        """in_proj_weight (3 D, D)."""
        return parameters_of(self.attention)["in_proj_weight"]

    @property
    def bias(self) -> nn.Parameter | None:
        """in_proj_bias (3 D,), or None."""
        return parameters_of(self.attention).get("in_proj_bias")


class ProjectionRule(LinearRule):
    """Query, key and value of one input, or of several, each by its rows of one weight."""

    name = "attention"

    def reason_against(self, module: Any) -> str | None:
        if module.in_proj_weight is None:
            return "MultiheadAttention with kdim or vdim of its own"
        if module.bias_k is not None or module.add_zero_attn:
            return "MultiheadAttention with add_bias_kv or add_zero_attn"
        return None

    def batched(self, module: Any, x: Tensor) -> bool:
        return x.ndim == 3

    def forward(
        self,
        module: Any,
        x: Tensor,
        coefficients: Tensor | None,
        on_use: UseHandler | None,
        rows: slice = ALL,
    ) -> Tensor:
        bias = None if module.bias is None else module.bias[rows]
        rows_handler = on_use and _padded(on_use, rows, len(module.weight))
        return nodes.linear(x, module.weight[rows], bias, coefficients, rows_handler)

    def without_bias(self, module: Any, x: Tensor, rows: slice = ALL) -> Tensor:
        return F.linear(x, parameters_of(module.attention)["in_proj_weight"][rows])


def _padded(on_use: UseHandler, rows: slice, outputs: int) -> UseHandler:
    """Return a handler for some rows of the weight from one for all of them."""

    def padded(a: Tensor, e: Tensor, biased: bool, must_return: bool) -> Gradients | None:
        full = e.new_zeros(*e.shape[:-1], outputs)
        full[..., rows] = e
        gradients = on_use(a, full, biased, must_return)
        if gradients is None:
            return None
        weight, bias = gradients
        return None if weight is None else weight[rows], None if bias is None else bias[rows]

    return on_use if rows == ALL else padded


def attention(
    module: Any,
    project: Project,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return what nn.MultiheadAttention computes for a batch, its input projections by `project`.

    Arguments and result are those of nn.MultiheadAttention.forward.
    """
    if is_causal and attn_mask is None:
        raise ValueError("attn_mask: expected the causal mask beside is_causal=True, got None")
    own, other = query is key, key is value
    if not module.batch_first:
        query = query.transpose(0, 1)
        key = query if own else key.transpose(0, 1)
        value = key if other else value.transpose(0, 1)
    d = module.embed_dim
    if own and other:
        q, k, v = project(query, ALL).chunk(3, -1)
    elif other:
        q, (k, v) = project(query, slice(0, d)), project(key, slice(d, 3 * d)).chunk(2, -1)
    else:
        inputs = (query, key, value)
        q, k, v = (project(x, slice(i * d, (i + 1) * d)) for i, x in enumerate(inputs))

    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (N, H, T, d)
    mask = _mask(module, q, key_padding_mask, attn_mask)
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    y = module.out_proj(mixed.transpose(1, 2).flatten(2))
    return (y if module.batch_first else y.transpose(0, 1)), weights


def _mask(module: Any, q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """Return both masks as one that is added to the scores (N, H, T, S), None without any."""
    mask = None if attn_mask is None else _additive(attn_mask, q)
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, module.num_heads))
    if key_padding_mask is None:
        return mask
    padding = _additive(key_padding_mask, q)[:, None, None, :]
    return padding if mask is None else mask + padding


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
