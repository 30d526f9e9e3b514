"""Steps warmed up, timed in turns and made into rows."""

from collections.abc import Mapping
from functools import partial

import torch

from bench.steps.contenders import step_makers
from bench.steps.networks import Batch, Network
from bench.tools.attempt import attempt
from bench.tools.jsonl import Row
from bench.tools.peak_memory import peak_memory
from bench.tools.timing import Step, Timing, columns, round_robin

WARMUP = 3


def prepare(
    network: Network, batch: Batch, base: str, mode: str, *, weighted: bool
) -> tuple[dict[str, Step], int]:
    """Return the contenders' steps, warmed up, and how many are missing: those that fail are named.

    Args:
        weighted: Whether FNGD is among them.
    """
    steps: dict[str, Step] = {}
    made = step_makers(network, batch, base, mode)

    def warmed_up(name: str) -> None:
        step = made[name]()
        for _ in range(WARMUP):
            step()
        steps[name] = step

    for name in made:
        if weighted or name.startswith(base):
            attempt(f"{network.name}, {mode}, {base}, {name}", partial(warmed_up, name))
    return steps, len(made) - len(steps)


def measure(
    steps: Mapping[str, Step], base: str, device: torch.device, *, rounds: int, calls: int, memory: bool
) -> list[Row]:
    """Return a row of each step, over the faster form of the base optimizer."""
    timings = round_robin(steps, rounds=rounds, warmup=1, device=device, calls=calls)
    peaks = {name: peak_memory(step, device) if memory else None for name, step in steps.items()}
    fastest = min((name for name in steps if name.startswith(base)), key=lambda name: timings[name].median)
    return step_rows(timings, peaks, dict.fromkeys(steps, fastest))


def step_rows(
    timings: Mapping[str, Timing], peaks: Mapping[str, int | None], baselines: Mapping[str, str]
) -> list[Row]:
    """Return a row of each contender; ratio and extra memory are over its baseline."""
    return [
        {
            "contender": name,
            "baseline": baseline,
            **columns(timings, name, baseline),
            "peak_bytes": peaks[name],
            "extra_bytes": _excess(peaks[name], peaks[baseline]),
        }
        for name, baseline in baselines.items()
    ]


def _excess(bytes_: int | None, over: int | None) -> int | None:
    return None if bytes_ is None or over is None else bytes_ - over
