"""Which of the equal forms of a damped Gauss-Newton step is solved."""

from typing import Literal

from .checks import refuse_too_large
from .direct import ParameterSystem, SampleSystem, System
from .iterative import IterativeSystem, Preconditioner
from .jacobian import Jacobian
from .ranks import Ranks

Solver = Literal["auto", "sample", "parameter", "iterative"]
SOLVERS = ("auto", "sample", "parameter", "iterative")
EXACT_LIMIT = 6000
"""Order of the largest matrix that is formed and factored where the solver is not chosen."""


def chosen(solver: Solver, rows: int, columns: int, ranks: Ranks) -> Solver:
    """Return the form for M rows and P columns: up to a limit the cheaper exact one."""
    if solver != "auto":
        return solver
    order = min(rows, columns) if ranks.alone else columns
    if order > EXACT_LIMIT:
        return "iterative"
    return "sample" if order < columns else "parameter"


def system_of(
    jacobian: Jacobian, solver: Solver, ranks: Ranks, tolerance: float, preconditioner: Preconditioner
) -> System:
    """Return the damped normal equations in one form.

    Raises:
        ValueError: There is no memory for their matrix and its factor.
    """
    rows, columns = jacobian.shape
    if solver == "iterative":
        return IterativeSystem(jacobian, ranks, tolerance, preconditioner)
    refuse_too_large(jacobian.residuals.device, solver, rows if solver == "sample" else columns)
    return SampleSystem(jacobian) if solver == "sample" else ParameterSystem(jacobian, ranks)
