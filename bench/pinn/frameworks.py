"""`python -m bench.pinn.frameworks`: examples of frameworks for equations, by their ways and by GaussNewton.

Every installed framework trains an example of its documentation in float64, three times for the same CPU
seconds: with Adam, with Adam for a third of them and then L-BFGS, and with `fngd.contrib`. Points and
networks are the same in all three, and so small that one CPU thread makes some hundred steps.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor

from bench.tools.arguments import positive_float

Train = Callable[[str, Callable[[], bool]], None]
"""Trains by "adam", "lbfgs" or "gauss-newton" until the function returns True."""
Example = tuple[Train, Callable[[], float]]
"""How it is trained, and its relative L2 error at fresh points."""

METHODS = {
    "Adam": [("adam", 1.0)],
    "Adam, then L-BFGS": [("adam", 1 / 3), ("lbfgs", 1.0)],
    "GaussNewton": [("gauss-newton", 1.0)],
}
"""Phases, each until a share of the seconds is over."""
ENDLESS = 10**7


def deepxde() -> Example:
    """Return Burgers' equation: examples/pinn_forward/Burgers.py."""
    os.environ["DDE_BACKEND"] = "pytorch"
    import deepxde as dde

    from fngd.contrib.deepxde import GaussNewton

    dde.config.set_default_float("float64")
    dde.config.set_random_seed(1)

    def equation(x: Tensor, y: Tensor) -> Tensor:
        y_x, y_t = dde.grad.jacobian(y, x, i=0, j=0), dde.grad.jacobian(y, x, i=0, j=1)
        return y_t + y * y_x - 0.01 / math.pi * dde.grad.hessian(y, x, i=0, j=0)

    domain = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 0.99))
    conditions = [
        dde.icbc.DirichletBC(domain, lambda x: 0, lambda _, on_boundary: on_boundary),
        dde.icbc.IC(
            domain,
            lambda x: -torch.sin(math.pi * torch.as_tensor(x[:, :1])).numpy(),
            lambda _, on_initial: on_initial,
        ),
    ]
    points = {"num_domain": 1000, "num_boundary": 80, "num_initial": 160}
    data = dde.data.TimePDE(domain, equation, conditions, **points)
    model = dde.Model(data, dde.nn.FNN([2, 20, 20, 20, 1], "tanh", "Glorot normal"))

    def train(method: str, over: Callable[[], bool]) -> None:
        class Clock(dde.callbacks.Callback):
            def on_batch_end(self) -> None:
                if over():
                    self.model.stop_training = True

        if method == "adam":
            model.compile("adam", lr=1e-3)
        elif method == "lbfgs":
            dde.optimizers.set_LBFGS_options(maxiter=ENDLESS, ftol=0, gtol=0)
            dde.optimizers.config.LBFGS_options.update(iter_per_step=50, fun_per_step=100)
            model.compile("L-BFGS")
        else:
            model.compile(GaussNewton(model))
        count = {} if method == "lbfgs" else {"iterations": ENDLESS}
        model.train(**count, callbacks=[Clock()], display_every=ENDLESS, verbose=0)

    def error() -> float:
        x, t = torch.linspace(-1, 1, 201), torch.linspace(0.01, 0.99, 50)
        at = torch.cartesian_prod(x, t)
        return _relative(model.net(at)[:, 0], _burgers(*at.T))

    return train, error


def _burgers(x: Tensor, t: Tensor) -> Tensor:
    """Return the solution, by the Cole-Hopf transformation and a quadrature."""
    z = torch.linspace(-12, 12, 2401)
    y = x[:, None] - z * (4 * 0.01 / math.pi * t[:, None]).sqrt()
    logits = -z.square() - torch.cos(math.pi * y) / 0.02
    return -(logits.softmax(1) * torch.sin(math.pi * y)).sum(1)


def pina() -> Example:
    """Return Poisson's equation: their tutorial on physics-informed networks."""
    from pina import Condition, Trainer
    from pina.domain import CartesianDomain
    from pina.equation import Equation, FixedValue
    from pina.model import FeedForward
    from pina.operator import laplacian
    from pina.optim import TorchOptimizer
    from pina.problem import SpatialProblem
    from pina.solver import PINN

    from fngd.contrib.pina import GaussNewton

    def equation(input_: Any, output_: Any) -> Any:
        x, y = input_["x"], input_["y"]
        force = torch.sin(x * torch.pi) * torch.sin(y * torch.pi)
        return laplacian(output_, input_, components=["u"], d=["x", "y"]) - force

    class Poisson(SpatialProblem):
        output_variables = ["u"]  # noqa: RUF012
        spatial_domain = CartesianDomain({"x": [0, 1], "y": [0, 1]})
        domains = {"border": spatial_domain.partial(), "D": spatial_domain}  # noqa: RUF012
        conditions = {  # noqa: RUF012
            "border": Condition(domain="border", equation=FixedValue(0.0)),
            "D": Condition(domain="D", equation=Equation(equation)),
        }

    problem = Poisson()
    problem.discretise_domain(25, "grid", domains="D")
    problem.discretise_domain(25, "grid", domains="border")
    model = FeedForward(input_dimensions=2, output_dimensions=1, layers=[10, 10], func=torch.nn.Softplus)
    optimizers = {
        "adam": lambda: TorchOptimizer(torch.optim.Adam, lr=0.006, weight_decay=1e-8),
        "lbfgs": lambda: TorchOptimizer(torch.optim.LBFGS, line_search_fn="strong_wolfe", history_size=100),
        "gauss-newton": lambda: GaussNewton(model),
    }

    def train(method: str, over: Callable[[], bool]) -> None:
        from lightning.pytorch.callbacks import Callback

        solver = PINN(problem, model, optimizer=optimizers[method]())
        Trainer(solver, max_epochs=ENDLESS, callbacks=[_lightning_clock(Callback, over)], **QUIET).train()

    def error() -> float:
        x = torch.rand(2000, 2)
        return _relative(model(x)[:, 0], -torch.sin(torch.pi * x).prod(1) / (2 * torch.pi**2))

    return train, error


def torchphysics() -> Example:
    """Return Helmholtz' equation: their tutorial on solving a differential equation."""
    import pytorch_lightning
    import torchphysics as tp

    from fngd.contrib.torchphysics import GaussNewton

    x_space, u_space = tp.spaces.R2("x"), tp.spaces.R1("u")
    square = tp.domains.Parallelogram(x_space, [0, 0], [1, 0], [0, 1])
    model = tp.models.FCN(x_space, u_space, hidden=(30, 30, 30))

    def solution(x: Tensor) -> Tensor:
        return torch.sin(torch.pi / 2 * x[:, :1]) * torch.cos(2 * torch.pi * x[:, 1:])

    conditions = [
        tp.conditions.PINNCondition(
            model,
            tp.samplers.RandomUniformSampler(square, n_points=800).make_static(),
            lambda u, x: tp.utils.laplacian(u, x) + 4.25 * torch.pi**2 * u,
            name="equation",
        ),
        tp.conditions.PINNCondition(
            model,
            tp.samplers.GridSampler(square.boundary, n_points=200).make_static(),
            lambda u, x: u - solution(x),
            weight=10,
            name="boundary",
        ),
    ]
    settings = {
        "adam": lambda: tp.OptimizerSetting(torch.optim.Adam, lr=1e-3),
        "lbfgs": lambda: tp.OptimizerSetting(
            torch.optim.LBFGS, lr=1.0, optimizer_args={"line_search_fn": "strong_wolfe", "history_size": 100}
        ),
        "gauss-newton": lambda: GaussNewton(conditions),
    }

    def train(method: str, over: Callable[[], bool]) -> None:
        solver = tp.solver.Solver(conditions, optimizer_setting=settings[method]())
        clock = _lightning_clock(pytorch_lightning.Callback, over)
        pytorch_lightning.Trainer(max_steps=ENDLESS, callbacks=[clock], **QUIET).fit(solver)

    def error() -> float:
        x = torch.rand(2000, 2)
        return _relative(model(tp.spaces.Points(x, x_space)).as_tensor, solution(x))

    return train, error


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def _lightning_clock(callback: Any, over: Callable[[], bool]) -> Any:
    """Return a callback of Lightning, which goes by two names, that stops training."""

    class Clock(callback):
        def on_train_batch_end(self, trainer: Any, *unused: Any) -> None:
            if over():
                trainer.should_stop = True

    return Clock()


def neurodiffeq() -> Example:
    """Return Laplace's equation, whose points are redrawn about a grid: their introduction to PDEs."""
    from neurodiffeq import diff
    from neurodiffeq.conditions import DirichletBVP2D
    from neurodiffeq.generators import Generator2D
    from neurodiffeq.networks import FCNN
    from neurodiffeq.solvers import Solver2D

    from fngd.contrib.neurodiffeq import GaussNewton

    walls = DirichletBVP2D(
        x_min=0.0,
        x_min_val=lambda y: torch.sin(math.pi * y),
        x_max=1.0,
        x_max_val=lambda y: 0,
        y_min=0.0,
        y_min_val=lambda x: 0,
        y_max=1.0,
        y_max_val=lambda x: 0,
    )
    grid = Generator2D((24, 24), (0, 0), (1, 1), method="equally-spaced-noisy")
    solver = Solver2D(
        lambda u, x, y: [diff(u, x, order=2) + diff(u, y, order=2)],
        [walls],
        nets=[FCNN(2, 1, hidden_units=(32, 32))],
        train_generator=grid,
        valid_generator=grid,
        n_batches_valid=0,
    )

    def train(method: str, over: Callable[[], bool]) -> None:
        parameters = list(solver.nets[0].parameters())
        if method == "adam":
            solver.optimizer = torch.optim.Adam(parameters)
        elif method == "lbfgs":
            solver.optimizer = _ClosureLbfgs(parameters, line_search_fn="strong_wolfe", history_size=100)
        else:
            solver.optimizer = GaussNewton(solver)

        def clock(solver: Any) -> None:
            solver._stop_training = over()

        solver.fit(ENDLESS, callbacks=[clock], tqdm_file=None)

    def error() -> float:
        x, y = torch.rand(2, 2000, 1)
        expected = torch.sin(math.pi * y) * torch.sinh(math.pi * (1 - x)) / math.sinh(math.pi)
        return _relative(solver.get_solution(best=False)(x, y), expected)

    return train, error


class _ClosureLbfgs(torch.optim.LBFGS):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        """Make a step; neurodiffeq hands a closure to an optimizer that has no default for it."""
        return super().step(closure)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "deepxde": deepxde,
    "pina": pina,
    "torchphysics": torchphysics,
    "neurodiffeq": neurodiffeq,
}


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.norm())


def conduct(framework: str, method: str, seconds: float) -> tuple[float, float]:
    """Train a framework's example; return its relative error and the CPU seconds of training."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    train, error = EXAMPLES[framework]()
    start = time.process_time()
    for phase, share in METHODS[method]:
        train(phase, lambda share=share: time.process_time() - start > share * seconds)  # type: ignore[misc]
    spent = time.process_time() - start
    torch.manual_seed(2)
    return error(), spent


def main(argv: list[str] | None = None) -> int:
    """Run the examples and print a table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.pinn.frameworks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seconds", type=positive_float, default=30.0, help="CPU seconds of each run (default: 30)"
    )
    parser.add_argument(
        "--framework", choices=EXAMPLES, action="append", help="repeatable (default: those installed)"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for framework in options.framework or EXAMPLES:
        if importlib.util.find_spec(framework) is None:
            print(f"{framework:12s} not installed: pip install 'fngd[equations]'")
            continue
        for method in METHODS:
            with redirect_stdout(sys.stderr):
                error, spent = conduct(framework, method, options.seconds)
            print(
                f"{framework:12s} {method:18s} error {error:.2e} after {spent:5.1f} CPU s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
