"""Parameters that go some steps away from where they stand, to stay there or to come back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .jacobian import Jacobian
from .linearize import Linearizer
from .ranks import Ranks


class Walk:
    """Steps from where the parameters of a Jacobian stand.

    Args:
        linearize: Evaluates the residuals.
        residuals: Their closure.
        jacobian: J and rho at the start.
        ranks: Who holds the other residuals.
    """

    def __init__(
        self, linearize: Linearizer, residuals: Callable[[], Any], jacobian: Jacobian, ranks: Ranks
    ) -> None:
        self.jacobian = jacobian
        self._linearize, self._residuals, self._ranks = linearize, residuals, ranks
        self._start = {p: p.detach().clone() for p in jacobian.parameters}
        self.before = self.loss(jacobian.residuals)
        """The loss at the start."""

    def loss(self, residuals: Tensor) -> float:
        """Return the sum of the squares of residuals (M,) and of those of other ranks."""
        return float(self._ranks.sum(residuals.square().sum()))

    @torch.no_grad()
    def go(self, step: Tensor) -> None:
        """Put the parameters to start + step (P,)."""
        for p, part in self.jacobian.by_parameter(step).items():
            p.copy_(self._start[p] + part.to(p.dtype))

    def residuals_at(self, step: Tensor) -> Tensor:
        """Return the residuals (M,) at start + step, where the parameters then are."""
        self.go(step)
        return self._linearize.rows(self._residuals)

    @torch.no_grad()
    def go_back(self) -> None:
        """Put the parameters where they were, bit for bit."""
        for p, value in self._start.items():
            p.copy_(value)
