"""Whole-model Gram matrices, solving and steady-state steps against plain ones, on one CPU thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from tabulate import tabulate

import fngd
from bench import environment, gate, record
from bench.memory import peak_memory
from bench.networks import RESNET, TRANSFORMER, Network
from bench.timing import Step, Timing, round_robin, training_step

CPU = torch.device("cpu")
ROUNDS = 25
WARMUP = 3
# the same for all and small enough to leave the numbers in the range where training happens
LR = 1e-3
MOMENTUM = 0.9
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
    torch.manual_seed(0)
    x, y = network.batch()
    gate.check(network, x, y)
    steps = contenders(network, x, y)
    rounds, warmup = (ROUNDS, WARMUP) if benchmark.enabled else (1, 2)
    timings = benchmark.pedantic(
        round_robin, args=(steps,), kwargs={"rounds": rounds, "warmup": warmup, "device": CPU}
    )
    peaks = {name: peak_memory(step, CPU) for name, step in steps.items()}
    table = rows(timings, peaks)
    benchmark.extra_info.update({row["contender"]: row for row in table})
    with capsys.disabled():
        print(f"\n{network.name}\n{tabulate(table, headers='keys', floatfmt='.4g')}")
    if benchmark.enabled:
        where = environment.describe(CPU)
        record.append(
            record.RESULTS / "cpu.jsonl", [{"network": network.name, **row, **where} for row in table]
        )


def contenders(network: Network, x: torch.Tensor, y: torch.Tensor) -> dict[str, Step]:
    """One call of each kind, on equal models of their own."""

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return network.model()

    plain, grams = model(), model()

    def forward_backward() -> None:
        plain.zero_grad()
        network.loss(plain(x), y).backward()

    def fngd_step(share: str) -> Step:
        trained = model()
        optimizer = fngd.FNGD(trained, lr=LR, momentum=MOMENTUM, share=share)
        ids = torch.arange(len(x)) if share == "sample" else None
        return training_step(trained, optimizer, network.loss, x, y, ids=ids)

    trained = model()
    sgd = torch.optim.SGD(trained.parameters(), lr=LR, momentum=MOMENTUM)
    return {
        "forward + backward": forward_backward,
        "layer Grams": lambda: fngd.layer_grams(grams, lambda: network.loss(grams(x), y)),
        "SGD step": training_step(trained, sgd, network.loss, x, y),
        "FNGD solving step": fngd_step("none"),
        # the warm-up's first call solves and fills the table, every later one reads it
        "FNGD steady-state step": fngd_step("sample"),
    }


def rows(timings: dict[str, Timing], peaks: dict[str, int]) -> list[dict[str, str | float | int]]:
    """One row per contender; ratio and extra memory are over its baseline."""
    return [
        {
            "contender": name,
            "baseline": baseline,
            "ratio": timings[name].median / timings[baseline].median,
            "median_s": timings[name].median,
            "p20_s": timings[name].p20,
            "p80_s": timings[name].p80,
            "rounds": len(timings[name].samples),
            "peak_bytes": peaks[name],
            "extra_bytes": peaks[name] - peaks[baseline],
        }
        for name, baseline in BASELINES.items()
    ]
