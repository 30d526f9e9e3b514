"""A comparison of methods: tune each on validation, train the chosen rates over all seeds, time the steps."""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

import fngd
from bench.peers import PEERS, Settings, training_of
from bench.tools import environment, jsonl
from bench.tools.timing import Step, Timing, round_robin
from bench.train.archive import load_run, recorded, save_run
from bench.train.progress import Progress
from bench.train.run import PRECISIONS, Run, RunConfig, train
from bench.workloads import Task

STEP_WARMUP = 5
STEP_ROUNDS = (10, 200)
STEP_SECONDS = 10.0
# Too small to drive any method away from its start while only time is measured.
STEP_LR = 1e-4


Point = tuple[float, float | None]
"""A learning rate and, where the method has one, a damping."""


class OutOfTime(Exception):
    """The seconds allowed are over; finished runs are kept."""


@dataclass(frozen=True)
class Study:
    """What the command line asks for.

    Attributes:
        lrs: Rates that replace a method's own, by method.
        damping_factors: Multiples of each method's recommended damping to try.
    """

    data: str
    train_size: int | None
    model: str
    width: int
    methods: tuple[str, ...]
    lrs: Mapping[str, tuple[float, ...]]
    damping_factors: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int
    warmup_epochs: int
    batch_size: int
    share: str
    label_noise: float
    precision: str
    device: str

    def grid(self, method: str) -> list[Point]:
        """Return the settings to try for `method`."""
        recommended = training_of(method).damping
        dampings = [None] if recommended is None else [recommended * f for f in self.damping_factors]
        return list(itertools.product(self.lrs.get(method, training_of(method).lrs), dampings))

    def run_config(self, method: str, point: Point, seed: int) -> RunConfig:
        """Return the configuration of one run."""
        common = {field.name: getattr(self, field.name) for field in fields(self) if field.name in SHARED}
        return RunConfig(**common, method=method, lr=point[0], damping=point[1], seed=seed)


SHARED = {field.name for field in fields(RunConfig)} - {"method", "lr", "damping", "seed"}
"""What all runs of a study have in common."""


@dataclass(frozen=True)
class Results:
    """Runs of both stages by method, the settings chosen, and the timing of single steps.

    Attributes:
        tuning: Without runs for a method that has one setting only.
        steps: Empty where other runs shared the device.
    """

    tuning: dict[str, list[Run]]
    chosen: dict[str, Point]
    final: dict[str, list[Run]]
    steps: dict[str, Timing]


def conduct(
    study: Study,
    task: Task,
    folder: Path,
    *,
    rows: Path | None = None,
    resume: bool = False,
    seconds: float | None = None,
    shared_device: bool = False,
) -> Results:
    """Do what of the study is not yet in `folder`; every finished run is kept there at once.

    Args:
        rows: File to which every finished run is appended as well.
        resume: Whether runs found in `rows` count as done, so that nothing but this file has to be
            kept.
        seconds: The last step is taken after so many.
        shared_device: Whether other runs use the device meanwhile; single steps are not timed then.

    A method that diverges at every setting has no final runs. One with a single setting has only these.

    Raises:
        OutOfTime: When the seconds are over first.
        ValueError: When every method diverges.
    """
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    per_run = study.epochs * -(-task.sizes["train"] // study.batch_size)
    grids = {method: study.grid(method) for method in study.methods}
    points = [(method, point) for method, grid in grids.items() if len(grid) > 1 for point in grid]
    runs = len(points) + len(study.methods) * len(study.seeds)
    deadline = None if seconds is None else time.monotonic() + seconds
    with Progress(runs * per_run) as progress:
        done = recorded(rows) if resume else {}
        runner = _Runner(task, folder, rows, done, deadline, shared_device, progress, per_run)
        tuning: dict[str, list[Run]] = {method: [] for method in study.methods}
        for method, point in points:
            tuning[method].append(runner.run(study.run_config(method, point, study.seeds[0]), "tune"))
        chosen = {
            method: choose(tried) if tried else grids[method][0]
            for method, tried in tuning.items()
            if not tried or not all(run.diverged for run in tried)
        }
        for method in (method for method, tried in tuning.items() if tried):
            outcome = (
                f", {describe_point(chosen[method])}" if method in chosen else ": diverged at all it tried"
            )
            progress.note(f"chosen on validation: {PEERS[method].label}{outcome}")
        final: dict[str, list[Run]] = {method: [] for method in chosen}
        # Seed by seed: an interrupted study has as many of every method.
        for seed, (method, point) in itertools.product(study.seeds, chosen.items()):
            final[method].append(runner.run(study.run_config(method, point, seed), "final"))
        if all(run.diverged for group in final.values() for run in group):
            raise ValueError("lr: every method diverged at all it tried; try smaller rates")
        if shared_device:
            return Results(tuning, chosen, final, steps={})
        progress.note("timing single steps, all methods in turns")
        return Results(tuning, chosen, final, time_steps(study, task))


def choose(runs: list[Run]) -> Point:
    """Return the setting of the best validation score; of equals, that of the lower validation loss."""
    finished = [run for run in runs if not run.diverged]
    best = max(finished, key=lambda run: (run.validation_score, -run.epochs[-1]["validation_loss"]))
    return best.config.lr, best.config.damping


def describe_point(point: Point) -> str:
    """Return a setting in words."""
    lr, damping = point
    return f"lr {lr:g}" if damping is None else f"lr {lr:g}, damping {damping:g}"


def time_steps(study: Study, task: Task) -> dict[str, Timing]:
    """Time one step of plain SGD and of every method on the same batch, in turns, for some ten seconds."""
    methods = dict.fromkeys(("sgd", *study.methods))
    contenders = dict(_method_steps(study, task, list(methods)))
    trial = round_robin(contenders, rounds=1, warmup=STEP_WARMUP, device=task.device)
    fewest, most = STEP_ROUNDS
    rounds = int(STEP_SECONDS / sum(timing.median for timing in trial.values()))
    return round_robin(contenders, rounds=min(max(rounds, fewest), most), warmup=0, device=task.device)


def _method_steps(study: Study, task: Task, methods: list[str]) -> Iterator[tuple[str, Step]]:
    batch = next(iter(task.batches(study.batch_size, torch.Generator().manual_seed(0))))
    ids = list(range(len(batch[0])))
    dtype = PRECISIONS[study.precision]

    def step_of(name: str, share: str) -> Step:
        torch.manual_seed(0)
        method = training_of(name)
        model = task.model(study.model, study.width).to(task.device)
        update = method.build(model, Settings(lr=STEP_LR, damping=method.damping, share=share))
        generator = torch.Generator().manual_seed(0)

        def step() -> None:
            if isinstance(update, fngd.FNGD):
                update.set_samples(ids)
            update.zero_grad()
            with torch.autocast(task.device.type, dtype, enabled=dtype is not None):
                loss = task.loss(model, batch, generator)
            loss.backward()
            update.step()

        if isinstance(update, fngd.FNGD) and share != "none":
            # The first epoch solves and fills the table, the second reads it.
            update.start_epoch()
            step()
            update.start_epoch()
        return step

    # A single step says little of a method that refreshes a preconditioner now and then: bench.peers
    # averages over its period.
    for name in (name for name in methods if training_of(name).period == 1):
        if training_of(name).solves != "always":
            yield name, step_of(name, study.share)
        if training_of(name).solves != "never":
            yield f"{name} solving", step_of(name, "none")


@dataclass(frozen=True)
class _Runner:
    """Trains single runs of a study, or reads them where they are complete already."""

    task: Task
    folder: Path
    rows: Path | None
    recorded: Mapping[tuple[str, RunConfig], Run]
    deadline: float | None
    shared_device: bool
    progress: Progress
    steps: int

    def run(self, config: RunConfig, stage: str) -> Run:
        name = f"{stage}-{config.method}-lr{config.lr:g}"
        name += "" if config.damping is None else f"-damping{config.damping:g}"
        name += f"-seed{config.seed}"
        self.progress.doing(name)
        finished = self.folder / "runs" / f"{name}.json"
        before = self.progress.done
        if (stage, config) in self.recorded:
            run = self.recorded[stage, config]
        elif finished.exists():
            run = load_run(finished)
            if run.config != config:
                raise ValueError(
                    f"output: {finished} holds a run with other settings: {run.config}, not {config}"
                )
        else:
            run = self._train(config, name, stage)
            save_run(finished, run)
            if self.rows is not None:
                jsonl.append(self.rows, [{"stage": stage, "task": describe_task(self.task), **asdict(run)}])
            self.progress.note(describe(name, run))
        finished.with_suffix(".pt").unlink(missing_ok=True)
        self.progress.advance(self.steps - (self.progress.done - before))
        return run

    def _train(self, config: RunConfig, name: str, stage: str) -> Run:
        with SummaryWriter(str(self.folder / "tensorboard" / name)) as writer:

            def on_epoch(number: int, epoch: dict[str, float]) -> None:
                for key, value in epoch.items():
                    if key != "seconds" or not self.shared_device:
                        writer.add_scalar(key, value, number)

            def on_step() -> None:
                self.progress.advance()
                if self.deadline is not None and time.monotonic() > self.deadline:
                    raise OutOfTime

            run = train(
                config,
                self.task,
                read_test=stage == "final",
                shared_device=self.shared_device,
                checkpoint_path=self.folder / "runs" / f"{name}.pt",
                on_step=on_step,
                on_epoch=on_epoch,
            )
        run.environment = environment.describe(self.task.device) | {"shared_device": run.shared_device}
        return run


def describe_task(task: Task) -> dict[str, str | float | dict[str, int]]:
    """Return what reports say about a task."""
    return {"title": task.title, "metric": task.metric, "target": task.target, "sizes": task.sizes}


def describe(name: str, run: Run) -> str:
    """Return one line about a run."""
    if run.diverged:
        return f"{name}: diverged in epoch {len(run.epochs) + 1}"
    last = run.epochs[-1]
    seconds = sum(epoch["seconds"] for epoch in run.epochs)
    return (
        f"{name}: train loss {last['train_loss']:.4f}, "
        f"validation accuracy {last['validation_accuracy']:.2%}, score {run.validation_score:.2f}, "
        f"{seconds:.1f} s of training{' on a shared device' if run.shared_device else ''}"
    )
