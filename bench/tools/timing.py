"""Interleaved timing: contenders take turns in one process, so that drift of the machine hits all alike."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender over the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median, in seconds."""
        return statistics.median(self.samples)

    @property
    def p20(self) -> float:
        """Return the 20th percentile, in seconds."""
        return _percentile(self.samples, 20)

    @property
    def p80(self) -> float:
        """Return the 80th percentile, in seconds."""
        return _percentile(self.samples, 80)


def round_robin(
    contenders: Mapping[str, Step], *, rounds: int, warmup: int, device: torch.device, calls: int = 1
) -> dict[str, Timing]:
    """Give every contender a turn each round, in a new order each round, and time a call.

    Args:
        calls: In one turn, without waiting for the device in between, as in training: the host runs
            ahead where the contender lets it.

    Raises:
        ValueError: When rounds or calls is below 1.
    """
    for name, value in (("rounds", rounds), ("calls", calls)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(warmup + rounds):
            for name in order.sample(list(contenders), len(contenders)):
                seconds = _timed(contenders[name], device, calls)
                if turn >= warmup:
                    samples[name].append(seconds)
            # The youngest generation only: a full collection takes longer than many steps.
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def columns(timings: Mapping[str, Timing], name: str, baseline: str) -> dict[str, Any]:
    """Return what every row says about time: the ratio to the baseline's, seconds of a call, rounds."""
    timing = timings[name]
    return {
        "ratio": timing.median / timings[baseline].median,
        "median_s": timing.median,
        "p20_s": timing.p20,
        "p80_s": timing.p80,
        "rounds": len(timing.samples),
    }


def synchronise(device: torch.device) -> None:
    """Wait until `device` has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(step: Step, device: torch.device, calls: int) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def _percentile(samples: tuple[float, ...], percent: int) -> float:
    if len(samples) == 1:
        return samples[0]
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]
