"""Parameters that go some steps away from where they stand, to stay there or to come back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .jacobian import Jacobian
from .linearize import Linearizer


class Walk:
    """Steps from where the parameters of a Jacobian stand."""

    def __init__(self, linearize: Linearizer, residuals: Callable[[], Any], jacobian: Jacobian) -> None:
        self._linearize, self._residuals, self._jacobian = linearize, residuals, jacobian
        self._start = {p: p.detach().clone() for p in jacobian.parameters}

    @torch.no_grad()
    def go(self, step: Tensor) -> None:
        """Put the parameters to start + step (P,)."""
        for p, part in self._jacobian.by_parameter(step).items():
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
