"""Step time and memory of every method in turns in one process; a periodic method's time is its average."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

import fngd
from bench.peers import Settings, Training, training_of
from bench.steps.networks import Batch, Network
from bench.tools.jsonl import Row
from bench.tools.peak_memory import peak_memory
from bench.tools.timing import Step, Timing, columns, round_robin

# Small enough to leave the numbers in the range where training happens.
STEP_LR = 1e-4
BASELINE = "sgd"
# In a turn on a GPU, without a wait for it in between, as in training: the host runs ahead where it can.
FEWEST_STEPS = 10


def cycle_makers(network: Network, batch: Batch, names: list[str]) -> dict[str, Callable[[], Step]]:
    """Return a function for each contender that makes its cycle of steps; FNGD is one in each phase."""
    made: dict[str, Callable[[], Step]] = {}
    for name in names:
        method = training_of(name)
        made[name] = partial(_cycle, network, batch, method, "sample")
        if method.solves == "first epoch":
            made[f"{name} solving"] = partial(_cycle, network, batch, method, "none")
    return made


def turn_length(method: Training, device: torch.device) -> int:
    """Return how many steps a method takes in a turn: whole periods, and on a GPU FEWEST_STEPS or more."""
    fewest = FEWEST_STEPS if device.type == "cuda" else 1
    return -(-fewest // method.period) * method.period


def _cycle(network: Network, batch: Batch, method: Training, share: str) -> Step:
    """Return a turn of the method's steps, whole periods of its preconditioner, warmed up."""
    model = network.build(batch[0].device)
    update = method.build(model, Settings(lr=STEP_LR, damping=method.damping, share=share))
    ids = list(range(len(batch[0])))
    length = turn_length(method, batch[0].device)

    def cycle(steps: int = length) -> None:
        for _ in range(steps):
            if isinstance(update, fngd.FNGD):
                update.set_samples(ids)
            update.zero_grad()
            network.objective(model, *batch).backward()
            update.step()

    cycle(method.warmup)
    return cycle


def measure(
    steps: Mapping[str, Step], lengths: Mapping[str, int], batch: Batch, *, rounds: int
) -> tuple[dict[str, Timing], dict[str, int]]:
    """Return seconds per step over the rounds, and peak bytes of a turn.

    Args:
        lengths: Number of steps in a contender's turn.
    """
    device = batch[0].device
    turns = round_robin(steps, rounds=rounds, warmup=1, device=device)
    timings = {
        name: Timing(tuple(seconds / lengths[name] for seconds in timing.samples))
        for name, timing in turns.items()
    }
    return timings, {name: peak_memory(step, device) for name, step in steps.items()}


def cycle_rows(timings: Mapping[str, Timing], peaks: Mapping[str, int], *, epochs: int) -> list[Row]:
    """Return a row of each contender, and of FNGD with shared coefficients one of the paper's schedule.

    Args:
        epochs: Length of a training of which FNGD solves in the first epoch only.
    """
    measured = [_row(name, timings, peaks) for name in timings]
    for name in timings:
        solving = f"{name} solving"
        if solving in timings:
            seconds = (timings[solving].median + (epochs - 1) * timings[name].median) / epochs
            measured.append(
                {
                    "contender": f"{name} average",
                    "ratio": seconds / timings[BASELINE].median,
                    "median_s": seconds,
                    "epochs": epochs,
                    "peak_bytes": max(peaks[name], peaks[solving]),
                }
            )
    return measured


def _row(name: str, timings: Mapping[str, Timing], peaks: Mapping[str, int]) -> Row:
    return {
        "contender": name,
        **columns(timings, name, BASELINE),
        "peak_bytes": peaks[name],
        "extra_bytes": peaks[name] - peaks[BASELINE],
    }
