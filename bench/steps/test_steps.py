"""Whole-model Gram matrices, solving and steady-state steps against plain ones, on one CPU thread."""

from collections.abc import Callable

import pytest
import torch

import fngd
from bench.steps import gate
from bench.steps.contenders import step_makers
from bench.steps.measure import WARMUP, step_rows
from bench.steps.networks import RESNET, TRANSFORMER, Batch, Network
from bench.tools.peak_memory import peak_memory
from bench.tools.timing import Step, Timing

CPU = torch.device("cpu")
ROUNDS = 25
CPU_SKETCH = 16
BASELINES = {
    "forward + backward": "forward + backward",
    "layer Grams": "forward + backward",
    "layer Grams, sketched": "forward + backward",
    "SGD step": "SGD step",
    "FNGD solving step": "SGD step",
    "FNGD sketched step": "SGD step",
    "FNGD steady-state step": "SGD step",
}


@pytest.mark.parametrize("network", [RESNET, TRANSFORMER], ids=["resnet", "transformer"])
def test_steps(
    network: Network,
    compare: Callable[..., dict[str, Timing]],
    publish: Callable[..., None],
) -> None:
    """Check the numerics, time all contenders in turns, measure their memory, append the rows."""
    batch = network.draw(CPU)
    gate.check(network, batch)
    steps = calls(network, batch)
    timings = compare(steps, rounds=ROUNDS, warmup=WARMUP, trial_warmup=2)
    peaks = {name: peak_memory(step, CPU) for name, step in steps.items()}
    rows = step_rows(timings, peaks, BASELINES)
    publish(network.name, rows, {"network": network.name})


def calls(network: Network, batch: Batch) -> dict[str, Step]:
    """Return one call of each kind, on equal models of their own."""
    made = step_makers(network, batch, "sgd", "eager")
    plain, grams, sketched = (network.build(CPU) for _ in range(3))

    def forward_backward() -> None:
        plain.zero_grad()
        network.objective(plain, *batch).backward()

    return {
        "forward + backward": forward_backward,
        "layer Grams": lambda: fngd.layer_grams(grams, lambda: network.objective(grams, *batch)),
        "layer Grams, sketched": lambda: fngd.layer_grams(
            sketched, lambda: network.objective(sketched, *batch), sketch=CPU_SKETCH
        ),
        "SGD step": made["sgd"](),
        "FNGD solving step": made["fngd solving"](),
        "FNGD sketched step": made["fngd sketched"](),
        "FNGD steady-state step": made["fngd steady"](),
    }
