"""The damped solve against torch.linalg on batches of small systems, on one CPU thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from tabulate import tabulate

from bench.kernels import solves
from bench.tools import environment, jsonl
from bench.tools.timing import round_robin
from fngd_kernels import native

CPU = torch.device("cpu")
ROUNDS = 31
WARMUP = 3
SHAPES = ((20, 64), (20, 128), (8, 256), (1, 1024))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Figures are per thread; the threads of other libraries follow torch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not native.AVAILABLE, reason="the native extension is not built")
@pytest.mark.parametrize("kind", solves.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("batch", "order"), SHAPES, ids=[f"{b}x{n}" for b, n in SHAPES])
def test_solve(
    benchmark: BenchmarkFixture,
    kind: str,
    batch: int,
    order: int,
    dtype: torch.dtype,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check the results, time both in turns, append the rows."""
    case = solves.make(kind, batch, order, dtype, CPU)
    errors = case.check()
    rounds, warmup = (ROUNDS, WARMUP) if benchmark.enabled else (1, 1)
    timings = benchmark.pedantic(
        round_robin, args=(case.contenders,), kwargs={"rounds": rounds, "warmup": warmup, "device": CPU}
    )
    rows = solves.rows(case, timings, errors)
    benchmark.extra_info.update({row["contender"]: row for row in rows})
    with capsys.disabled():
        print(f"\n{tabulate(rows, headers='keys', floatfmt='.4g')}")
    if benchmark.enabled:
        where = environment.describe(CPU)
        jsonl.append(jsonl.RESULTS / "cpu.jsonl", [{**row, **where} for row in rows])
