"""The Jacobian of residuals in factors, contracted in sample space; of linear layers it is never formed."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

import fngd_kernels as fk

from ..rules import Use


class Factor(Protocol):
    """The columns of J (M, P) that belong to some parameters."""

    parameters: Sequence[Parameter]

    def gram(self) -> Tensor:
        """Return J J^T (M, M) of these columns."""

    def transposed_times(self, y: Tensor) -> Sequence[Tensor]:
        """Return J^T y in the parameters' shapes, for y (M,)."""

    def times(self, direction: Sequence[Tensor]) -> Tensor:
        """Return J d (M,), for a direction of the parameters' shapes."""


class LinearFactor:
    """A linear layer: row m of J is E_m^T A_m, a (M, T, I) and e (M, T, O); the bias is a's last column."""

    def __init__(self, parameters: Sequence[Parameter], a: Tensor, e: Tensor) -> None:
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

    def __init__(self, parameter: Parameter, rows: Tensor) -> None:
        self.parameters: Sequence[Parameter] = (parameter,)
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

    def transposed_times(self, y: Tensor) -> dict[Parameter, Tensor]:
        """Return J^T y (P,), by parameter."""
        parts = [zip(factor.parameters, factor.transposed_times(y), strict=True) for factor in self.factors]
        return {parameter: part for pairs in parts for parameter, part in pairs}

    def times(self, direction: Mapping[Parameter, Tensor]) -> Tensor:
        """Return J d (M,) in float64, for a direction by parameter."""
        parts = [f.times([direction[p] for p in f.parameters]).double() for f in self.factors]
        return torch.stack(parts).sum(0)


def linear_factor(
    parameters: Sequence[Parameter], groups: Sequence[Sequence[Use]], sizes: list[int]
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
