"""The columns of a Jacobian J (M, P) by what they belong to: formed, or as the captured uses of a layer."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import fngd_kernels as fk

from ..capture import RoutedModule
from ..rules import Use
from .layers import trainable

CHUNK_BYTES = 64 << 20
"""Scratch memory of a product with what is not formed."""


class Factor(Protocol):
    """The columns of J (M, C) that belong to some parameters, one parameter's after another's."""

    parameters: Sequence[Tensor]

    def rows(self, begin: int, end: int) -> Tensor:
        """Return some rows of J (end - begin, C)."""

    def gram(self) -> Tensor:
        """Return J J^T (M, M), summed in the dtype of J, at least fp32."""

    def squared_norm(self) -> Tensor:
        """Return |J|_F^2 in float64."""

    def times(self, x: Tensor) -> Tensor:
        """Return J x (M, K) for x (C, K)."""

    def transposed_times(self, y: Tensor) -> Tensor:
        """Return J^T y (C, K) for y (M, K)."""


class FormedFactor:
    """J as it is, (M, C)."""

    def __init__(self, parameters: Sequence[Tensor], jacobian: Tensor) -> None:
        self.parameters, self.jacobian = parameters, jacobian

    def rows(self, begin: int, end: int) -> Tensor:
        return self.jacobian[begin:end]

    def gram(self) -> Tensor:
        return fk.gram_rows(self.jacobian)

    def squared_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.jacobian, dtype=torch.float64).square()

    def times(self, x: Tensor) -> Tensor:
        return self.jacobian @ x.to(self.jacobian.dtype)

    def transposed_times(self, y: Tensor) -> Tensor:
        return self.jacobian.T @ y.to(self.jacobian.dtype)


class LinearFactor:
    """A linear layer by its captured uses: row m of J is E_m^T A_m, a (M, T, I) and e (M, T, O).

    Args:
        module: The layer.
        groups: N and the uses of each group of N rows; none where the layer takes no part.
    """

    def __init__(self, module: RoutedModule, groups: Sequence[tuple[int, Sequence[Use]]]) -> None:
        self.parameters: Sequence[Tensor] = trainable(module)
        self._module, self._groups = module, groups
        self._sizes = [size for size, _ in groups]
        self._outputs, self._inputs = self.parameters[0].shape
        self._columns = sum(p.numel() for p in self.parameters)
        self._like = next(use.e for _, uses in groups for use in uses)

    def rows(self, begin: int, end: int) -> Tensor:
        found = self._like.new_zeros((end - begin, self._columns))
        first = 0
        for size, uses in self._groups:
            low, high = max(begin, first), min(end, first + size)
            if uses and low < high:
                part = slice(low - first, high - first)
                taken = [Use(use.a[part], use.e[part], use.biased) for use in uses]
                contributions = contributions_of(self._module, taken)
                write_rows(found[low - begin : high - begin], self.parameters, contributions)
            first += size
        return found

    def gram(self) -> Tensor:
        if self._mostly_zeros():
            return fk.gram_rows(self.rows(0, sum(self._sizes)))
        return fk.gram(*self._filled_up(), precision="ieee")

    def squared_norm(self) -> Tensor:
        used = [(size, uses) for size, uses in self._groups if uses]
        norms = [fk.gram(*self._joined(size, uses), precision="ieee", diag=True) for size, uses in used]
        return torch.cat(norms).sum(dtype=torch.float64)

    def times(self, x: Tensor) -> Tensor:
        return torch.stack([self._times(column) for column in x.to(self._like.dtype).unbind(1)], 1)

    def transposed_times(self, y: Tensor) -> Tensor:
        columns = y.to(self._like.dtype).T.contiguous()
        return torch.stack([self._transposed_times(column) for column in columns], 1)

    def _times(self, x: Tensor) -> Tensor:
        weight, bias = x.split([self.parameters[0].numel(), len(x) - self.parameters[0].numel()])
        weight = weight.view(self._outputs, self._inputs)
        found = self._like.new_zeros(sum(self._sizes))
        for part, (size, uses) in zip(found.split(self._sizes), self._groups, strict=True):
            for use in uses:
                a, e = use.a.reshape(size, -1, self._inputs), use.e.reshape(size, -1, self._outputs)
                chunk = max(1, CHUNK_BYTES // (e[0].numel() * e.itemsize))
                for y, a_rows, e_rows in zip(part.split(chunk), a.split(chunk), e.split(chunk), strict=True):
                    product = a_rows @ weight.T
                    if use.biased and len(bias):
                        product += bias
                    y += product.mul_(e_rows).sum((1, 2))
        return found

    def _transposed_times(self, y: Tensor) -> Tensor:
        found = [torch.zeros_like(p) for p in self.parameters]
        for s, (_, uses) in zip(y.split(self._sizes), self._groups, strict=True):
            for use in uses:
                combined = self._module.rule.combine(self._module.module, [use], s)
                parts = (part for part in combined if part is not None)  # the weight's, and the bias'
                for total, part in zip(found, parts, strict=False):
                    total += part
        return torch.cat([total.flatten() for total in found])

    def _filled_up(self) -> tuple[Tensor, Tensor]:
        """Return a (M, T, I) and e (M, T, O) with zeros up to the most positions of any group."""
        rows, most = sum(self._sizes), self._most_positions()
        a = self._like.new_zeros((rows, most, self._inputs + len(self.parameters) - 1))
        e = self._like.new_zeros((rows, most, self._outputs))
        for (size, uses), a_rows, e_rows in zip(
            self._groups, a.split(self._sizes), e.split(self._sizes), strict=True
        ):
            if uses:
                own_a, own_e = self._joined(size, uses)
                a_rows[:, : own_a.shape[1]], e_rows[:, : own_e.shape[1]] = own_a, own_e
        return a, e

    def _joined(self, size: int, uses: Sequence[Use]) -> tuple[Tensor, Tensor]:
        """Return a (N, T, I) and e (N, T, O) of all uses; a trained bias is the last column of a."""
        inputs = [use.a.reshape(size, -1, self._inputs) for use in uses]
        if len(self.parameters) == 2:
            inputs = [F.pad(a, (0, 1), value=float(u.biased)) for a, u in zip(inputs, uses, strict=True)]
        return torch.cat(inputs, 1), torch.cat([use.e.reshape(size, -1, self._outputs) for use in uses], 1)

    def _positions(self, use: Use) -> int:
        return use.e[0].numel() // self._outputs

    def _most_positions(self) -> int:
        return max(sum(map(self._positions, uses)) for _, uses in self._groups)

    def _mostly_zeros(self) -> bool:
        """Return whether groups of few positions, filled up to the most, take more numbers than rows of J."""
        own = sum(size * sum(map(self._positions, uses)) for size, uses in self._groups)
        filled_up = sum(self._sizes) * self._most_positions()
        width = self._outputs + self._inputs
        return filled_up * width > max(own * width, sum(self._sizes) * self._outputs * self._inputs)


def contributions_of(module: RoutedModule, uses: Sequence[Use]) -> dict[Tensor, Tensor]:
    """Return the rows of J (N, *shape) of a layer's parameters from the uses of N rows."""
    contributions = module.rule.contributions(module.module, uses)
    pairs = zip(module.parameters, contributions, strict=True)
    return {p: c for p, c in pairs if p is not None and c is not None}


def write_rows(part: Tensor, parameters: Sequence[Tensor], rows: Mapping[Tensor, Tensor]) -> None:
    """Write rows (N, *shape) by parameter into part (N, C), zeros for parameters without."""
    columns = part.split([p.numel() for p in parameters], 1)
    for p, column in zip(parameters, columns, strict=True):
        if p in rows:
            column.copy_(rows[p].reshape(column.shape))
        else:
            column.zero_()
