"""One Gauss-Newton step on a Laplacian residual: captured uses against vmap(jacrev), on one CPU thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from tabulate import tabulate

from bench.pinn import gauss_newton
from bench.tools import environment, jsonl
from bench.tools.peak_memory import peak_memory
from bench.tools.timing import round_robin

CPU = torch.device("cpu")
ROUNDS = 7
WARMUP = 1
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
    steps = gauss_newton.steps(points, dimensions, width, CPU)
    rounds, warmup = (ROUNDS, WARMUP) if benchmark.enabled else (1, 0)
    timings = benchmark.pedantic(
        round_robin, args=(steps,), kwargs={"rounds": rounds, "warmup": warmup, "device": CPU}
    )
    label = f"Laplacian of {dimensions} dimensions, {points} points, width {width}"
    peaks = {name: peak_memory(step, CPU) for name, step in steps.items()}
    rows = [
        row | {"peak_bytes": peaks[str(row["contender"])]}
        for row in gauss_newton.rows(label, timings, "vmap(jacrev) step")
    ]
    with capsys.disabled():
        print(f"\n{label}\n{tabulate(rows, headers='keys', floatfmt='.4g')}")
    if benchmark.enabled:
        where = environment.describe(CPU)
        jsonl.append(jsonl.RESULTS / "cpu.jsonl", [row | where for row in rows])
