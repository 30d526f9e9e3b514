"""What a layer rule is: how one type of module computes, and how its contributions C_n are contracted."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import fngd_kernels as fk
from fngd_kernels.ops.nodes import Gradients, UseHandler


class Use(NamedTuple):
    """One use of a module's parameters in a forward, or in a derivative of it."""

    a: Any
    """Sample-first input; None where e holds the contributions themselves."""
    e: Tensor
    """Sample-first gradient at the output."""
    biased: bool
    """Whether the module's bias takes part; in a derivative it does not."""


class Rule(Protocol):
    """How one type of module computes and how the contributions of its samples are contracted.

    A rule has no state: one instance serves every module of its type. Only rules know a layer's shapes.
    """

    name: str

    def reason_against(self, module: Any) -> str | None:
        """Return why this module must keep the plain gradient, or None when the rule serves it."""

    def batched(self, module: Any, x: Tensor) -> bool:
        """Return whether dimension 0 of the input counts samples."""

    def forward(
        self, module: Any, x: Tensor, scale: Tensor | None, sink: UseHandler | None, *arguments: Any
    ) -> Tensor:
        """Return the module's training-mode output, its parameter gradients weighted or given to sink."""

    def gram(self, module: Any, uses: Sequence[Use]) -> Tensor:
        """Return K (N, N), K_ij = <C_i, C_j>, with C_n summed over the uses."""

    def contributions(self, module: Any, uses: Sequence[Use]) -> Sequence[Tensor | None]:
        """Return the C_n (N, *shape) to each parameter, weight and bias; None for one that takes no part."""

    def combine(self, module: Any, uses: Sequence[Use], s: Tensor) -> Sequence[Tensor | None]:
        """Return sum_n s_n C_n, the gradient of each parameter, None for one without."""


def added(parts: Sequence[Sequence[Tensor | None]]) -> tuple[Tensor | None, ...]:
    """Return the sum of several uses' gradients, parameter by parameter."""
    columns = ([g for g in column if g is not None] for column in zip(*parts, strict=True))
    return tuple(torch.stack(found).sum(0) if len(found) > 1 else (*found, None)[0] for found in columns)


def pair(result: Tensor | tuple[Tensor, Tensor]) -> Gradients:
    """Return what a weighted sum with or without bias gave as (weight gradient, bias gradient)."""
    return result if isinstance(result, tuple) else (result, None)


def biased(module: Any, uses: Sequence[Use]) -> list[Use]:
    """Return the uses in which a trainable bias takes part."""
    return [use for use in uses if use.biased] if trainable_bias(module) else []


def bias_rows(module: Any, uses: Sequence[Use], channel: int) -> Tensor | None:
    """Return the contributions (N, O) to a trainable bias, None where it takes no part.

    channel: the dimension of e that counts the outputs
    """
    rows = [use.e.movedim(channel, -1) for use in biased(module, uses)]
    summed = [e.reshape(e.shape[0], -1, e.shape[-1]).sum(1) for e in rows]
    return torch.stack(summed).sum(0) if summed else None


def with_bias(k: Tensor, rows: Tensor | None) -> Tensor:
    """Return the Gram matrix of weight and bias from the weight's own and the contributions to the bias."""
    return k if rows is None else k + fk.gram_rows(rows)


def combined_bias(rows: Tensor | None, s: Tensor) -> Tensor | None:
    """Return the gradient of the bias from the contributions to it."""
    return None if rows is None else fk.combine_rows(rows, s)


def trainable_bias(module: Any) -> bool:
    """Return whether the module has a bias that asks for a gradient."""
    bias = getattr(module, "bias", None)
    return bias is not None and bias.requires_grad
