"""One Gauss-Newton step on a Laplacian residual: captured uses against vmap(jacrev), on one CPU thread."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from tabulate import tabulate
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

import fngd
from bench import environment, record
from bench.memory import peak_memory
from bench.timing import round_robin

CPU = torch.device("cpu")
ROUNDS = 7
WARMUP = 1
DAMPING = 1e-3
# (points, dimensions of the input, width of three hidden layers)
CASES = ((100, 2, 32), (250, 5, 64), (250, 10, 64), (1000, 5, 64))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Figures are per thread; the threads of other libraries follow torch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("points", "dimensions", "width"), CASES, ids=str)
def test_gauss_newton_step(
    benchmark: BenchmarkFixture,
    points: int,
    dimensions: int,
    width: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check that both make the same step, time them in turns, measure their memory, append the rows."""
    torch.manual_seed(0)
    x = torch.rand(points, dimensions, dtype=torch.float64)
    models = {name: network(dimensions, width) for name in ("GaussNewton", "vmap(jacrev)")}
    start = flat(models["GaussNewton"])
    optimizer = fngd.GaussNewton(models["GaussNewton"], damping=DAMPING)
    steps = {
        "GaussNewton": lambda: optimizer.step(lambda: residuals(models["GaussNewton"], x)),
        "vmap(jacrev)": lambda: dense_step(models["vmap(jacrev)"], x),
    }
    for step in steps.values():
        step()
    captured, dense = (flat(models[name]) - start for name in steps)
    assert float((captured - dense).norm() / dense.norm()) < 1e-8

    rounds, warmup = (ROUNDS, WARMUP) if benchmark.enabled else (1, 0)
    timings = benchmark.pedantic(
        round_robin, args=(steps,), kwargs={"rounds": rounds, "warmup": warmup, "device": CPU}
    )
    rows = [
        {
            "contender": f"{name} step",
            "baseline": "vmap(jacrev) step",
            "ratio": timing.median / timings["vmap(jacrev)"].median,
            "median_s": timing.median,
            "p20_s": timing.p20,
            "p80_s": timing.p80,
            "rounds": len(timing.samples),
            "peak_bytes": peak_memory(steps[name], CPU),
        }
        for name, timing in timings.items()
    ]
    label = f"Laplacian of {dimensions} dimensions, {points} points, width {width}"
    with capsys.disabled():
        print(f"\n{label}\n{tabulate(rows, headers='keys', floatfmt='.4g')}")
    if benchmark.enabled:
        where = environment.describe(CPU)
        record.append(record.RESULTS / "cpu.jsonl", [{"network": label, **row, **where} for row in rows])


def network(dimensions: int, width: int) -> nn.Module:
    """A tanh network with three hidden layers, in float64; the same at every call."""
    torch.manual_seed(0)
    sizes = (dimensions, width, width, width)
    hidden = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, 1)).double()


def residuals(model: nn.Module, x: Tensor) -> Tensor:
    """Laplacian u - x_1, as users of autograd write it."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    columns = gradient.unbind(1)
    second = [torch.autograd.grad(c.sum(), x, create_graph=True)[0][:, i] for i, c in enumerate(columns)]
    return torch.stack(second).sum(0) - x[:, 0]


def dense_step(model: nn.Module, x: Tensor) -> None:
    """The same step with the whole Jacobian, as users of torch.func write it."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def residual(params: dict[str, Tensor], point: Tensor) -> Tensor:
        laplacian = torch.trace(hessian(lambda z: functional_call(model, params, (z,)).squeeze(0))(point))
        return laplacian - point[0]

    r = vmap(residual, (None, 0))(params, x)
    rows = vmap(jacrev(residual), (None, 0))(params, x)
    jacobian = torch.cat([rows[name].flatten(1) for name in params], dim=1)
    k = jacobian @ jacobian.T / len(r)
    damping = DAMPING * k.diagonal().mean()
    lower = torch.linalg.cholesky(k + damping * torch.eye(len(r), dtype=k.dtype))
    step = jacobian.T @ torch.cholesky_solve(r[:, None], lower)[:, 0] / len(r)
    parameters = list(model.parameters())
    with torch.no_grad():
        for p, part in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
            p.sub_(part.view_as(p))


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
