"""The Jacobian of residuals in factors, contracted in sample space; of linear layers it is rarely formed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import fngd_kernels as fk

from ..capture import RoutedModule, Uses
from ..rules import Use, is_linear_map
from .layers import trainable


@dataclass
class Group:
    """One component of a block: N rows of the Jacobian."""

    residuals: Tensor  # (N,)
    uses: Uses
    rows: dict[Tensor, Tensor]  # (N, *shape), what is formed


class Factor(Protocol):
    """The columns of J (M, P) that belong to some parameters."""

    parameters: Sequence[Tensor]

    def gram(self) -> Tensor:
        """Return J J^T (M, M) of these columns."""

    def transposed_times(self, y: Tensor) -> Sequence[Tensor]:
        """Return J^T y in the parameters' shapes, for y (M,)."""

    def times(self, direction: Sequence[Tensor]) -> Tensor:
        """Return J d (M,), for a direction of the parameters' shapes."""


class LinearFactor:
    """A linear layer: row m of J is E_m^T A_m, a (M, T, I) and e (M, T, O); the bias is a's last column."""

    def __init__(self, parameters: Sequence[Tensor], a: Tensor, e: Tensor) -> None:
        self.parameters, self.a, self.e = parameters, a, e

    def gram(self) -> Tensor:
        return fk.gram(self.a, self.e, precision="ieee")

    def transposed_times(self, y: Tensor) -> Sequence[Tensor]:
        combined = fk.combine(self.a, self.e, y.to(self.a.dtype))
        assert isinstance(combined, Tensor)
        return (combined,) if len(self.parameters) == 1 else (combined[:, :-1], combined[:, -1])

    def times(self, direction: Sequence[Tensor]) -> Tensor:
        columns = torch.cat([d.reshape(len(d), -1) for d in direction], dim=1)
        return ((self.a @ columns.T) * self.e).sum((1, 2))


class RowsFactor:
    """J as it is: rows (M, *shape) of one parameter."""

    def __init__(self, parameter: Tensor, rows: Tensor) -> None:
        self.parameters: Sequence[Tensor] = (parameter,)
        self.rows = rows

    def gram(self) -> Tensor:
        return fk.gram_rows(self.rows)

    def transposed_times(self, y: Tensor) -> Sequence[Tensor]:
        return (fk.combine_rows(self.rows, y.to(self.rows.dtype)),)

    def times(self, direction: Sequence[Tensor]) -> Tensor:
        return self.rows.flatten(1) @ direction[0].flatten()


class Jacobian:
    """J (M, P) of M scaled residuals."""

    def __init__(self, factors: Sequence[Factor], residuals: Tensor) -> None:
        self.factors, self.residuals = factors, residuals

    def gram(self) -> Tensor:
        """Return J J^T (M, M) in float64; each factor's share is summed in its own dtype, at least fp32."""
        k = torch.zeros(2 * self.residuals.shape, dtype=torch.float64, device=self.residuals.device)
        for factor in self.factors:
            k += factor.gram()
        return k

    def transposed_times(self, y: Tensor) -> dict[Tensor, Tensor]:
        """Return J^T y (P,), by parameter."""
        parts = [zip(factor.parameters, factor.transposed_times(y), strict=True) for factor in self.factors]
        return {parameter: part for pairs in parts for parameter, part in pairs}

    def times(self, direction: Mapping[Tensor, Tensor]) -> Tensor:
        """Return J d (M,) in float64, for a direction by parameter."""
        parts = [f.times([direction[p] for p in f.parameters]).double() for f in self.factors]
        return torch.stack(parts).sum(0)


def linear_factor(
    parameters: Sequence[Tensor], groups: Sequence[Sequence[Use]], sizes: list[int]
) -> LinearFactor:
    """Return one factor of groups of rows, filled up with zeros to the most positions of any group.

    Args:
        parameters: The weight, and the bias where it is trained.
        groups: For each group the uses of its N samples, empty for a group that the layer takes no
            part in.
        sizes: N of each group.
    """
    outputs, inputs = parameters[0].shape
    most = max(sum(use.e[0].numel() for use in uses) for uses in groups) // outputs
    like = next(use.e for uses in groups for use in uses)
    a = like.new_empty((sum(sizes), most, inputs + len(parameters) - 1))
    e = like.new_empty((sum(sizes), most, outputs))
    for uses, a_rows, e_rows in zip(groups, a.split(sizes), e.split(sizes), strict=True):
        begin = 0
        for use in uses:
            end = begin + use.e[0].numel() // outputs
            a_rows[:, begin:end, :inputs] = use.a.reshape(len(a_rows), -1, inputs)
            a_rows[:, begin:end, inputs:] = float(use.biased)
            e_rows[:, begin:end] = use.e.reshape(len(e_rows), -1, outputs)
            begin = end
        a_rows[:, begin:], e_rows[:, begin:] = 0, 0
    return LinearFactor(parameters, a, e)


@torch.no_grad()
def factors_of(modules: Sequence[RoutedModule], groups: Sequence[Group]) -> list[Factor]:
    """Return the factors of all parameters; linear layers stay unformed where that takes less memory.

    Args:
        modules: The layers that are captured.
        groups: The rows of the Jacobian, to which those of layers that are formed are added.
    """
    sizes = [len(group.residuals) for group in groups]
    factors: list[Factor] = []
    for module in modules:
        parameters = trainable(module)
        uses = [group.uses.get(module, []) for group in groups]
        formed = any(parameters[0] in group.rows for group in groups)
        if (
            is_linear_map(module.rule)
            and any(uses)
            and not formed
            and not _mostly_zeros(parameters[0], uses, sizes)
        ):
            factors.append(linear_factor(parameters, uses, sizes))
            continue
        for group, captured in zip(groups, uses, strict=True):
            if captured:
                contributions = module.rule.contributions(module.module, captured)
                pairs = zip(module.parameters, contributions, strict=True)
                group.rows |= {p: c for p, c in pairs if p is not None and c is not None}
    for parameter in dict.fromkeys(p for group in groups for p in group.rows):
        zeros = (parameter.new_zeros((size, *parameter.shape)) for size in sizes)
        rows = [g.rows.get(parameter, zero) for g, zero in zip(groups, zeros, strict=True)]
        factors.append(RowsFactor(parameter, torch.cat(rows)))
    return factors


def _mostly_zeros(weight: Tensor, groups: Sequence[Sequence[Use]], sizes: Sequence[int]) -> bool:
    """Return whether groups of few positions, filled up to the most, take more numbers than rows of J."""
    outputs, inputs = weight.shape
    positions = [sum(use.e[0].numel() for use in uses) // outputs for uses in groups]
    own = sum(size * t for size, t in zip(sizes, positions, strict=True)) * (outputs + inputs)
    filled_up = sum(sizes) * max(positions) * (outputs + inputs)
    return filled_up > max(own, sum(sizes) * outputs * inputs)
