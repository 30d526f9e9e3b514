"""The methods compared: each tries equally many settings, and takes steps within a budget of seconds."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import fngd
from bench.pinn.problems import Points, Problem, Regression, mean_squares
from bench.pinn.problems.base import Residuals

# few enough iterations a call to keep the clock in view
LBFGS_ITERATIONS = 20

Setting = dict[str, float]
# share of the budget that is spent -> number of iterations done
Step = Callable[[float], int]


@dataclass(frozen=True)
class Task:
    """A network and the residuals it is to make small."""

    problem: Problem
    network: nn.Module
    points: Points

    @classmethod
    def of(cls, problem: Problem, seed: int) -> Task:
        """Training points and initial network of `seed`."""
        torch.manual_seed(seed)
        return cls(problem, problem.network(), problem.points(seed))

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters."""
        return list(self.network.parameters())

    def residuals(self) -> Residuals:
        """Residuals at the training points."""
        return self.problem.residuals(self.network, self.points)

    def backward(self) -> Tensor:
        """Loss, its gradient left in `.grad`."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = mean_squares(self.residuals())
        # without `inputs` the gradient at the points would be formed as well
        loss.backward(inputs=self.parameters)
        return loss


@dataclass(frozen=True)
class Method:
    """How a method is named, what is tuned, and how it is set up.

    package: import name of the library it comes from, if that is an optional one.
    regression_only: it cannot take residuals that contain derivatives of the network.
    """

    label: str
    settings: tuple[Setting, ...]
    build: Callable[..., Step]
    package: str | None = None
    regression_only: bool = False

    def obstacle(self, problem: Problem) -> str | None:
        """Why the method cannot run on `problem`; None when it can."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.regression_only and not isinstance(problem, Regression):
            return "it differentiates by torch.func, where autograd.grad inside the residuals is refused"
        return None


def _cosine(optimizer: torch.optim.Optimizer, lr: float, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def _first_order(task: Task, optimizer: torch.optim.Optimizer, lr: float) -> Step:
    def step(share: float) -> int:
        _cosine(optimizer, lr, share)
        task.backward()
        optimizer.step()
        return 1

    return step


def _adam(task: Task, *, lr: float) -> Step:
    return _first_order(task, torch.optim.Adam(task.parameters, lr=lr, fused=True), lr)


def _soap(task: Task, *, lr: float) -> Step:
    soap = importlib.import_module("pytorch_optimizer").SOAP
    return _first_order(task, soap(task.parameters, lr=lr, weight_decay=0.0), lr)


def _lbfgs(task: Task, *, history: float) -> Step:
    # tolerances of 0: it goes on as long as a step can be found, like the other methods
    optimizer = torch.optim.LBFGS(
        task.parameters,
        max_iter=LBFGS_ITERATIONS,
        history_size=int(history),
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    state = optimizer.state[task.parameters[0]]

    def step(_: float) -> int:
        before = state.get("n_iter", 0)
        optimizer.step(lambda: task.backward().item())  # type: ignore[arg-type, return-value]
        return state["n_iter"] - before

    return step


def _adam_then_lbfgs(task: Task, *, lr: float, adam_share: float) -> Step:
    adam, lbfgs = _adam(task, lr=lr), _lbfgs(task, history=100)

    def step(share: float) -> int:
        return adam(share / adam_share) if share < adam_share else lbfgs(share)

    return step


def _levenberg_marquardt(task: Task, *, damping: float) -> Step:
    library: Any = importlib.import_module("torch_levenberg_marquardt")
    trainer = library.training.LevenbergMarquardtModule(
        task.network,
        damping_strategy=library.damping.StandardDampingStrategy(starting_value=damping),
        solve_method="cholesky",
    )

    def step(_: float) -> int:
        trainer.training_step(task.points["x"], task.points["y"].unsqueeze(1))
        return 1

    return step


def _gauss_newton(task: Task, *, damping: float) -> Step:
    optimizer = fngd.GaussNewton(task.network, damping="lm", initial_damping=damping)

    def step(_: float) -> int:
        optimizer.step(task.residuals)
        return 1

    return step


METHODS = {
    "adam": Method("Adam", tuple({"lr": lr} for lr in (3e-3, 1e-2, 3e-2, 1e-1)), _adam),
    "adam-lbfgs": Method(
        "Adam, then L-BFGS",
        tuple({"lr": lr, "adam_share": share} for lr in (3e-3, 1e-2) for share in (0.1, 0.4)),
        _adam_then_lbfgs,
    ),
    "lbfgs": Method("L-BFGS", tuple({"history": size} for size in (10, 30, 100, 300)), _lbfgs),
    "soap": Method(
        "SOAP", tuple({"lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2)), _soap, package="pytorch_optimizer"
    ),
    "levenberg-marquardt": Method(
        "torch-levenberg-marquardt",
        tuple({"damping": damping} for damping in (1e-4, 1e-3, 1e-2, 1e-1)),
        _levenberg_marquardt,
        package="torch_levenberg_marquardt",
        regression_only=True,
    ),
    "gauss-newton": Method(
        "GaussNewton", tuple({"damping": damping} for damping in (0.1, 1.0, 10.0, 100.0)), _gauss_newton
    ),
}
