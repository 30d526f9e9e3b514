"""Where the time of a step goes, read from a Chrome trace of torch.profiler."""

import bisect
import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEP = "step"
PHASES = ("set_samples", "forward", "backward", "update", "zero_grad")
# What is left of a step, such as the replay of a CUDA graph.
OTHER = "other"
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CALLS = ("cuda_runtime", "cuda_driver")
LAUNCH = re.compile(r"LaunchKernel|GraphLaunch")
WAIT = re.compile(r"Synchronize|^cudaMemcpy$")

Event = dict[str, Any]


@dataclass
class Phase:
    """Milliseconds of one step that the host spent in a phase, and the device on what it launched there."""

    host_ms: float = 0.0
    device_ms: float = 0.0


@dataclass
class Summary:
    """Means over the steps of a trace.

    Attributes:
        wall_ms: From the beginning of the first step to the device's end of the last, divided by
            their number.
        kernels, launches, waits: Kernels that ran, calls that launched one or a graph, calls that
            waited for the device.
    """

    steps: int
    wall_ms: float
    kernels: float
    launches: float
    waits: float
    phases: dict[str, Phase] = field(default_factory=dict)

    @property
    def device_ms(self) -> float:
        """Return the milliseconds that the device worked in a step."""
        return sum(phase.device_ms for phase in self.phases.values())


def load(path: Path) -> list[Event]:
    """Return the complete events of a trace, gzipped or not."""
    data = path.read_bytes()
    events = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def summarize(events: Sequence[Event]) -> Summary:
    """Summarize the steps of a trace, which record_function has marked, with their phases.

    Work on the device counts for the phase in which it was launched, whichever thread did so: autograd
    launches backward from one of its own.

    Raises:
        ValueError: When the trace has no step.
    """
    steps = _Windows(events, STEP)
    if not steps.count:
        raise ValueError("events: expected some marked 'step', found none")
    windows = {name: _Windows(events, name) for name in PHASES}
    host_calls = [event for event in events if event.get("cat") in HOST_CALLS and steps.holds(event["ts"])]
    launched = {event["args"]["correlation"]: event["ts"] for event in host_calls}
    work = [
        event
        for event in events
        if event.get("cat") in DEVICE_WORK and event["args"].get("correlation") in launched
    ]

    spent = {name: window.total for name, window in windows.items()}
    spent[OTHER] = steps.total - sum(spent.values())
    worked = dict.fromkeys(spent, 0.0)
    for event in work:
        began = launched[event["args"]["correlation"]]
        worked[next((name for name, window in windows.items() if window.holds(began)), OTHER)] += event["dur"]
    end = max([steps.end, *(event["ts"] + event["dur"] for event in work)])
    per_step = 1 / steps.count
    return Summary(
        steps=steps.count,
        wall_ms=(end - steps.start) / 1e3 * per_step,
        kernels=sum(event["cat"] == "kernel" for event in work) * per_step,
        launches=sum(bool(LAUNCH.search(event["name"])) for event in host_calls) * per_step,
        waits=sum(bool(WAIT.search(event["name"])) for event in host_calls) * per_step,
        phases={
            name: Phase(spent[name] / 1e3 * per_step, worked[name] / 1e3 * per_step)
            for name in (*PHASES, OTHER)
        },
    )


class _Windows:
    """The times at which the host was in a marked part of a step; they do not overlap."""

    def __init__(self, events: Sequence[Event], name: str) -> None:
        intervals = sorted(
            (event["ts"], event["ts"] + event["dur"])
            for event in events
            if event.get("cat") == "user_annotation" and event["name"] == name
        )
        self.starts = [start for start, _ in intervals]
        self.ends = [end for _, end in intervals]
        self.count = len(intervals)

    @property
    def start(self) -> float:
        return self.starts[0]

    @property
    def end(self) -> float:
        return self.ends[-1]

    @property
    def total(self) -> float:
        return sum(self.ends) - sum(self.starts)

    def holds(self, moment: float) -> bool:
        index = bisect.bisect_right(self.starts, moment) - 1
        return index >= 0 and moment <= self.ends[index]
