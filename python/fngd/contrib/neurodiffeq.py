"""GaussNewton inside neurodiffeq's solvers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from neurodiffeq.solvers import BaseSolver
from torch import Tensor, nn

from .squares import ClosureGaussNewton, Squares

_OTHER_LOSS = "loss_fn: GaussNewton minimises mean squares of residuals, expected None, 'l2' or MSELoss()"


class GaussNewton(ClosureGaussNewton):
    """An optimizer for `solver.optimizer = GaussNewton(solver)`.

    Args:
        solver: Any solver of neurodiffeq.solvers; its networks are optimized.
        **settings: Those of `fngd.GaussNewton`. `params` names what to optimize where that is more than the
            networks, for example an unknown coefficient.
    """

    def __init__(self, solver: BaseSolver, **settings: Any) -> None:
        super().__init__(nn.ModuleList(dict.fromkeys(solver.nets)), **settings)
        self._owner = solver

    @contextmanager
    def _recording(self, squares: Squares) -> Iterator[None]:
        solver = self._owner
        loss_fn, metrics = solver.loss_fn, solver.metrics_fn

        def recorded(residuals: Tensor, *rest: Any) -> Tensor:
            return (_weights(loss_fn, residuals.detach(), *rest) * squares(residuals)).sum()

        solver.loss_fn = recorded
        if not squares.is_first:
            solver.metrics_fn = {}  # the solver adds them up over the evaluations
        try:
            yield
        finally:
            solver.loss_fn, solver.metrics_fn = loss_fn, metrics


def _weights(loss_fn: Any, residuals: Tensor, *rest: Any) -> Tensor:
    """Return how much each squared residual counts in a loss.

    Raises:
        ValueError: A loss that is no weighted mean square of the residuals.
    """
    ones = torch.ones_like(residuals).requires_grad_()
    other = torch.linspace(-1, 2, residuals.numel(), dtype=residuals.dtype, device=residuals.device).view_as(
        residuals
    )
    try:
        (gradient,) = torch.autograd.grad(loss_fn(ones, *rest), ones)
        expected, found = float((gradient / 2 * other**2).sum()), float(loss_fn(other, *rest))
    except RuntimeError as error:
        raise ValueError(_OTHER_LOSS) from error
    if not abs(found - expected) <= 1e-5 * abs(found):
        raise ValueError(_OTHER_LOSS)
    return gradient / 2
