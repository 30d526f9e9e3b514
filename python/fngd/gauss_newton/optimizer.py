"""GaussNewton: exact damped Gauss-Newton steps for least squares, solved in sample space."""

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fngd_kernels import solve
from fngd_kernels.ops.finite import found_non_finite

from ..event_log import EventLog
from ..state import NotCopied, check_groups, check_like
from .jacobian import Jacobian
from .linearize import Linearizer

LM = "lm"
DECREASE, INCREASE = 3.0, 4.0
"""Damping is divided by the one after a step that lowers the loss, multiplied by the other if not."""
LARGEST_DAMPING = 1e8
MAX_TRIALS = 12
"""Trial steps, or halvings of a step, before a step is given up."""

Direction = dict[Tensor, Tensor]


class GaussNewton(NotCopied):
    """Exact damped Gauss-Newton for regression and physics-informed networks, solved in sample space.

    With the M residuals rho, scaled so that the loss is |rho|^2, and their Jacobian J (M, P),
        d = J^T y + mu phi,  (J J^T + lam I) y = rho - mu J phi,  theta <- theta - lr d
    which for mu = 0 is (J^T J + lam I)^-1 J^T rho. phi is the previous d (SPRING). J J^T comes from the
    kernels of `fngd_kernels`, J is rarely formed for linear layers, and the solve runs in float64.

    A step costs about M^2 P multiply-adds for J J^T and M^3 / 3 for the solve; J J^T takes 8 M^2 bytes.

    Args:
        model: The network; its forwards are routed during `step` only.
        lr: Factor of d; 1 for full batches, about 0.3 for minibatches with momentum.
        damping: "lm", adapted so that every step lowers the loss, or lam in units of the mean diagonal of J
            J^T (about 0.001 to 0.01 in minibatches).
        initial_damping: Where "lm" starts, in the same unit.
        momentum: mu >= 0 and < 1; 0.9 suits minibatches.
        line_search: Halve each step until it lowers the loss; for a fixed damping.
        params: What to optimize, as for any torch optimizer, for example an unknown coefficient of an
            equation besides the model's parameters; by default the model's.

    Raises:
        ValueError: An argument out of range, or a model with parameters that have no values yet.
        TypeError: A wrong type, or a complex parameter.

    Source: arXiv 2505.12149 (Gauss-Newton for physics-informed networks in Woodbury form); arXiv 2401.10190
        (SPRING); damping after Levenberg and Marquardt.
    """

    adaptive: bool
    damping: float
    momentum: float
    line_search: bool
    _linearize: Linearizer
    _counts: dict[str, int]
    _log: EventLog

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        *,
        damping: str | float = LM,
        initial_damping: float = 1.0,
        momentum: float = 0.0,
        line_search: bool = False,
        params: Iterable[Any] | None = None,
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
        super().__init__(model.parameters() if params is None else params, {"lr": lr})
        _refuse_complex(model, self.param_groups)
        self.adaptive = damping == LM
        self.damping = float(initial_damping if isinstance(damping, str) else damping)
        self.momentum, self.line_search = float(momentum), line_search
        self._linearize = Linearizer(model, self._parameters())
        counters = ("steps", "undone_trials", "given_up_steps", "skipped_steps")
        self._counts = dict.fromkeys(counters, 0)
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
                self._linearize = Linearizer(model, self._parameters())
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise

    def step(self, residuals: Callable[[], Any]) -> Tensor:  # type: ignore[override]
        """Make one step on the residuals and return the loss before it.

        Args:
            residuals: () -> (N,) or (N, C); or a dict {name: block} of several such blocks, of different N; a
                block may be a pair (residuals, weight) and may be `fngd.PerSample`. The loss is sum_b
                weight_b mean(r_b^2). Residuals may contain derivatives of the model with respect to its
                inputs, by autograd.grad(..., create_graph=True). Layers are captured, and steps fast, where
                each row of a layer belongs to one residual of a block. With damping="lm" or a line search
                the function is called again for each trial step and must give the residuals of the same
                points.

        Returns:
            () loss, detached. A step whose loss or Jacobian is not finite is left out.

        Raises:
            TypeError, ValueError: Residuals that are of another form, do not depend on what is optimized, or
                are more than memory allows; a model with batch normalisation in training mode.
        """
        loss, jacobian = self._linearize(residuals)
        with torch.profiler.record_function("GaussNewton.gram"), torch.no_grad():
            k = jacobian.gram()
        unit = float(k.diagonal().mean())
        if not (math.isfinite(unit) and bool(loss.isfinite())):
            self._leave_out("skipped_steps", "left out, its loss or Jacobian is not finite")
            return loss
        if unit == 0:  # stationary
            return loss
        if self.adaptive:
            self._levenberg_marquardt(residuals, float(loss), jacobian, k, unit)
        else:
            self._fixed(residuals, float(loss), jacobian, k, unit)
        return loss

    def _leave_out(self, counter: str, reason: str) -> None:
        self._counts[counter] += 1
        self._log.count(reason)

    @torch.no_grad()
    def _direction(self, jacobian: Jacobian, k: Tensor, damping: float) -> Direction | None:
        """Return d, or None when the damped system cannot be factored or d is not finite."""
        phi: Direction = {}
        if self.momentum:
            trained = [p for factor in jacobian.factors for p in factor.parameters]
            phi = {
                p: self.momentum * self.state[p].get("momentum_buffer", torch.zeros_like(p)) for p in trained
            }
        rho = jacobian.residuals.double()
        with torch.profiler.record_function("GaussNewton.solve"):
            y, info = solve(k, damping, rho - jacobian.times(phi) if phi else rho, return_info=True)
        if int(info) != 0:
            return None
        with torch.profiler.record_function("GaussNewton.combine"):
            direction = jacobian.transposed_times(y)
        if phi:
            direction = {p: d + phi[p] for p, d in direction.items()}
        return None if found_non_finite(list(direction.values())) else direction

    def _levenberg_marquardt(
        self, residuals: Callable[[], Any], before: float, jacobian: Jacobian, k: Tensor, unit: float
    ) -> None:
        """Take the first step that lowers the loss, with more damping after each that does not."""
        smallest = torch.finfo(jacobian.residuals.dtype).eps
        for _ in range(MAX_TRIALS):
            direction = self._direction(jacobian, k, self.damping * unit)
            if direction is not None and self._try(residuals, before, direction, 1.0):
                self.damping = max(self.damping / DECREASE, smallest)
                return
            self.damping = min(self.damping * INCREASE, LARGEST_DAMPING)
        self._leave_out("given_up_steps", f"given up after {MAX_TRIALS} trials")

    def _fixed(
        self, residuals: Callable[[], Any], before: float, jacobian: Jacobian, k: Tensor, unit: float
    ) -> None:
        # Rounding can make the system indefinite.
        ladder = (self.damping * INCREASE**i * unit for i in range(MAX_TRIALS))
        direction = next(filter(None, (self._direction(jacobian, k, damping) for damping in ladder)), None)
        if direction is None:
            self._leave_out("given_up_steps", f"given up after {MAX_TRIALS} trials")
            return
        if not self.line_search:
            self._move(direction, 1.0)
            self._finish(direction)
            return
        if not any(self._try(residuals, before, direction, 0.5**halvings) for halvings in range(MAX_TRIALS)):
            self._leave_out("given_up_steps", f"given up after {MAX_TRIALS} trials")

    # ---- the parameters ----

    def _try(
        self, residuals: Callable[[], Any], before: float, direction: Direction, fraction: float
    ) -> bool:
        """Make a step; undo it and return False when it does not lower the loss."""
        saved = {p: p.detach().clone() for p in direction}
        try:
            self._move(direction, fraction)
            lowered = float(self._linearize.value(residuals)) < before
        except BaseException:
            self._put_back(saved)
            raise
        if lowered:
            self._finish(direction)
        else:
            self._put_back(saved)
            self._counts["undone_trials"] += 1
        return lowered

    @torch.no_grad()
    def _move(self, direction: Direction, fraction: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p in direction:
                    p.add_(direction[p].to(p.dtype), alpha=-float(group["lr"]) * fraction)

    @torch.no_grad()
    def _put_back(self, saved: Direction) -> None:
        for p, value in saved.items():
            p.copy_(value)

    def _finish(self, direction: Direction) -> None:
        self._counts["steps"] += 1
        if self.momentum:
            for p, d in direction.items():
                self.state[p]["momentum_buffer"] = d

    def state_dict(self) -> dict[str, Any]:
        """Return momentum, groups and, under "gauss_newton", damping and counters."""
        return {**super().state_dict(), "gauss_newton": {"damping": self.damping, **self._counts}}

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
        check_like(own, self.stats(), "gauss_newton")
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
        self._counts = {counter: own[counter] for counter in self._counts}

    def coverage(self) -> dict[str, str]:
        """Return how the Jacobian of every parameter is found: a rule, "generic: " and why, or "unused: ".

        A parameter outside of the model goes by its place in `params`, "params[3]".
        """
        return self._linearize.coverage()

    def stats(self) -> dict[str, Any]:
        """Return the damping and counters of steps, undone trials, given up and skipped steps.

        The logger "fngd" tells of the 1st, 10th, 100th, ... given up or skipped one.
        """
        return {"damping": self.damping, **self._counts}


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
