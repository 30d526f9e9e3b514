"""The steps that are timed: the base optimizer's and FNGD's, eager, compiled or as CUDA graphs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fngd
from bench.steps.networks import Batch, Network
from bench.tools.timing import Step
from fngd import graphs

# The same for all and small enough to leave the numbers in the range where training happens.
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-5}),
}
MODES = ("eager", "graphed", "compiled")
CAPTURE_WARMUP = 3
SKETCH = 64

Phase = Callable[[str], AbstractContextManager[Any]]


def unmarked(_: str) -> AbstractContextManager[None]:
    """Mark no phase; the profile marks them with torch.profiler.record_function."""
    return nullcontext()


def base_optimizer(model: nn.Module, base: str, mode: str, **options: Any) -> torch.optim.Optimizer:
    """Return the base optimizer by itself; `options` are its own."""
    kind, defaults = BASES[base]
    if (base, mode) == ("adamw", "graphed"):
        options["capturable"] = True
    return kind(model.parameters(), **defaults, **options)


def fngd_optimizer(model: nn.Module, base: str, mode: str, **options: Any) -> fngd.FNGD:
    """Return FNGD over the base optimizer: share="sample" for the steady state, "none" to solve each time."""
    options = BASES[base][1] | options
    if mode == "graphed":
        device = next(model.parameters()).device
        options["lr"] = torch.tensor(options["lr"], device=device)
    return fngd.FNGD(model, base=base, **options)


def make_step(
    network: Network,
    batch: Batch,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mode: str,
    phase: Phase = unmarked,
) -> Step:
    """Return a whole training step on one batch, after a first one that is always eager.

    The first one solves where the optimizer is FNGD, so that only its steady state is compiled or captured.
    """
    step: Callable[..., Tensor | None] = training_step(partial(network.objective, model), optimizer, phase)
    ids = list(range(len(batch[0])))

    def named(*batch: Tensor) -> Tensor | None:
        if isinstance(optimizer, fngd.FNGD):
            with phase("set_samples"):
                optimizer.set_samples(ids)
        return step(*batch)

    named(*batch)
    if mode == "compiled":
        model.compile()
    elif mode == "graphed" and isinstance(optimizer, fngd.FNGD):
        step = fngd.GraphedStep(optimizer, step)
        # GraphedStep warms up first, and captures at the last of these calls.
        for _ in range(graphs.WARM_UP + 1):
            named(*batch)
    elif mode == "graphed":
        step = capture(step, batch)
    return partial(named, *batch)


def training_step(
    objective: Callable[..., Tensor], optimizer: torch.optim.Optimizer, phase: Phase = unmarked
) -> Callable[..., Tensor]:
    """Return a whole optimisation step as a function of the batch, which returns the loss."""

    def step(*batch: Tensor) -> Tensor:
        with phase("forward"):
            loss = objective(*batch)
        with phase("backward"):
            loss.backward()
        with phase("update"):
            optimizer.step()
        with phase("zero_grad"):
            optimizer.zero_grad()
        return loss

    return step


def capture(step: Callable[..., Tensor | None], batch: Batch) -> Callable[..., Tensor | None]:
    """Return `step` as a CUDA graph that copies its batch into buffers of its own and is replayed."""
    buffers = [x.clone() for x in batch]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(CAPTURE_WARMUP):
            step(*buffers)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*buffers)

    def replay(*batch: Tensor) -> Tensor | None:
        for buffer, x in zip(buffers, batch, strict=True):
            buffer.copy_(x)
        graph.replay()
        return loss

    return replay


def step_makers(
    network: Network, batch: Batch, base: str, mode: str, phase: Phase = unmarked
) -> dict[str, Callable[[], Step]]:
    """Return a function for each contender that makes its step; the base optimizer is one also when fused."""
    optimizers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        base: lambda model: base_optimizer(model, base, mode),
        f"{base} fused": lambda model: base_optimizer(model, base, mode, fused=True),
        "fngd steady": lambda model: fngd_optimizer(model, base, mode, share="sample"),
    }
    # A compiled network solves eagerly.
    if mode != "compiled":
        optimizers["fngd solving"] = lambda model: fngd_optimizer(model, base, mode, share="none")
        optimizers["fngd sketched"] = lambda model: fngd_optimizer(
            model, base, mode, share="none", sketch=SKETCH
        )

    def make(optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> Step:
        model = network.build(batch[0].device)
        return make_step(network, batch, model, optimizer(model), mode, phase)

    return {name: partial(make, optimizer) for name, optimizer in optimizers.items()}
