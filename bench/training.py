"""One training run, from a configuration to its history."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset

import fngd
from bench import checkpoint, models
from bench.optimizers import METHODS, FNGDSettings
from bench.timing import synchronise
from bench.workloads import Split, Workload

EVALUATION_BATCH = 500
WARMUP_STEPS = 3
FNGD_COUNTERS = ("solved_batches", "failed_solves", "skipped_steps")


@dataclass(frozen=True)
class RunConfig:
    """Everything the result of a run depends on, besides the commit and the versions."""

    data: str
    train_size: int | None
    model: str
    width: int
    method: str
    lr: float
    seed: int
    epochs: int
    batch_size: int
    share: str
    damping: float
    device: str


@dataclass
class Run:
    """History of a run; epochs: train_loss, validation_loss, validation_accuracy, seconds of training."""

    config: RunConfig
    epochs: list[dict[str, float]] = field(default_factory=list)
    diverged: bool = False
    test_accuracy: float | None = None
    fngd_counters: dict[str, int] | None = None


def train(
    config: RunConfig,
    workload: Workload,
    *,
    read_test: bool = False,
    checkpoint_path: Path | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Run:
    """Train by the cosine schedule; a checkpoint at `checkpoint_path` of the same configuration is continued.

    config: what to train
    workload: the data, on the configuration's device
    read_test: whether to measure test accuracy after the last epoch
    checkpoint_path: where the state after each epoch is kept
    on_step: called after every training step

    Returns: the run; `diverged` with the epochs before it where the loss ceased to be finite.
    Raises: ValueError when the checkpoint belongs to another configuration.
    """
    _warm_up(config, workload)
    torch.manual_seed(config.seed)
    model, optimizer = _build(config, workload)
    generator = torch.Generator().manual_seed(config.seed)
    batches = _batches(config, workload.train, optimizer, generator)
    scheduler = CosineAnnealingLR(optimizer, T_max=config.epochs)
    run = Run(config)
    state = _State(run, model, optimizer, scheduler, generator)
    if checkpoint_path is not None and checkpoint_path.exists():
        state.restore(checkpoint.load(checkpoint_path))

    while len(run.epochs) < config.epochs and not run.diverged:
        start = time.perf_counter()
        train_loss = _train_epoch(model, optimizer, batches, workload, generator, on_step)
        seconds = time.perf_counter() - start
        scheduler.step()
        validation_loss, validation_accuracy = _evaluate(model, workload, workload.validation)
        if not (math.isfinite(train_loss) and math.isfinite(validation_loss)):
            run.diverged = True
            break
        run.epochs.append(
            {
                "train_loss": train_loss,
                "validation_loss": validation_loss,
                "validation_accuracy": validation_accuracy,
                "seconds": seconds,
            }
        )
        if checkpoint_path is not None:
            checkpoint.save(checkpoint_path, state.capture())

    if read_test and not run.diverged:
        run.test_accuracy = _evaluate(model, workload, workload.test)[1]
    if isinstance(optimizer, fngd.FNGD):
        stats = optimizer.stats()
        run.fngd_counters = {name: stats[name] for name in FNGD_COUNTERS}
    return run


def _build(config: RunConfig, workload: Workload) -> tuple[nn.Module, Optimizer]:
    model = models.build(config.model, workload.image_shape, workload.classes, width=config.width)
    model.to(workload.train.x.device)
    settings = FNGDSettings(share=config.share, damping=config.damping)
    return model, METHODS[config.method].build(model, config.lr, settings)


def _warm_up(config: RunConfig, workload: Workload) -> None:
    """Take a few steps with a model that is thrown away, so that no epoch pays for a kernel's first call."""
    with torch.random.fork_rng():
        model, optimizer = _build(config, workload)
        generator = torch.Generator().manual_seed(config.seed)
        batches = _batches(config, workload.train, optimizer, generator)
        first = [batch for batch, _ in zip(batches, range(WARMUP_STEPS), strict=False)]
        _train_epoch(model, optimizer, first, workload, generator, lambda: None)


class _OnDevice(Dataset[tuple[Tensor, Tensor]]):
    """A split whose samples are fetched a batch at a time, without a copy per sample."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices, device=self.split.x.device)
        return self.split.x[rows], self.split.y[rows]


def _as_fetched(batch: Any) -> Any:
    return batch


def _batches(
    config: RunConfig, split: Split, optimizer: Optimizer, generator: torch.Generator
) -> Iterable[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        _OnDevice(split),
        batch_size=config.batch_size,
        shuffle=True,
        collate_fn=_as_fetched,
        generator=generator,
    )
    return fngd.track(loader, optimizer) if isinstance(optimizer, fngd.FNGD) else loader


def _train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    workload: Workload,
    generator: torch.Generator,
    on_step: Callable[[], None],
) -> float:
    """Train on every batch once; returns the mean loss, whose reading also waits for the device."""
    model.train()
    total = torch.zeros((), device=workload.mean.device)
    samples = 0
    for x, y in batches:
        x = workload.standardise(workload.augment(x, generator))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(y)
        samples += len(y)
        on_step()
    synchronise(total.device)
    return total.item() / samples


@torch.no_grad()
def _evaluate(model: nn.Module, workload: Workload, split: Split) -> tuple[float, float]:
    """Mean loss and accuracy over a split."""
    model.eval()
    loss = correct = torch.zeros((), device=split.x.device)
    for x, y in zip(split.x.split(EVALUATION_BATCH), split.y.split(EVALUATION_BATCH), strict=True):
        logits = model(workload.standardise(x))
        loss = loss + F.cross_entropy(logits, y, reduction="sum")
        correct = correct + (logits.argmax(dim=1) == y).sum()
    return loss.item() / len(split), correct.item() / len(split)


@dataclass(frozen=True)
class _State:
    """All that an interrupted run needs to go on as if nothing had happened."""

    run: Run
    model: nn.Module
    optimizer: Optimizer
    scheduler: CosineAnnealingLR
    generator: torch.Generator

    def capture(self) -> dict[str, Any]:
        return {
            "config": asdict(self.run.config),
            "epochs": self.run.epochs,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }

    def restore(self, stored: dict[str, Any]) -> None:
        if stored["config"] != asdict(self.run.config):
            raise ValueError(f"checkpoint: expected one of {self.run.config}, got {stored['config']}")
        self.run.epochs.extend(stored["epochs"])
        self.model.load_state_dict(stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.scheduler.load_state_dict(stored["scheduler"])
        self.generator.set_state(stored["generator"])
        torch.set_rng_state(stored["rng"])
        torch.cuda.set_rng_state_all(stored["cuda_rng"])
