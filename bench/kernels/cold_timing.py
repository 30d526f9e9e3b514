"""Times of calls on a device that starts cold: CUDA graphs over rotating buffers, contenders in turns."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.tools.timing import Timing, round_robin

MOST_BUFFERS = 64
"""Of inputs of one case; smaller ones than the cache over this stay partly warm."""


def buffers_for(inputs: Sequence[Tensor], device: torch.device) -> int:
    """Return how many sets of inputs together overflow the L2 cache three times."""
    if device.type == "cpu":
        return 1
    size = sum(t.numel() * t.itemsize for t in inputs)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_BUFFERS, 2 + 3 * cache // max(1, size))


def measure(
    contenders: Mapping[str, Callable[..., object]],
    inputs: Sequence[tuple[Tensor, ...]],
    *,
    rounds: int,
    device: torch.device,
) -> tuple[dict[str, Timing], str]:
    """Return seconds per call of every contender, on each set of inputs in turn, and how calls were made.

    All contenders are replayed from CUDA graphs, or all called one by one if one of them cannot be captured.
    """
    if device.type == "cpu":
        calls = {name: lambda run=run: run(*inputs[0]) for name, run in contenders.items()}
        return round_robin(calls, rounds=rounds, warmup=1, device=device), "calls"
    try:
        passes = {name: _captured(run, inputs).replay for name, run in contenders.items()}
        how = "graph"
    except RuntimeError:
        passes = {name: partial(_run_all, run, inputs) for name, run in contenders.items()}
        how = "calls"
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(rounds + 1):
        for name in order.sample(list(passes), len(passes)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            passes[name]()
            end.record()
            end.synchronize()
            # The first replay uploads the graph.
            if turn:
                samples[name].append(start.elapsed_time(end) / 1000 / len(inputs))
    return {name: Timing(tuple(values)) for name, values in samples.items()}, how


def workspace(run: Callable[..., object], inputs: Sequence[Tensor], device: torch.device) -> int | None:
    """Return the most bytes one call held beyond its inputs and its result; None on the CPU."""
    if device.type == "cpu":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run(*inputs)
    held = torch.cuda.memory_allocated(device)
    del result
    return torch.cuda.max_memory_allocated(device) - max(before, held)


def _run_all(run: Callable[..., object], inputs: Sequence[tuple[Tensor, ...]]) -> None:
    for tensors in inputs:
        run(*tensors)


def _captured(run: Callable[..., object], inputs: Sequence[tuple[Tensor, ...]]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(*inputs[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run_all(run, inputs)
    return graph
