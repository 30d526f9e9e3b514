"""What a residual closure returns: named blocks of residuals, one row per sample."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

LOSSES = ("MseLoss", "NllLoss", "CrossEntropy", "KlDiv", "SmoothL1Loss", "HuberLoss", "SoftMarginLoss")
"""Parts of the names of autograd nodes of losses with reduction="none"."""


class PerSample:
    """A residual block given by a function of one sample, for residuals written with torch.func.

    Args:
        function: (params, *sample) -> () or (C,), the residual of one sample; `params` maps the
            model's parameter names to tensors, as torch.func.functional_call takes them.
        inputs: (N, ...) each, the samples.
    """

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        if not callable(function):
            raise TypeError(f"function: expected a callable, got {type(function).__name__}")
        if not inputs or len({len(x) for x in inputs}) != 1:
            shapes = [tuple(x.shape) for x in inputs]
            raise ValueError(f"inputs: expected one or more tensors of one length, got shapes {shapes}")
        self.function, self.inputs = function, inputs

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the residuals (N,) or (N, C)."""
        return vmap(self.function, (None,) + (0,) * len(self.inputs))(params, *self.inputs)


@dataclass(frozen=True)
class Block:
    """Residuals of N samples with C components each; in the loss weight * mean(values^2)."""

    name: str
    values: Tensor  # (N, C)
    weight: float
    count: int  # of residuals of this name, those of other ranks among them
    per_sample: PerSample | None

    @property
    def scale(self) -> float:
        """Return the factor that makes the loss the sum of squares of the scaled residuals."""
        return math.sqrt(self.weight / self.count)

    @property
    def rows(self) -> Tensor:
        """Return the scaled residuals (C N,), component after component."""
        return self.scale * self.values.detach().T.flatten()


def evaluate(residuals: Callable[[], Any], params: Mapping[str, Tensor]) -> list[Block]:
    """Return the blocks that the closure gives.

    Raises:
        TypeError, ValueError: Anything but (N,) or (N, C) floating tensors or `PerSample`, alone or in a dict
            of blocks, each with or without a weight >= 0.
    """
    if not callable(residuals):
        raise TypeError(
            f"residuals: expected a function that returns residuals, got {type(residuals).__name__}"
        )
    returned = residuals()
    named = returned if isinstance(returned, Mapping) else {"residuals": returned}
    if not named:
        raise ValueError("residuals: expected at least one block, got an empty dict")
    return [_block(str(name), given, params) for name, given in named.items()]


def with_counts(blocks: Sequence[Block], counts: Mapping[str, int]) -> list[Block]:
    """Return the blocks as parts of as many residuals as the counts say by name.

    Raises:
        ValueError: Blocks of other names.
    """
    names = [block.name for block in blocks]
    if names != list(counts):
        raise ValueError(
            f"residuals: expected the blocks {list(counts)} in every call of a step, got {names}"
        )
    return [replace(block, count=counts[block.name]) for block in blocks]


def _block(name: str, given: Any, params: Mapping[str, Tensor]) -> Block:
    values, weight = given if isinstance(given, tuple) and len(given) == 2 else (given, 1.0)
    if isinstance(weight, Tensor) and weight.numel() == 1:
        weight = weight.item()
    if not isinstance(weight, numbers.Real):
        raise TypeError(f"residuals: expected a number as the weight of block {name!r}, got {weight!r:.80}")
    weight = float(weight)
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"residuals: expected a weight >= 0 for block {name!r}, got {weight}")
    per_sample = values if isinstance(values, PerSample) else None
    if per_sample is not None:
        values = per_sample(params)
    if isinstance(values, Tensor) and values.is_complex() and values.ndim in (1, 2):
        values, weight = torch.view_as_real(values).flatten(1), 2 * weight  # of twice as many numbers
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"residuals: expected floating tensors, block {name!r} is {kind}")
    if values.ndim not in (1, 2) or values.numel() == 0:
        raise ValueError(
            f"residuals: expected shape (N,) or (N, C), one row per sample and not a loss over them, "
            f"block {name!r} is {tuple(values.shape)}"
        )
    if not values.requires_grad:
        raise ValueError(
            f"residuals: block {name!r} does not depend on a parameter that requires a gradient; derivatives "
            "in residuals need autograd.grad(..., create_graph=True)"
        )
    if values.grad_fn is not None and any(word in values.grad_fn.name() for word in LOSSES):
        raise ValueError(
            f"residuals: expected residuals, whose squares are minimised, block {name!r} is already a loss "
            f"({values.grad_fn.name()}); a squared error is given as prediction - target, and for other "
            "losses, such as cross entropy, use FNGD"
        )
    values = values if values.ndim == 2 else values.unsqueeze(1)
    return Block(name, values, weight, values.numel(), per_sample)
