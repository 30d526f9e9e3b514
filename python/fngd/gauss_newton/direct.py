"""Damped normal equations by Cholesky factors, in the space of the residuals or in that of the parameters."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .jacobian import Jacobian
from .ranks import Ranks

Solve = Callable[[Tensor], Tensor]
"""Takes r (M,) and returns (J^T J + lam I)^-1 J^T r (P,), in float64."""


class System(Protocol):
    """J^T J + lam I for any lam."""

    squared_norm: float
    """|J|_F^2"""
    iterations: int
    """Made so far; 0 in exact systems."""

    def damped(self, lam: float) -> Solve | None:
        """Return the solve for lam > 0, None where rounding makes the damped matrix indefinite."""


class SampleSystem:
    """(J^T J + lam I)^-1 J^T = J^T (J J^T + lam I)^-1: M^2 P / 2 multiply-adds, M^3 / 6 for each lam."""

    iterations = 0

    def __init__(self, jacobian: Jacobian) -> None:
        self._jacobian = jacobian
        with torch.profiler.record_function("GaussNewton.gram"):
            self._k = jacobian.gram()
        self.squared_norm = float(self._k.trace())

    def damped(self, lam: float) -> Solve | None:
        factor = _cholesky(self._k, lam)
        if factor is None:
            return None
        return lambda r: self._jacobian.transposed_times(_solve(factor, r))


class ParameterSystem:
    """J^T J as it is: M P^2 / 2 multiply-adds, P^3 / 6 for each lam. Ranks may each hold some of the rows."""

    iterations = 0

    def __init__(self, jacobian: Jacobian, ranks: Ranks) -> None:
        self._jacobian, self._ranks = jacobian, ranks
        with torch.profiler.record_function("GaussNewton.gram"):
            self._a = ranks.sum(jacobian.normal_matrix())
        self.squared_norm = float(self._a.trace())

    def damped(self, lam: float) -> Solve | None:
        factor = _cholesky(self._a, lam)
        if factor is None:
            return None
        return lambda r: _solve(factor, self._ranks.sum(self._jacobian.transposed_times(r)))


def _cholesky(matrix: Tensor, lam: float) -> Tensor | None:
    """Return the lower factor of matrix + lam I, None where it has none."""
    with torch.profiler.record_function("GaussNewton.solve"):
        damped = matrix.clone()
        damped.diagonal().add_(lam)
        factor, info = torch.linalg.cholesky_ex(damped)
        return factor if int(info) == 0 else None


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    half = torch.linalg.solve_triangular(factor, right.unsqueeze(1), upper=False)
    return torch.linalg.solve_triangular(factor.T, half, upper=True).squeeze(1)
