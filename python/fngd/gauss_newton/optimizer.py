"""GaussNewton: damped Gauss-Newton steps for least squares."""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..event_log import EventLog
from ..state import NotCopied, check_groups, check_like
from .acceleration import acceleration
from .direct import Solve
from .iterative import Preconditioner
from .jacobian import Jacobian
from .linearize import Linearizer
from .ranks import Ranks
from .systems import SOLVERS, Solver, chosen, system_of
from .walk import Walk

LM = "lm"
DECREASE = 3.0
"""What damping is at most divided by after a step."""
SMALLEST_INCREASE = 2.0
"""What it is multiplied by after a failed trial, and twice as much after each further one."""
LARGEST_DAMPING = 1e8
COUNTERS = (
    "steps",
    "accelerated_steps",
    "undone_trials",
    "given_up_steps",
    "skipped_steps",
    "iterations",
)
MAX_TRIALS = 12
"""Trial steps, or halvings of a step, before a step is given up."""
SINCE_FIRST_VERSION = {"damping_increase": SMALLEST_INCREASE, "accelerated_steps": 0, "iterations": 0}
"""What a state of the first version has not."""
Damped = Callable[[float], Solve | None]
"""Returns the solve for a damping in units of the mean diagonal of J J^T."""
NOT_FINITE = "left out, its loss or Jacobian is not finite"


class GaussNewton(NotCopied):
    """Damped Gauss-Newton for regression and physics-informed networks.

    With the M residuals rho, scaled so that the loss is |rho|^2, and their Jacobian J (M, P),
        d = (J^T J + lam I)^-1 J^T (rho - mu J phi) + mu phi,  theta <- theta - lr d
    where phi is the previous d (SPRING). The step is solved for in float64, in the space of the residuals or
    of the parameters, whichever has fewer dimensions n: M P n / 2 multiply-adds for J J^T or J^T J, n^3 / 6
    for a factor, 24 n^2 bytes. Where both are large, it is found by conjugate gradients.

    Args:
        model: The network; its forwards are routed during `step` only.
        lr: Factor of d; 1 for full batches, about 0.3 for minibatches with momentum.
        damping: "lm", adapted so that every step lowers the loss, or lam in units of the mean diagonal of J
            J^T (about 0.001 to 0.01 in minibatches).
        initial_damping: Where "lm" starts, in the same unit.
        geodesic: Whether steps of "lm" follow the residuals' second derivative along them.
        momentum: mu >= 0 and < 1; 0.9 suits minibatches.
        line_search: Halve each step until it lowers the loss; for a fixed damping.
        params: What to optimize, as for any torch optimizer, for example an unknown coefficient of an
            equation besides the model's parameters; by default the model's.
        solver: "sample" (J J^T), "parameter" (J^T J), "iterative", or "auto", the cheapest; all of them give
            the same d.
        tolerance: How far the damping may be off, relatively, for which the iterative solver's d is exact.
        process_group: Ranks that each return some of the residuals, in blocks of the same names; by default
            this process has them all.

    Raises:
        ValueError: An argument out of range, or a model with parameters that have no values yet.
        TypeError: A wrong type, or a complex parameter.

    Source: arXiv 2505.12149 (Gauss-Newton for physics-informed networks in Woodbury form); arXiv 2401.10190
        (SPRING); arXiv 1201.5885 (geodesic acceleration); damping after Levenberg, Marquardt and Nielsen.
    """

    adaptive: bool
    damping: float
    geodesic: bool
    momentum: float
    line_search: bool
    solver: Solver
    tolerance: float
    _form: Solver
    _increase: float
    _linearize: Linearizer
    _ranks: Ranks
    _preconditioner: Preconditioner
    _counts: dict[str, int]
    _log: EventLog

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        *,
        damping: str | float = LM,
        initial_damping: float = 1.0,
        geodesic: bool = True,
        momentum: float = 0.0,
        line_search: bool = False,
        params: Iterable[Any] | None = None,
        solver: Solver = "auto",
        tolerance: float = 0.1,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        _number("lr", lr)
        _number("initial_damping", initial_damping)
        if isinstance(damping, str) and damping != LM:
            raise ValueError(f"damping: expected 'lm' or a number > 0, got {damping!r}")
        if not isinstance(damping, str):
            _number("damping", damping)
        if not (isinstance(momentum, numbers.Real) and 0 <= momentum < 1):
            raise ValueError(f"momentum: expected a number >= 0 and < 1, got {momentum!r}")
        if line_search and damping == LM:
            raise ValueError(
                "line_search: expected False with damping='lm', which accepts or undoes steps itself"
            )
        if solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
        if solver == "sample" and process_group is not None:
            raise ValueError(
                "solver: expected 'auto', 'parameter' or 'iterative' with a process_group, got 'sample'"
            )
        _number("tolerance", tolerance)
        super().__init__(model.parameters() if params is None else params, {"lr": lr})
        _refuse_complex(model, self.param_groups)
        self.adaptive = damping == LM
        self.damping = float(initial_damping if isinstance(damping, str) else damping)
        self._increase = SMALLEST_INCREASE
        self.geodesic, self.momentum, self.line_search = geodesic, float(momentum), line_search
        self.solver, self.tolerance, self._form = solver, float(tolerance), solver
        self._ranks, self._preconditioner = Ranks(process_group), Preconditioner()
        self._linearize = Linearizer(model, self._parameters(), self._ranks)
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._log = EventLog("step")

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Optimize more parameters from the next step on.

        Raises:
            TypeError: A complex parameter.
        """
        super().add_param_group(param_group)
        if hasattr(self, "_linearize"):
            model = self._linearize.model
            try:
                _refuse_complex(model, self.param_groups)
                self._linearize = Linearizer(model, self._parameters(), self._ranks)
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise

    @torch.no_grad()
    def step(self, residuals: Callable[[], Any]) -> Tensor:  # type: ignore[override]
        """Make one step on the residuals and return the loss before it.

        Args:
            residuals: () -> (N,) or (N, C); or a dict {name: block} of several such blocks, of different N; a
                block may be a pair (residuals, weight) and may be `fngd.PerSample`. The loss is sum_b
                weight_b mean(r_b^2). Residuals may contain derivatives of the model with respect to its
                inputs, by autograd.grad(..., create_graph=True). Layers are captured, and steps fast, where
                each row of a layer belongs to one residual of a block. With damping="lm" or a line search
                the function is called again in each trial step and must give the residuals of the same
                points.

        Returns:
            () loss, detached. A step whose loss or Jacobian is not finite is left out.

        Raises:
            TypeError, ValueError: Residuals that are of another form, do not depend on what is optimized, or
                are more than memory allows; a model with batch normalisation in training mode.
        """
        jacobian = self._linearize(residuals)
        walk = Walk(self._linearize, residuals, jacobian, self._ranks)
        loss = jacobian.residuals.new_tensor(walk.before)
        if not math.isfinite(walk.before):
            self._leave_out("skipped_steps", NOT_FINITE)
            return loss
        rows = self._linearize.count
        self._form = chosen(self.solver, rows, jacobian.shape[1], self._ranks)
        system = system_of(jacobian, self._form, self._ranks, self.tolerance, self._preconditioner)
        unit = system.squared_norm / rows
        if not math.isfinite(unit):
            self._leave_out("skipped_steps", NOT_FINITE)
        elif unit > 0:  # else stationary
            self._step(walk, lambda damping: system.damped(damping * unit))
            self._counts["iterations"] += system.iterations
        return loss

    def _leave_out(self, counter: str, reason: str) -> None:
        self._counts[counter] += 1
        self._log.count(reason)

    def _step(self, walk: Walk, damped: Damped) -> None:
        """Take a step, or none where no trial was good enough."""
        try:
            direction = (
                self._levenberg_marquardt(walk, damped) if self.adaptive else self._fixed(walk, damped)
            )
        except BaseException:
            walk.go_back()
            raise
        if direction is None:
            walk.go_back()
            self._leave_out("given_up_steps", f"given up after {MAX_TRIALS} trials")
            return
        self._counts["steps"] += 1
        if self.momentum:
            for p, d in walk.jacobian.by_parameter(direction).items():
                self.state[p]["momentum_buffer"] = d.to(p.dtype, copy=True)

    def _levenberg_marquardt(self, walk: Walk, damped: Damped) -> Tensor | None:
        """Take the first step that lowers the loss, with more damping after each that does not."""
        residuals = walk.jacobian.residuals
        for _ in range(MAX_TRIALS):
            solve = damped(self.damping)
            direction = None if solve is None else self._direction(walk.jacobian, solve)
            if solve is not None and direction is not None:
                step = self._moving(walk.jacobian, direction)
                change = walk.jacobian.times(step)
                bend = (
                    acceleration(step, change, residuals, walk.residuals_at, solve) if self.geodesic else None
                )
                after = walk.loss(walk.residuals_at(step if bend is None else step + bend))
                if after < walk.before:
                    foretold = walk.before - walk.loss(residuals + change)
                    self._counts["accelerated_steps"] += bend is not None
                    self._trust((walk.before - after) / foretold if foretold > 0 else 0.0)
                    self.damping = max(self.damping, walk.jacobian.rounding)
                    return direction
            self._counts["undone_trials"] += 1
            self._distrust()
        return None

    def _fixed(self, walk: Walk, damped: Damped) -> Tensor | None:
        """Take the step, or with a line search the first of its halves that lowers the loss."""
        # Rounding can make the system indefinite.
        solves = (damped(self.damping * SMALLEST_INCREASE**i) for i in range(MAX_TRIALS))
        directions = (self._direction(walk.jacobian, solve) for solve in solves if solve is not None)
        direction = next((d for d in directions if d is not None), None)
        if direction is None:
            return None
        step = self._moving(walk.jacobian, direction)
        if not self.line_search:
            walk.go(step)
            return direction
        for _ in range(MAX_TRIALS):
            if walk.loss(walk.residuals_at(step)) < walk.before:
                return direction
            self._counts["undone_trials"] += 1
            step = step / 2
        return None

    def _direction(self, jacobian: Jacobian, solve: Solve) -> Tensor | None:
        """Return d (P,), None where it is not finite."""
        if self.momentum:
            buffers = {
                p: self.state[p].get("momentum_buffer", torch.zeros_like(p)) for p in jacobian.parameters
            }
            phi = self.momentum * jacobian.flattened(buffers)
            direction = solve(jacobian.residuals - jacobian.times(phi)) + phi
        else:
            direction = solve(jacobian.residuals)
        return direction if bool(direction.isfinite().all()) else None

    def _moving(self, jacobian: Jacobian, direction: Tensor) -> Tensor:
        """Return -lr d (P,), with the learning rate of each parameter's group."""
        rates = {p: float(group["lr"]) for group in self.param_groups for p in group["params"]}
        parts = jacobian.by_parameter(direction)
        return jacobian.flattened({p: -rates[p] * d for p, d in parts.items()})

    def _trust(self, gain: float) -> None:
        """Lower the damping by how well the linear model foretold the gain; raise it where it did badly."""
        factor = max(1 / DECREASE, 1 - (2 * min(gain, 1.0) - 1) ** 3)
        self.damping, self._increase = min(self.damping * factor, LARGEST_DAMPING), SMALLEST_INCREASE

    def _distrust(self) -> None:
        self.damping = min(self.damping * self._increase, LARGEST_DAMPING)
        self._increase *= 2

    def state_dict(self) -> dict[str, Any]:
        """Return momentum, groups and, under "gauss_newton", damping and counters."""
        return {**super().state_dict(), "gauss_newton": self._own_state()}

    def _own_state(self) -> dict[str, Any]:
        return {"damping": self.damping, "damping_increase": self._increase, **self._counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what state_dict returned.

        Raises:
            TypeError: What is no dictionary.
            ValueError: The state of another optimizer or model, or one that is not whole; nothing is changed
                then.
        """
        check_groups(state_dict, self)
        if "gauss_newton" not in state_dict:
            raise ValueError(
                "state_dict: expected the state of a GaussNewton optimizer, 'gauss_newton' is missing"
            )
        own = state_dict["gauss_newton"]
        if isinstance(own, Mapping):
            own = {**SINCE_FIRST_VERSION, **own}
        check_like(own, self._own_state(), "gauss_newton")
        if not (math.isfinite(own["damping"]) and own["damping"] > 0):
            raise ValueError(f"state_dict: expected a finite damping > 0, got {own['damping']}")
        for number, parameter in enumerate(self._parameters()):
            phi = state_dict["state"].get(number, {}).get("momentum_buffer")
            if phi is not None and phi.shape != parameter.shape:
                raise ValueError(
                    f"state_dict: expected a momentum_buffer of shape {tuple(parameter.shape)} for parameter "
                    f"{number}, got {tuple(phi.shape)}"
                )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "gauss_newton"})
        self.damping = own["damping"]
        self._increase = own["damping_increase"]
        self._counts = {counter: own[counter] for counter in self._counts}

    def coverage(self) -> dict[str, str]:
        """Return how the Jacobian of every parameter is found: a rule, "generic: " and why, or "unused: ".

        A parameter outside of the model goes by its place in `params`, "params[3]".
        """
        return self._linearize.coverage()

    def stats(self) -> dict[str, Any]:
        """Return the damping, the solver of the last step, and counters.

        They count steps and those with geodesic acceleration, undone trials, given up and skipped steps, and
        the iterations of the iterative solver. The logger "fngd" tells of the 1st, 10th, 100th, ... given up
        or skipped step.
        """
        return {"damping": self.damping, "solver": self._form, **self._counts}


def _refuse_complex(model: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    for p in (p for group in groups for p in group["params"]):
        if p.is_complex():
            name = names.get(id(p), "outside of the model")
            shape = tuple(p.shape)
            raise TypeError(f"params: expected real ones, got the complex parameter {name}, of shape {shape}")


def _number(name: str, value: object) -> None:
    if not isinstance(value, numbers.Real) and not (isinstance(value, Tensor) and value.numel() == 1):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(float(value)) and float(value) > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
