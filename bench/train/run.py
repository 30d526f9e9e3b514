"""One training run, from a configuration to its history."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fngd
from bench.peers import Settings, Update, training_of
from bench.tools.timing import synchronise
from bench.train import checkpoint
from bench.workloads import Task

WARMUP_STEPS = 3
FNGD_COUNTERS = ("solved_batches", "failed_solves", "skipped_steps")
PERCENTILES = 41
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RunConfig:
    """Everything the result of a run depends on, besides the commit and the versions."""

    data: str
    train_size: int | None
    model: str
    width: int
    method: str
    lr: float
    damping: float | None
    share: str
    seed: int
    epochs: int
    warmup_epochs: int
    batch_size: int
    label_noise: float
    precision: str
    device: str


@dataclass
class Run:
    """History of a run; epochs: train_loss, validation_loss, validation_accuracy, seconds of training.

    Attributes:
        validation_score, test_score: The task's metric after the last epoch.
        coefficients: FNGD's coefficients of the samples, percentiles of the mean over layers, by state of
            the label.
        environment: Where it ran, and whether other runs shared the device for a part of it.
    """

    config: RunConfig
    epochs: list[dict[str, float]] = field(default_factory=list)
    diverged: bool = False
    validation_score: float | None = None
    test_score: float | None = None
    fngd_counters: dict[str, int] | None = None
    coefficients: dict[str, list[float]] | None = None
    environment: dict[str, str | float | bool | None] | None = None

    @property
    def shared_device(self) -> bool:
        """Whether its seconds are contaminated by other runs on the device."""
        return bool(self.environment and self.environment.get("shared_device"))


def train(
    config: RunConfig,
    task: Task,
    *,
    read_test: bool = False,
    shared_device: bool = False,
    checkpoint_path: Path | None = None,
    on_step: Callable[[], None] = lambda: None,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda number, epoch: None,
) -> Run:
    """Train by a cosine schedule; a checkpoint at `checkpoint_path` of the same configuration is continued.

    Args:
        config: What to train.
        task: The data, on the configuration's device.
        read_test: Whether to score the test split after the last epoch.
        shared_device: Whether other runs use the device meanwhile.
        checkpoint_path: Where the state after each epoch is kept.
        on_step: Called after every training step.
        on_epoch: Called after every epoch with its number, from 1, and figures.

    Returns:
        The run; `diverged` with the epochs before it where the loss ceased to be finite.

    Raises:
        ValueError: When the checkpoint belongs to another configuration.
    """
    _warm_up(config, task)
    torch.manual_seed(config.seed)
    trainer = _Trainer.of(config, task)
    run = Run(config, environment={"shared_device": shared_device})
    state = _State(run, trainer)
    if checkpoint_path is not None and checkpoint_path.exists():
        state.restore(checkpoint.load(checkpoint_path))

    while len(run.epochs) < config.epochs and not run.diverged:
        start = time.perf_counter()
        try:
            train_loss = trainer.epoch(len(run.epochs), on_step)
        except torch.linalg.LinAlgError:
            # How second-order libraries end when their matrices are no longer finite.
            run.diverged = True
            break
        seconds = time.perf_counter() - start
        with trainer.autocast():
            validation_loss, validation_accuracy = task.evaluate(trainer.model, task.validation)
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
        on_epoch(len(run.epochs), run.epochs[-1])
        if checkpoint_path is not None and training_of(config.method).resumes:
            checkpoint.save(checkpoint_path, state.capture())

    if not run.diverged:
        with trainer.autocast():
            run.validation_score = task.score(trainer.model, task.validation)
            run.test_score = task.score(trainer.model, task.test) if read_test else None
    if isinstance(trainer.update, fngd.FNGD):
        stats = trainer.update.stats()
        run.fngd_counters = {name: stats[name] for name in FNGD_COUNTERS}
        run.coefficients = _coefficients(config, trainer.update, task)
    return run


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Return what the rate is multiplied by: up a line for `warmup` steps, then down half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@dataclass(frozen=True)
class _Trainer:
    """What takes part in a step."""

    config: RunConfig
    task: Task
    model: nn.Module
    update: Update
    generator: torch.Generator
    batches: Iterable[Any]
    steps: int

    @classmethod
    def of(cls, config: RunConfig, task: Task) -> "_Trainer":
        model = task.model(config.model, config.width).to(task.device)
        settings = Settings(lr=config.lr, damping=config.damping, share=config.share)
        update = training_of(config.method).build(model, settings)
        generator = torch.Generator().manual_seed(config.seed)
        loader = task.batches(config.batch_size, generator)
        batches = fngd.track(loader, update) if isinstance(update, fngd.FNGD) else loader
        return cls(config, task, model, update, generator, batches, len(loader))

    def autocast(self) -> torch.autocast:
        """Return the context of the run's precision."""
        dtype = PRECISIONS[self.config.precision]
        return torch.autocast(self.task.device.type, dtype, enabled=dtype is not None)

    def epoch(self, number: int, on_step: Callable[[], None], most: int | None = None) -> float:
        """Train on every batch once; return the mean loss, whose reading also waits for the device."""
        self.model.train()
        total = torch.zeros((), device=self.task.device)
        samples = 0
        warmup = self.config.warmup_epochs * self.steps
        for step, batch in enumerate(self.batches, start=number * self.steps):
            factor = lr_factor(step, self.config.epochs * self.steps, warmup)
            for group in self.update.param_groups:
                group["lr"] = self.config.lr * factor
            self.update.zero_grad()
            with self.autocast():
                loss = self.task.loss(self.model, batch, self.generator)
            loss.backward()
            self.update.step()
            total += loss.detach() * len(batch[0])
            samples += len(batch[0])
            on_step()
            if step + 1 == most:
                break
        synchronise(total.device)
        return total.item() / samples


def _warm_up(config: RunConfig, task: Task) -> None:
    """Take a few steps with a model that is thrown away, so that no epoch pays for a kernel's first call."""
    with torch.random.fork_rng():
        _Trainer.of(config, task).epoch(0, lambda: None, most=WARMUP_STEPS)


def _coefficients(config: RunConfig, optimizer: fngd.FNGD, task: Task) -> dict[str, list[float]] | None:
    """Return percentiles of the samples' coefficients, apart for replaced labels and for the others."""
    if config.share != "sample" or config.method == "fngd-exact" or task.replaced is None:
        return None
    weights = optimizer.state_dict()["fngd"]["values"].mean(dim=0).cpu()[: len(task.replaced)]
    levels = torch.linspace(0, 1, PERCENTILES)
    groups = {"kept": weights[~task.replaced], "replaced": weights[task.replaced]}
    return {name: group.quantile(levels).tolist() for name, group in groups.items()}


@dataclass(frozen=True)
class _State:
    """All that an interrupted run needs to go on as if nothing had happened."""

    run: Run
    trainer: _Trainer

    def capture(self) -> dict[str, Any]:
        return {
            "config": asdict(self.run.config),
            "epochs": self.run.epochs,
            "shared_device": self.run.shared_device,
            "model": self.trainer.model.state_dict(),
            "update": self.trainer.update.state_dict(),
            "generator": self.trainer.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }

    def restore(self, stored: dict[str, Any]) -> None:
        if stored["config"] != asdict(self.run.config):
            raise ValueError(f"checkpoint: expected one of {self.run.config}, got {stored['config']}")
        self.run.epochs.extend(stored["epochs"])
        self.run.environment = {"shared_device": self.run.shared_device or stored["shared_device"]}
        self.trainer.model.load_state_dict(stored["model"])
        self.trainer.update.load_state_dict(stored["update"])
        self.trainer.generator.set_state(stored["generator"])
        torch.set_rng_state(stored["rng"])
        torch.cuda.set_rng_state_all(stored["cuda_rng"])
