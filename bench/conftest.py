"""What the benchmarks that pytest runs have in common: `make bench`, one CPU thread."""

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from tabulate import tabulate

from bench.tools import environment, jsonl
from bench.tools.jsonl import Row
from bench.tools.timing import Step, Timing, round_robin

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Measure on one thread: figures are per thread, and the threads of other libraries follow torch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compare(benchmark: BenchmarkFixture) -> Callable[..., dict[str, Timing]]:
    """Return what times contenders in turns: with --benchmark-enable over all rounds, else once."""

    def run(steps: Mapping[str, Step], *, rounds: int, warmup: int, trial_warmup: int) -> dict[str, Timing]:
        rounds, warmup = (rounds, warmup) if benchmark.enabled else (1, trial_warmup)
        options = {"rounds": rounds, "warmup": warmup, "device": CPU}
        return benchmark.pedantic(round_robin, args=(steps,), kwargs=options)

    return run


@pytest.fixture
def publish(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Return what shows rows and, with --benchmark-enable, appends them with `common` to cpu.jsonl."""

    def run(title: str, rows: list[Row], common: Row | None = None) -> None:
        benchmark.extra_info.update({row["contender"]: row for row in rows})
        with capsys.disabled():
            print(f"\n{title}\n{tabulate(rows, headers='keys', floatfmt='.4g')}")
        if benchmark.enabled:
            where = environment.describe(CPU)
            jsonl.append(jsonl.RESULTS / "cpu.jsonl", [{**(common or {}), **row, **where} for row in rows])

    return run
