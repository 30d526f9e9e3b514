"""Draw the loss on digits with and without faults, and print it before, at and after each of them.

`python -m bench.reliability.faults` trains an MLP, as bench.train does; half a minute on one thread.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fngd
import fngd.preconditioner
from bench.models import images
from bench.tools.figures import blank
from bench.workloads import digits

PICTURE = Path(__file__).resolve().parents[1] / "results/pictures/faults.png"
BATCH, EPOCHS = 64, 6
SOLVING, LATER = 8, 60
"""Steps at which a fault happens: in the first epoch, which solves, and after it."""

Losses = list[float]


class Loop:
    """Training that goes on after an exception, with the loss of the training split after every step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        data = digits.load().train
        self.x, self.y = data.x / 16, data.y
        self.model = images.mlp(64, 10, units=64)
        self.opt = fngd.FNGD(self.model, lr=0.1, momentum=0.9)
        self.scale = 1.0

    def step(self, ids: Tensor, spoil: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Train on the named samples."""
        self.opt.set_samples(ids)
        self.opt.zero_grad()
        loss = F.cross_entropy(self.model(spoil(self.x[ids])), self.y[ids])
        (loss * self.scale).backward()
        self.opt.step()

    def loss(self) -> float:
        """Return the mean loss of the training split."""
        with torch.no_grad():
            return float(F.cross_entropy(self.model(self.x), self.y))

    def run(self, fault: Callable[["Loop", Tensor], None] | None = None, at: int = -1) -> Losses:
        """Return the loss before the first step and after each; the batch of step `at` is the faulty one."""
        losses = [self.loss()]
        for _ in range(EPOCHS):
            self.opt.start_epoch()
            for ids in torch.randperm(len(self.y)).split(BATCH):
                if fault is not None and len(losses) - 1 == at:
                    fault(self, ids)
                else:
                    self.step(ids)
                losses.append(self.loss())
        return losses


def nan(loop: Loop, ids: Tensor) -> None:
    """Train on a batch with one pixel that is NaN."""
    loop.step(
        ids,
        lambda x: x.index_put(
            (torch.tensor(3), torch.tensor(0), torch.tensor(2), torch.tensor(2)), torch.tensor(torch.nan)
        ),
    )


def infinity(loop: Loop, ids: Tensor) -> None:
    """Train on a batch that is infinite."""
    loop.step(ids, lambda x: x + torch.inf)


def overflow(loop: Loop, ids: Tensor) -> None:
    """Train with a loss scale at which gradients overflow, as a GradScaler meets them."""
    loop.scale = 2.0**140
    loop.step(ids)
    loop.scale = 1.0


def forward(loop: Loop, ids: Tensor) -> None:
    """Raise an exception between two layers, caught by the loop."""

    def fail(module: nn.Module, inputs: object, output: Tensor) -> None:
        raise ArithmeticError

    _caught(loop, ids, loop.model[2].register_forward_hook(fail))


def backward(loop: Loop, ids: Tensor) -> None:
    """Raise an exception in the backward of a module, caught by the loop."""

    def fail(gradient: Tensor) -> None:
        raise ArithmeticError

    _caught(loop, ids, loop.model[2].register_forward_hook(lambda m, x, y: y.register_hook(fail) and None))


def memory(loop: Loop, ids: Tensor) -> None:
    """Run out of memory in every Gram matrix, whatever the workspace."""

    def fail(uses: object, sketch: object) -> Tensor:
        raise torch.OutOfMemoryError

    gram = fngd.preconditioner.block_gram
    fngd.preconditioner.block_gram = fail  # type: ignore[assignment]
    try:
        loop.step(ids)
    finally:
        fngd.preconditioner.block_gram = gram


def restart(loop: Loop, ids: Tensor) -> None:
    """End the process: a new one goes on from a checkpoint, with the same batch."""
    states = loop.model.state_dict(), loop.opt.state_dict()
    rng = torch.get_rng_state()
    fresh = Loop()
    fresh.model.load_state_dict(states[0])
    fresh.opt.load_state_dict(states[1])
    torch.set_rng_state(rng)
    loop.model, loop.opt = fresh.model, fresh.opt
    loop.step(ids)


def _caught(loop: Loop, ids: Tensor, handle: torch.utils.hooks.RemovableHandle) -> None:
    try:
        loop.step(ids)
    except ArithmeticError:
        return
    finally:
        handle.remove()
    raise AssertionError("expected the fault to raise")


FAULTS: dict[str, tuple[Callable[[Loop, Tensor], None], int]] = {
    "NaN in a batch, solving epoch": (nan, SOLVING),
    "NaN in a batch, later": (nan, LATER),
    "infinite batch": (infinity, LATER),
    "gradients overflow": (overflow, SOLVING),
    "exception in forward": (forward, SOLVING),
    "exception in backward": (backward, SOLVING),
    "out of memory in solving": (memory, SOLVING),
    "process ends, checkpoint": (restart, SOLVING),
}


def draw(path: Path, usual: Losses, faulty: dict[str, Losses]) -> None:
    """Draw a panel for each fault: the loss without it, with it, and where it happens."""
    figure = blank(12, 6)
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    for axis, (name, losses) in zip(axes.flat, faulty.items(), strict=True):
        axis.plot(usual, color="#000000", linewidth=2.5, alpha=0.35, label="without the fault")
        axis.plot(losses, color="#0072B2", linewidth=1.2, label="with it")
        axis.axvline(FAULTS[name][1], color="#D55E00", linestyle="--", linewidth=1, label="the fault")
        axis.set_yscale("log")
        axis.set_title(name, fontsize="medium")
        axis.grid(visible=True, linewidth=0.4, alpha=0.5)
    for axis in axes[1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("training loss")
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(f"FNGD on digits, MLP, batch {BATCH}, the first of {EPOCHS} epochs solves")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Train without and with each fault; print the figures and draw the curves."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.reliability.faults", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=PICTURE, help="where the picture goes")
    path = parser.parse_args().output
    torch.set_num_threads(1)
    usual = Loop().run()
    faulty, rows = {}, []
    for name, (fault, at) in FAULTS.items():
        loop = Loop()
        losses = faulty[name] = loop.run(fault, at)
        stats = loop.opt.stats()
        plain = sum(sum(reasons.values()) for reasons in stats["fallbacks"].values())
        shown = [f"{x:.4f}" for x in (losses[at], losses[at + 1], losses[at + 2], losses[-1])]
        rows.append((name, *shown, stats["skipped_steps"], plain))
    head = (
        "fault",
        "loss before",
        "after its step",
        "a step later",
        "at the end",
        "steps left out",
        "plain layers",
    )
    print(tabulate(rows, head, disable_numparse=True))
    print(f"without a fault: {usual[-1]:.4f} at the end")
    draw(path, usual, faulty)
    print(f"picture: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
