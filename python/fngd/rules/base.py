"""What a layer rule is: how one type of module computes, and how its per-sample gradients are contracted."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fngd_kernels as fk
from fngd_kernels.ops.nodes import Gradients, UseHandler


class Use(NamedTuple):
    """One use of a module's parameters: in its forward, or in a derivative of it."""

    a: Any
    """Input, samples in dimension 0; None where `e` holds the per-sample gradients themselves."""
    e: Tensor
    """grad_output, samples in dimension 0."""
    biased: bool
    """Whether the bias takes part; in a derivative of a forward it does not."""


class Rule(ABC):
    """How one type of module computes, and how the per-sample gradients of its parameters are contracted.

    A rule needs `forward` and `contributions`; the other methods have defaults, to be overridden where the
    gradients need not be formed. It has no state: one instance serves every module of its type. Only rules
    know a layer's shapes.

    C_n is what sample n contributes to the gradient of the loss: the per-sample gradient times 1/N where the
    loss is a mean.
    """

    name: str
    """What `coverage()` calls it; by default the name of the class."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "name"):
            cls.name = cls.__name__

    def reason_against(self, module: Any) -> str | None:
        """Return why this module must keep the plain gradient, None where the rule serves it."""
        return None

    def batched(self, module: Any, x: Tensor) -> bool:
        """Return whether dimension 0 of the input counts samples."""
        return x.ndim >= 2

    @abstractmethod
    def forward(
        self,
        module: Any,
        x: Tensor,
        coefficients: Tensor | None,
        on_use: UseHandler | None,
        *arguments: Any,
    ) -> Any:
        """Return the module's output in training mode, through a node of `fngd_kernels.ops.nodes`.

        Args:
            module: The module.
            x: Its input.
            coefficients: (N,) s_n: backward gives sum_n s_n C_n; None where the uses are collected.
            on_use: Receives each use in backward; None where coefficients are given.
            arguments: What else the module was called with.
        """

    @abstractmethod
    def contributions(self, module: Any, uses: Sequence[Use]) -> Sequence[Tensor | None]:
        """Return C_n (N, *shape) of weight and bias, summed over the uses; None for one without a part."""

    def gram(self, module: Any, uses: Sequence[Use], sketch: fk.Sketch | None = None) -> Tensor:
        """Return K (N, N), K_ij = <C_i, C_j>, of sketched contributions if a sketch is given."""
        shares = [fk.gram_rows(c, sketch=sketch) for c in self.contributions(module, uses) if c is not None]
        return shares[0] if len(shares) == 1 else torch.stack(shares).sum(0)

    def combine(self, module: Any, uses: Sequence[Use], s: Tensor) -> Sequence[Tensor | None]:
        """Return sum_n s_n C_n for weight and bias, None for one that takes no part."""
        contributions = self.contributions(module, uses)
        return [None if c is None else fk.combine_rows(c, s) for c in contributions]


def plus_bias(y: Tensor, bias: Tensor, channel: int) -> Tensor:
    """Return y (N, ...) plus a bias (O,), or (N, O) with a row for each sample, in the dtype of y.

    Args:
        y: The output of a layer without its bias.
        bias: The bias.
        channel: The dimension of y that counts O: 1 or -1.
    """
    rows = bias if bias.ndim == 2 else bias.unsqueeze(0)
    positions = (1,) * (y.ndim - 2)
    shape = (*positions, rows.shape[1]) if channel == -1 else (rows.shape[1], *positions)
    return y + rows.view(rows.shape[0], *shape).to(y.dtype)


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


def bias_contributions(module: Any, uses: Sequence[Use], channel: int) -> Tensor | None:
    """Return C_n (N, O) of a trainable bias, None where it takes no part.

    Args:
        module: The module.
        uses: Its uses.
        channel: The dimension of grad_output that counts the outputs.
    """
    moved = [use.e.movedim(channel, -1) for use in biased(module, uses)]
    summed = [e.reshape(e.shape[0], -1, e.shape[-1]).sum(1) for e in moved]
    return torch.stack(summed).sum(0) if summed else None


def with_bias(k: Tensor, bias: Tensor | None, sketch: fk.Sketch | None) -> Tensor:
    """Return the Gram matrix of weight and bias from the weight's own and the bias' contributions (N, O)."""
    return k if bias is None else k + fk.gram_rows(bias, sketch=sketch)


def combined_bias(bias: Tensor | None, s: Tensor) -> Tensor | None:
    """Return the gradient of the bias from its contributions (N, O)."""
    return None if bias is None else fk.combine_rows(bias, s)


def trainable_bias(module: Any) -> bool:
    """Return whether the module has a bias that asks for a gradient."""
    bias = getattr(module, "bias", None)
    return bias is not None and bias.requires_grad
