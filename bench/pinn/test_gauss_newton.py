"""One Gauss-Newton step on a Laplacian residual: captured uses against vmap(jacrev), on one CPU thread."""

from collections.abc import Callable

import pytest
import torch

from bench.pinn import gauss_newton
from bench.tools.peak_memory import peak_memory
from bench.tools.timing import Timing

CPU = torch.device("cpu")
ROUNDS = 7
WARMUP = 1
# (points, dimensions of the input, width of three hidden layers)
CASES = ((100, 2, 32), (250, 5, 64), (250, 10, 64), (1000, 5, 64))


@pytest.mark.parametrize(("points", "dimensions", "width"), CASES, ids=str)
def test_gauss_newton_step(
    points: int,
    dimensions: int,
    width: int,
    compare: Callable[..., dict[str, Timing]],
    publish: Callable[..., None],
) -> None:
    """Check that both make the same step, time them in turns, measure their memory, append the rows."""
    steps = gauss_newton.steps(points, dimensions, width, CPU)
    timings = compare(steps, rounds=ROUNDS, warmup=WARMUP, trial_warmup=0)
    label = f"Laplacian of {dimensions} dimensions, {points} points, width {width}"
    peaks = {name: peak_memory(step, CPU) for name, step in steps.items()}
    rows = gauss_newton.step_rows(label, timings, "vmap(jacrev) step")
    publish(label, [row | {"peak_bytes": peaks[row["contender"]]} for row in rows])
