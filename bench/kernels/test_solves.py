"""The damped solve against torch.linalg on batches of small systems, on one CPU thread."""

from collections.abc import Callable

import pytest
import torch

from bench.kernels import solves
from bench.tools.timing import Timing
from fngd_kernels import native

CPU = torch.device("cpu")
ROUNDS = 31
WARMUP = 3
SHAPES = ((20, 64), (20, 128), (8, 256), (1, 1024))


@pytest.mark.skipif(not native.AVAILABLE, reason="the native extension is not built")
@pytest.mark.parametrize("kind", solves.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("batch", "order"), SHAPES, ids=[f"{b}x{n}" for b, n in SHAPES])
def test_solve(
    kind: str,
    batch: int,
    order: int,
    dtype: torch.dtype,
    compare: Callable[..., dict[str, Timing]],
    publish: Callable[..., None],
) -> None:
    """Check the results, time both in turns, append the rows."""
    case = solves.make(kind, batch, order, dtype, CPU)
    errors = case.check()
    timings = compare(case.contenders, rounds=ROUNDS, warmup=WARMUP, trial_warmup=1)
    publish(case.name, solves.solve_rows(case, timings, errors))
