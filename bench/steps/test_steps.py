"""Whole-model Gram matrices, solving and steady-state steps against plain ones, on one CPU thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from tabulate import tabulate

import fngd
from bench.steps import gate
from bench.steps.__main__ import rows
from bench.steps.contenders import contenders
from bench.steps.networks import RESNET, TRANSFORMER, Batch, Network
from bench.tools import environment, jsonl
from bench.tools.peak_memory import peak_memory
from bench.tools.timing import Step, round_robin

CPU = torch.device("cpu")
ROUNDS = 25
WARMUP = 3
BASELINES = {
    "forward + backward": "forward + backward",
    "layer Grams": "forward + backward",
    "SGD step": "SGD step",
    "FNGD solving step": "SGD step",
    "FNGD steady-state step": "SGD step",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Figures are per thread; the threads of other libraries follow torch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("network", [RESNET, TRANSFORMER], ids=["resnet", "transformer"])
def test_steps(benchmark: BenchmarkFixture, network: Network, capsys: pytest.CaptureFixture[str]) -> None:
    """Check the numerics, time all contenders in turns, measure their memory, append the rows."""
    batch = network.draw(CPU)
    gate.check(network, batch)
    steps = calls(network, batch)
    rounds, warmup = (ROUNDS, WARMUP) if benchmark.enabled else (1, 2)
    timings = benchmark.pedantic(
        round_robin, args=(steps,), kwargs={"rounds": rounds, "warmup": warmup, "device": CPU}
    )
    peaks = {name: peak_memory(step, CPU) for name, step in steps.items()}
    table = rows(timings, peaks, BASELINES)
    benchmark.extra_info.update({row["contender"]: row for row in table})
    with capsys.disabled():
        print(f"\n{network.name}\n{tabulate(table, headers='keys', floatfmt='.4g')}")
    if benchmark.enabled:
        where = environment.describe(CPU)
        jsonl.append(
            jsonl.RESULTS / "cpu.jsonl", [{"network": network.name, **row, **where} for row in table]
        )


def calls(network: Network, batch: Batch) -> dict[str, Step]:
    """One call of each kind, on equal models of their own."""
    made = contenders(network, batch, "sgd", "eager")
    plain, grams = network.build(CPU), network.build(CPU)

    def forward_backward() -> None:
        plain.zero_grad()
        network.objective(plain, *batch).backward()

    return {
        "forward + backward": forward_backward,
        "layer Grams": lambda: fngd.layer_grams(grams, lambda: network.objective(grams, *batch)),
        "SGD step": made["sgd"](),
        "FNGD solving step": made["fngd solving"](),
        "FNGD steady-state step": made["fngd steady"](),
    }
