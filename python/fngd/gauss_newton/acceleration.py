"""Geodesic acceleration: the second-order part of a Levenberg-Marquardt step."""

from collections.abc import Callable

from torch import Tensor

from .direct import Solve

AHEAD = 0.1
"""The part of a step after which the residuals are evaluated for their second derivative along it."""
LARGEST_RATIO = 0.75
"""Of acceleration to step; beyond it, second order does not describe the residuals."""


def acceleration(
    step: Tensor, change: Tensor, residuals: Tensor, ahead: Callable[[Tensor], Tensor], solve: Solve
) -> Tensor | None:
    """Return half the geodesic acceleration (P,) along a step, None where it is too large.

    For a step s it is a / 2, a = -(J^T J + lam I)^-1 J^T r'', with the residuals' second derivative along
    s by one more evaluation,

        r'' = 2 / h ((r(theta + h s) - r(theta)) / h - J s),  refused where |a| > 0.75 |s| or not finite.

    Args:
        step: (P,) s.
        change: (M,) J s.
        residuals: (M,) r(theta).
        ahead: Returns r(theta + x) for x (P,).
        solve: r (M,) -> (J^T J + lam I)^-1 J^T r.

    Source: Transtrum, Sethna, "Improvements to the Levenberg-Marquardt algorithm" (arXiv 1201.5885).
    """
    second = 2 / AHEAD * ((ahead(AHEAD * step) - residuals) / AHEAD - change)
    a = -solve(second)
    return a / 2 if bool(a.norm() <= LARGEST_RATIO * step.norm()) else None
