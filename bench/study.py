"""A comparison of methods: tune each on validation, train the chosen rates over all seeds, time the steps."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import fngd
from bench import models
from bench.optimizers import METHODS, FNGDSettings
from bench.progress import Progress
from bench.timing import Step, Timing, round_robin, training_step
from bench.training import Run, RunConfig, train
from bench.workloads import Workload

STEP_WARMUP = 5
STEP_ROUNDS = (10, 200)
STEP_SECONDS = 10.0
# too small to drive any method away from its start while only time is measured
STEP_LR = 1e-4


@dataclass(frozen=True)
class Study:
    """What the command line asks for; `lrs` replaces every method's own grid."""

    data: str
    train_size: int | None
    model: str
    width: int
    methods: tuple[str, ...]
    lrs: tuple[float, ...] | None
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    share: str
    damping: float
    device: str

    def grid(self, method: str) -> tuple[float, ...]:
        """Learning rates to try for `method`."""
        return self.lrs or METHODS[method].lrs

    def run_config(self, method: str, lr: float, seed: int) -> RunConfig:
        """Configuration of one run."""
        return RunConfig(
            data=self.data,
            train_size=self.train_size,
            model=self.model,
            width=self.width,
            method=method,
            lr=lr,
            seed=seed,
            epochs=self.epochs,
            batch_size=self.batch_size,
            share=self.share,
            damping=self.damping,
            device=self.device,
        )


@dataclass(frozen=True)
class Results:
    """Runs of both stages by method, the learning rates chosen, and the timing of single steps."""

    tuning: dict[str, list[Run]]
    chosen: dict[str, float]
    final: dict[str, list[Run]]
    steps: dict[str, Timing]


def conduct(study: Study, workload: Workload, folder: Path) -> Results:
    """Do what of the study is not yet in `folder`; every finished run is kept there at once."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    per_run = study.epochs * -(-len(workload.train) // study.batch_size)
    tuning_runs = sum(len(study.grid(method)) for method in study.methods)
    runs = tuning_runs + len(study.methods) * len(study.seeds)
    with Progress(runs * per_run) as progress:
        tuning = {
            method: [
                _run(
                    study.run_config(method, lr, study.seeds[0]), workload, folder, "tune", progress, per_run
                )
                for lr in study.grid(method)
            ]
            for method in study.methods
        }
        chosen = {method: choose(runs) for method, runs in tuning.items()}
        for method, lr in chosen.items():
            progress.note(f"chosen on validation: {METHODS[method].label} lr {lr:g}")
        final = {
            method: [
                _run(study.run_config(method, lr, seed), workload, folder, "final", progress, per_run)
                for seed in study.seeds
            ]
            for method, lr in chosen.items()
        }
        progress.note("timing single steps, all methods in turns")
        return Results(tuning, chosen, final, time_steps(study, workload))


def choose(runs: list[Run]) -> float:
    """Learning rate of the run with the best last validation accuracy; of equals, the lower validation loss.

    Raises: ValueError when every run diverged.
    """
    finished = [run for run in runs if not run.diverged]
    if not finished:
        tried = ", ".join(f"{run.config.lr:g}" for run in runs)
        raise ValueError(
            f"lr: {runs[0].config.method} diverged at every rate tried ({tried}); try smaller ones"
        )
    best = max(
        finished, key=lambda run: (run.epochs[-1]["validation_accuracy"], -run.epochs[-1]["validation_loss"])
    )
    return best.config.lr


def time_steps(study: Study, workload: Workload) -> dict[str, Timing]:
    """Time one step of plain SGD and of every method on the same batch, in turns, for some ten seconds."""
    rows = torch.arange(min(study.batch_size, len(workload.train)))
    x = workload.standardise(workload.train.x[: len(rows)])
    y = workload.train.y[: len(rows)]
    methods = dict.fromkeys(("sgd", *study.methods))
    contenders = dict(_contenders(study, workload, list(methods), x, y, rows))
    trial = round_robin(contenders, rounds=1, warmup=STEP_WARMUP, device=x.device)
    fewest, most = STEP_ROUNDS
    rounds = int(STEP_SECONDS / sum(timing.median for timing in trial.values()))
    return round_robin(contenders, rounds=min(max(rounds, fewest), most), warmup=0, device=x.device)


def _contenders(
    study: Study, workload: Workload, methods: list[str], x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor
) -> Iterator[tuple[str, Step]]:
    def contender(method: str, share: str) -> Step:
        torch.manual_seed(0)
        model = models.build(study.model, workload.image_shape, workload.classes, width=study.width).to(
            x.device
        )
        optimizer = METHODS[method].build(model, STEP_LR, FNGDSettings(share=share, damping=study.damping))
        ids = rows if method == "fngd" and share == "sample" else None
        step = training_step(model, optimizer, F.cross_entropy, x, y, ids=ids)
        if isinstance(optimizer, fngd.FNGD) and share != "none":
            # the first epoch solves and fills the table, the second reads it
            optimizer.start_epoch()
            step()
            optimizer.start_epoch()
        return step

    for method in methods:
        if METHODS[method].solves != "always":
            yield method, contender(method, study.share)
        if METHODS[method].solves != "never":
            yield f"{method} solving", contender(method, "none")


def _run(
    config: RunConfig, workload: Workload, folder: Path, stage: str, progress: Progress, steps: int
) -> Run:
    """Train, or read the run from the folder when it is complete there."""
    name = f"{stage}-{config.method}-lr{config.lr:g}-seed{config.seed}"
    progress.doing(name)
    finished, unfinished = folder / "runs" / f"{name}.json", folder / "runs" / f"{name}.pt"
    before = progress.done
    if finished.exists():
        run = load_run(finished)
        if run.config != config:
            raise ValueError(
                f"output: {finished} holds a run with other settings: {run.config}, not {config}"
            )
    else:
        run = train(
            config,
            workload,
            read_test=stage == "final",
            checkpoint_path=unfinished,
            on_step=progress.advance,
        )
        save_run(finished, run)
        progress.note(describe(name, run))
    unfinished.unlink(missing_ok=True)
    progress.advance(steps - (progress.done - before))
    return run


def describe(name: str, run: Run) -> str:
    """One line about a run."""
    if run.diverged:
        return f"{name}: diverged in epoch {len(run.epochs) + 1}"
    last = run.epochs[-1]
    seconds = sum(epoch["seconds"] for epoch in run.epochs)
    return (
        f"{name}: train loss {last['train_loss']:.4f}, "
        f"validation accuracy {last['validation_accuracy']:.2%}, {seconds:.1f} s of training"
    )


def save_run(path: Path, run: Run) -> None:
    """Write a run as JSON, whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(run), allow_nan=False))
    os.replace(unfinished, path)


def load_run(path: Path) -> Run:
    """Read what `save_run` wrote."""
    stored = json.loads(path.read_text())
    return Run(**{**stored, "config": RunConfig(**stored["config"])})
