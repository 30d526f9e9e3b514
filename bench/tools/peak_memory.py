"""Peak memory of one call, counted from the allocator's own events rather than from the process size."""

import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.tools.timing import Step

CPU_DEVICE_TYPE = 0


def peak_memory(step: Step, device: torch.device) -> int:
    """Return the most bytes that one call of `step` held beyond what was allocated before it.

    On the CPU the profiler's trace lists every allocation and release of torch's allocator with its size, so
    the running sum is exact and repeatable; what C++ code takes from malloc by itself is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [
        (event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == CPU_DEVICE_TYPE
    ]
    live = peak = 0
    for _, change in sorted(changes):
        live += change
        peak = max(peak, live)
    return peak
