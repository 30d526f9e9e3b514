"""The Jacobian of residuals: its products with vectors and with itself, by factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

import fngd_kernels as fk

from ..capture import RoutedModule, Uses
from ..rules import is_linear_map
from .factors import CHUNK_BYTES, Factor, FormedFactor, LinearFactor, contributions_of, write_rows
from .layers import trainable

FORMED_BYTES = 256 << 20
"""Up to this size J is formed; beyond it linear layers stay as they were captured."""


@dataclass
class Group:
    """One component of a block: N rows of the Jacobian."""

    residuals: Tensor  # (N,)
    uses: Uses
    rows: dict[Tensor, Tensor]  # (N, *shape), what is formed


class Jacobian:
    """J (M, P) of M scaled residuals rho, in float64; a vector of length P holds one parameter after another.

    Args:
        residuals: (M,) rho.
        parameters: What J differentiates by, in order.
        factors: Their columns; zeros for parameters that no factor has.
    """

    def __init__(self, residuals: Tensor, parameters: Sequence[Tensor], factors: Sequence[Factor]) -> None:
        self.residuals, self.parameters, self._factors = residuals.double(), parameters, factors
        self._sizes = [p.numel() for p in parameters]
        ends = torch.tensor(self._sizes, dtype=torch.int64, device="cpu").cumsum(0).tolist()
        pairs = zip(parameters, self._sizes, ends, strict=True)
        self._columns = {p: slice(end - size, end) for p, size, end in pairs}

    @property
    def shape(self) -> tuple[int, int]:
        """Return (M, P)."""
        return len(self.residuals), sum(self._sizes)

    @property
    def rounding(self) -> float:
        """Return the unit roundoff of the residuals' derivatives, the largest of any parameter."""
        return max(torch.finfo(p.dtype).eps for p in self.parameters)

    def by_parameter(self, x: Tensor) -> dict[Tensor, Tensor]:
        """Return the parts (*shape) of a vector x (P,)."""
        pairs = zip(self.parameters, x.split(self._sizes), strict=True)
        return {p: part.view(p.shape) for p, part in pairs}

    def flattened(self, parts: Mapping[Tensor, Tensor]) -> Tensor:
        """Return the vector (P,) in float64 of parts in the parameters' shapes."""
        return torch.cat([parts[p].flatten().double() for p in self.parameters])

    def gram(self) -> Tensor:
        """Return J J^T (M, M); each factor's share is summed in its own dtype, at least fp32."""
        k = self.residuals.new_zeros(2 * self.residuals.shape)
        for factor in self._factors:
            k += factor.gram()
        return k

    def normal_matrix(self) -> Tensor:
        """Return J^T J (P, P)."""
        rows, columns = self.shape
        matrix = self.residuals.new_zeros((columns, columns))
        chunk = max(1, CHUNK_BYTES // (8 * columns))
        for i in range(0, rows, chunk):
            matrix += fk.gram_rows(self._rows(i, min(i + chunk, rows)).T)
        return matrix

    def squared_norm(self) -> Tensor:
        """Return |J|_F^2."""
        return torch.stack([factor.squared_norm() for factor in self._factors]).sum()

    def times(self, x: Tensor) -> Tensor:
        """Return J x (M,) or (M, K), for x (P,) or (P, K)."""
        columns = x.view(len(x), -1)
        parts = [factor.times(self._taken(columns, factor)).double() for factor in self._factors]
        product = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        return product.view(-1, *x.shape[1:])

    def transposed_times(self, y: Tensor) -> Tensor:
        """Return J^T y (P,) or (P, K), for y (M,) or (M, K)."""
        rows = y.view(len(y), -1)
        product = y.new_zeros((sum(self._sizes), rows.shape[1]))
        for factor in self._factors:
            self._put(factor.transposed_times(rows), factor, product)
        return product.view(-1, *y.shape[1:])

    def _rows(self, begin: int, end: int) -> Tensor:
        found = self.residuals.new_zeros((end - begin, sum(self._sizes)))
        for factor in self._factors:
            self._put(factor.rows(begin, end).T, factor, found.T)
        return found

    def _taken(self, x: Tensor, factor: Factor) -> Tensor:
        """Return the rows of x (P, K) that belong to a factor."""
        return torch.cat([x[self._columns[p]] for p in factor.parameters])

    def _put(self, part: Tensor, factor: Factor, x: Tensor) -> None:
        """Write the rows of x (P, K) that belong to a factor."""
        parts = part.split([p.numel() for p in factor.parameters])
        for p, own in zip(factor.parameters, parts, strict=True):
            x[self._columns[p]] = own


@torch.no_grad()
def jacobian_of(
    residuals: Tensor,
    parameters: Sequence[Tensor],
    modules: Sequence[RoutedModule],
    groups: Sequence[Group],
) -> Jacobian:
    """Return the Jacobian, formed where it is small, else without the rows of linear layers.

    Args:
        residuals: (M,) rho.
        parameters: What J differentiates by.
        modules: The layers that are captured.
        groups: The rows of J.
    """
    factors: list[Factor] = []
    formed = list(parameters)
    if len(residuals) * sum(p.numel() * p.itemsize for p in parameters) > FORMED_BYTES:
        in_rows = {p for group in groups for p in group.rows}
        for module in modules:
            uses = [(len(group.residuals), group.uses.get(module, [])) for group in groups]
            own = set(trainable(module))
            if is_linear_map(module.rule) and in_rows.isdisjoint(own) and any(u for _, u in uses):
                factors.append(LinearFactor(module, uses))
                formed = [p for p in formed if p not in own]
    if formed:
        others = [m for m in modules if not set(formed).isdisjoint(trainable(m))]
        factors.append(_formed(formed, others, groups))
    return Jacobian(residuals, parameters, factors)


def _formed(
    parameters: Sequence[Tensor], modules: Sequence[RoutedModule], groups: Sequence[Group]
) -> FormedFactor:
    dtype = reduce(torch.promote_types, (p.dtype for p in parameters))
    sizes = [len(group.residuals) for group in groups]
    shape = sum(sizes), sum(p.numel() for p in parameters)
    jacobian = torch.empty(shape, dtype=dtype, device=parameters[0].device)
    for group, part in zip(groups, jacobian.split(sizes), strict=True):
        rows = dict(group.rows)
        for module in modules:
            if uses := group.uses.get(module):
                rows |= contributions_of(module, uses)
        write_rows(part, parameters, rows)
    return FormedFactor(parameters, jacobian)
