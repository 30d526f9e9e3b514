"""The final table and results.json, both made from the raw runs."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from bench import environment
from bench.optimizers import METHODS
from bench.study import Results, Study
from bench.training import Run
from bench.workloads import Workload


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; `std` is None for a single seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        """Spread of `values`, None when there are none."""
        if not values:
            return None
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """One method's figures; accuracies are those after the last epoch, seconds are of training alone."""

    method: str
    lr: float
    lr_at_edge: bool
    seeds: int
    diverged: int
    validation_accuracy: Spread | None
    test_accuracy: Spread | None
    epochs_to_target: Spread | None
    reached_target: int
    solving_epoch_seconds: float | None
    later_epoch_seconds: float | None
    solving_step_over_sgd: float | None
    later_step_over_sgd: float | None


def summarise(results: Results, *, target: float) -> list[Row]:
    """One row per method; `target` is the validation accuracy whose first epoch is looked for."""
    return [_row(results, method, runs, target) for method, runs in results.final.items()]


def _row(results: Results, method: str, runs: list[Run], target: float) -> Row:
    lr = results.chosen[method]
    rates = sorted(run.config.lr for run in results.tuning[method])
    done = [run for run in runs if not run.diverged]
    to_target = [epoch for run in done if (epoch := first_epoch_at(run, target)) is not None]
    solving, later = _epoch_seconds(method, done)
    solving_step, later_step = _step_ratios(results, method)
    return Row(
        method=method,
        lr=lr,
        lr_at_edge=len(rates) > 1 and lr in (rates[0], rates[-1]),
        seeds=len(runs),
        diverged=len(runs) - len(done),
        validation_accuracy=Spread.of([run.epochs[-1]["validation_accuracy"] for run in done]),
        test_accuracy=Spread.of([run.test_accuracy for run in done if run.test_accuracy is not None]),
        epochs_to_target=Spread.of([float(epoch) for epoch in to_target]),
        reached_target=len(to_target),
        solving_epoch_seconds=solving,
        later_epoch_seconds=later,
        solving_step_over_sgd=solving_step,
        later_step_over_sgd=later_step,
    )


def first_epoch_at(run: Run, target: float) -> int | None:
    """Number, from 1, of the first epoch whose validation accuracy is `target` or more."""
    for number, epoch in enumerate(run.epochs, start=1):
        if epoch["validation_accuracy"] >= target:
            return number
    return None


def _epoch_seconds(method: str, runs: list[Run]) -> tuple[float | None, float | None]:
    """Median seconds of the epochs with solves and of those without."""
    first = [run.epochs[0]["seconds"] for run in runs]
    rest = [epoch["seconds"] for run in runs for epoch in run.epochs[1:]]
    solves = METHODS[method].solves
    if solves == "never":
        return None, _median(first + rest)
    if solves == "always":
        return _median(first + rest), None
    return _median(first), _median(rest)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _step_ratios(results: Results, method: str) -> tuple[float | None, float | None]:
    base = results.steps["sgd"].median
    solving = results.steps.get(f"{method} solving")
    later = results.steps.get(method)
    return (
        solving.median / base if solving is not None else None,
        later.median / base if later is not None else None,
    )


def table(rows: list[Row], *, target: float) -> str:
    """The rows as a text table."""
    headers = (
        "method",
        "lr",
        "validation %",
        "test %",
        f"epochs to {target:.1%}",
        "s / epoch\nsolving",
        "s / epoch\nlater",
        "step / SGD\nsolving",
        "step / SGD\nlater",
    )
    body = [
        (
            METHODS[row.method].label
            + (f" ({row.diverged} of {row.seeds} diverged)" if row.diverged else ""),
            f"{row.lr:g}" + ("*" if row.lr_at_edge else ""),
            _spread(row.validation_accuracy, scale=100, digits=2),
            _spread(row.test_accuracy, scale=100, digits=2),
            _spread(row.epochs_to_target, scale=1, digits=1)
            + ("" if row.reached_target == row.seeds else f" ({row.reached_target} of {row.seeds} seeds)"),
            _number(row.solving_epoch_seconds, 3),
            _number(row.later_epoch_seconds, 3),
            _number(row.solving_step_over_sgd, 2),
            _number(row.later_step_over_sgd, 2),
        )
        for row in rows
    ]
    text = tabulate(
        body, headers=headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1))
    )
    if any(row.lr_at_edge for row in rows):
        text += "\n* the best rate is the first or last one tried: a wider grid may do better"
    return text


def _spread(spread: Spread | None, *, scale: float, digits: int) -> str:
    if spread is None:
        return "-"
    mean = f"{scale * spread.mean:.{digits}f}"
    return mean if spread.std is None else f"{mean} ± {scale * spread.std:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def write_json(
    path: Path, study: Study, workload: Workload, results: Results, rows: list[Row], target: float
) -> None:
    """Everything measured, with what it was measured on."""
    content = {
        "study": asdict(study),
        "workload": {
            "title": workload.title,
            "train": len(workload.train),
            "validation": len(workload.validation),
            "test": len(workload.test),
        },
        "target": target,
        "environment": environment.describe(torch.device(study.device)),
        "chosen": results.chosen,
        "table": [asdict(row) for row in rows],
        "steps": {
            name: {
                "median_s": timing.median,
                "p20_s": timing.p20,
                "p80_s": timing.p80,
                "rounds": len(timing.samples),
            }
            for name, timing in results.steps.items()
        },
        "tuning": {method: [asdict(run) for run in runs] for method, runs in results.tuning.items()},
        "final": {method: [asdict(run) for run in runs] for method, runs in results.final.items()},
    }
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1, allow_nan=False))
    unfinished.replace(path)
