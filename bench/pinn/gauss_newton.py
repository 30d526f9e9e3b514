"""Where the time of a Gauss-Newton step goes: `python -m bench.pinn.gauss_newton --device cuda`."""

import argparse
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

import fngd
from bench.tools import environment, jsonl
from bench.tools.jsonl import Row
from bench.tools.timing import Step, Timing, columns, round_robin
from fngd.gauss_newton.direct import ParameterSystem, SampleSystem
from fngd.gauss_newton.jacobian import Jacobian
from fngd.gauss_newton.ranks import Ranks

DAMPING = 1e-3
# Points of the gate, which forms the whole Jacobian.
GATE_POINTS = 100


def network(
    dimensions: int, width: int, device: torch.device, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """Return a tanh network with three hidden layers, the same at every call."""
    torch.manual_seed(0)
    sizes = (dimensions, width, width, width)
    hidden = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, 1)).to(device, dtype)


def residuals(model: nn.Module, x: Tensor) -> Tensor:
    """Return the Laplacian of u minus x_1, as users of autograd write it."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    columns = gradient.unbind(1)
    second = [torch.autograd.grad(c.sum(), x, create_graph=True)[0][:, i] for i, c in enumerate(columns)]
    return torch.stack(second).sum(0) - x[:, 0]


def dense_step(model: nn.Module, x: Tensor) -> None:
    """Take the same step with the whole Jacobian, as users of torch.func write it."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def residual(params: dict[str, Tensor], point: Tensor) -> Tensor:
        laplacian = torch.trace(hessian(lambda z: functional_call(model, params, (z,)).squeeze(0))(point))
        return laplacian - point[0]

    r = vmap(residual, (None, 0))(params, x)
    rows = vmap(jacrev(residual), (None, 0))(params, x)
    jacobian = torch.cat([rows[name].flatten(1) for name in params], dim=1)
    k = jacobian @ jacobian.T / len(r)
    damping = DAMPING * k.diagonal().mean()
    lower = torch.linalg.cholesky(k + damping * torch.eye(len(r), dtype=k.dtype, device=k.device))
    step = jacobian.T @ torch.cholesky_solve(r[:, None], lower)[:, 0] / len(r)
    parameters = list(model.parameters())
    with torch.no_grad():
        for p, part in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
            p.sub_(part.view_as(p))


def flat(model: nn.Module) -> Tensor:
    """Return all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def steps(points: int, dimensions: int, width: int, device: torch.device) -> dict[str, Step]:
    """Return a step of GaussNewton and one by vmap(jacrev), on equal networks of their own.

    Raises:
        AssertionError: When they are not the same step.
    """
    x = torch.rand(points, dimensions, dtype=torch.float64, device=device)
    captured, dense = network(dimensions, width, device), network(dimensions, width, device)
    start = flat(captured)
    optimizer = fngd.GaussNewton(captured, damping=DAMPING)
    both: dict[str, Step] = {
        "GaussNewton step": lambda: optimizer.step(lambda: residuals(captured, x)),
        "vmap(jacrev) step": lambda: dense_step(dense, x),
    }
    for step in both.values():
        step()
    expected = flat(dense) - start
    error = float((flat(captured) - start - expected).norm() / expected.norm())
    if not error < 1e-8:
        raise AssertionError(f"the steps differ by {error:.1e}")
    return both


def phases(
    points: int, dimensions: int, width: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Step]:
    """Return a whole step, and each of its phases alone."""
    x = torch.rand(points, dimensions, dtype=dtype, device=device)
    model = network(dimensions, width, device, dtype)
    optimizer = fngd.GaussNewton(model, damping=DAMPING)

    def linearize() -> Jacobian:
        return optimizer._linearize(lambda: residuals(model, x))

    jacobian = linearize()

    def solved_by() -> SampleSystem | ParameterSystem:
        if points < jacobian.shape[1]:
            return SampleSystem(jacobian)
        return ParameterSystem(jacobian, Ranks(None))

    formed = solved_by()
    lam = DAMPING * formed.squared_norm / points
    solve = formed.damped(lam)
    assert solve is not None
    return {
        "step": lambda: optimizer.step(lambda: residuals(model, x)),
        "residuals and Jacobian": linearize,
        "Gram": solved_by,
        "factor": lambda: formed.damped(lam),
        "solve": lambda: solve(jacobian.residuals),
    }


def step_rows(label: str, timings: Mapping[str, Timing], baseline: str) -> list[Row]:
    """Return a row of each step or phase."""
    return [
        {
            "network": label,
            "contender": name,
            "baseline": baseline,
            **columns(timings, name, baseline),
        }
        for name in timings
    ]


def main(argv: list[str] | None = None) -> None:
    """Time the phases of every case; append the rows as they come."""
    parser = argparse.ArgumentParser(prog="python -m bench.pinn.gauss_newton", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--points", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--width", type=int, default=64, help="of three hidden layers (default: 64)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSONL file to append to (default: none)")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    for dimensions in options.dimensions:
        steps(GATE_POINTS, dimensions, options.width, device)
        for points in options.points:
            for dtype in (torch.float64, torch.float32):
                contenders = phases(points, dimensions, options.width, device, dtype)
                timings = round_robin(contenders, rounds=options.rounds, warmup=1, device=device)
                label = (
                    f"Laplacian of {dimensions} dimensions, {points} points, width {options.width}, "
                    f"{str(dtype).removeprefix('torch.')}"
                )
                table = step_rows(label, timings, "step")
                print(f"\n{label}\n{tabulate(table, headers='keys', floatfmt='.4g')}", flush=True)
                if options.output is not None:
                    jsonl.append(options.output, [row | environment.describe(device) for row in table])


if __name__ == "__main__":
    main()
