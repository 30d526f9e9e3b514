"""The table of a study and its results.json, both made from the raw runs."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from bench.peers import PEERS, training_of
from bench.tools import environment
from bench.train.run import Run
from bench.train.study import Point, Results, Study, describe_task
from bench.workloads import Task


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; `std` is None for a single seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        """Return the spread of `values`, None when there are none."""
        if not values:
            return None
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """One method's figures; scores are those after the last epoch, seconds are of training alone.

    Attributes:
        shared_device: Runs whose seconds are left out, because others shared the device.
    """

    method: str
    lr: float
    damping: float | None
    at_edge: bool
    seeds: int
    diverged: int
    shared_device: int
    validation_score: Spread | None
    test_score: Spread | None
    epochs_to_target: Spread | None
    seconds_to_target: Spread | None
    reached_target: int
    solving_epoch_seconds: float | None
    later_epoch_seconds: float | None
    solving_step_over_sgd: float | None
    later_step_over_sgd: float | None


def summarise(results: Results, *, target: float) -> list[Row]:
    """Return one row per method; `target` is the validation accuracy whose first epoch is looked for."""
    return [_row(results, method, runs, target) for method, runs in results.final.items()]


def _row(results: Results, method: str, runs: list[Run], target: float) -> Row:
    lr, damping = results.chosen[method]
    done = [run for run in runs if not run.diverged]
    to_target = [(run, epoch) for run in done if (epoch := first_epoch_at(run, target)) is not None]
    solving, later = _epoch_seconds(method, [run for run in done if not run.shared_device])
    solving_step, later_step = _step_ratios(results, method)
    return Row(
        method=method,
        lr=lr,
        damping=damping,
        at_edge=_at_edge(results.chosen[method], results.tuning[method]),
        seeds=len(runs),
        diverged=len(runs) - len(done),
        shared_device=sum(run.shared_device for run in done),
        validation_score=Spread.of(
            [run.validation_score for run in done if run.validation_score is not None]
        ),
        test_score=Spread.of([run.test_score for run in done if run.test_score is not None]),
        epochs_to_target=Spread.of([float(epoch) for _, epoch in to_target]),
        seconds_to_target=Spread.of(
            [
                sum(entry["seconds"] for entry in run.epochs[:epoch])
                for run, epoch in to_target
                if not run.shared_device
            ]
        ),
        reached_target=len(to_target),
        solving_epoch_seconds=solving,
        later_epoch_seconds=later,
        solving_step_over_sgd=solving_step,
        later_step_over_sgd=later_step,
    )


def _at_edge(chosen: Point, runs: list[Run]) -> bool:
    """Return whether a rate or damping beyond those tried may be better."""
    tried = [{run.config.lr for run in runs}, {run.config.damping or 0.0 for run in runs}]
    values = (chosen[0], chosen[1] or 0.0)
    return any(
        len(grid) > 1 and value in (min(grid), max(grid)) for value, grid in zip(values, tried, strict=True)
    )


def first_epoch_at(run: Run, target: float) -> int | None:
    """Return the number, from 1, of the first epoch whose validation accuracy is `target` or more."""
    for number, epoch in enumerate(run.epochs, start=1):
        if epoch["validation_accuracy"] >= target:
            return number
    return None


def _epoch_seconds(method: str, runs: list[Run]) -> tuple[float | None, float | None]:
    """Return the median seconds of the epochs with solves and of those without."""
    first = [run.epochs[0]["seconds"] for run in runs]
    rest = [epoch["seconds"] for run in runs for epoch in run.epochs[1:]]
    solves = training_of(method).solves
    if solves == "never":
        return None, _median(first + rest)
    if solves == "always":
        return _median(first + rest), None
    return _median(first), _median(rest)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _step_ratios(results: Results, method: str) -> tuple[float | None, float | None]:
    if "sgd" not in results.steps:
        return None, None
    base = results.steps["sgd"].median
    solving = results.steps.get(f"{method} solving")
    later = results.steps.get(method)
    return (
        solving.median / base if solving is not None else None,
        later.median / base if later is not None else None,
    )


def table(rows: list[Row], *, target: float, metric: str, style: str = "simple") -> str:
    """Return the rows as a text table in one of tabulate's styles, without columns that have no figure."""
    body = [
        {
            "method": PEERS[row.method].label
            + (f" ({row.diverged} of {row.seeds} diverged)" if row.diverged else ""),
            "lr": f"{row.lr:g}" + ("*" if row.at_edge else ""),
            "damping": _number(row.damping, "g"),
            f"validation {metric}": _spread(row.validation_score, digits=2),
            f"test {metric}": _spread(row.test_score, digits=2),
            f"epochs to {target:.1%}": _spread(row.epochs_to_target, digits=1)
            + ("" if row.reached_target == row.seeds else f" ({row.reached_target} of {row.seeds} seeds)"),
            f"s to {target:.1%}": _spread(row.seconds_to_target, digits=1),
            "s / epoch, solving": _number(row.solving_epoch_seconds, ".3f"),
            "s / epoch, later": _number(row.later_epoch_seconds, ".3f"),
            "step / SGD, solving": _number(row.solving_step_over_sgd, ".2f"),
            "step / SGD, later": _number(row.later_step_over_sgd, ".2f"),
        }
        for row in rows
    ]
    kept = [key for key in body[0] if any(row[key] != "-" for row in body)]
    text = tabulate(
        [[row[key] for key in kept] for row in body],
        # A text table is as wide as its headers.
        headers=[key.replace(", ", "\n") if style == "simple" else key for key in kept],
        tablefmt=style,
        disable_numparse=True,
        colalign=("left", *["right"] * (len(kept) - 1)),
    )
    plain = style == "simple"
    notes = []
    if any(row.at_edge for row in rows):
        star = "*" if plain else "\\*"
        notes.append(f"{star} the best setting is the first or last one tried: a wider grid may do better")
    shared = [
        f"{PEERS[row.method].label} {row.shared_device} of {row.seeds}" for row in rows if row.shared_device
    ]
    if shared:
        notes.append(f"without the seconds of runs that shared the device with others: {', '.join(shared)}")
    return ("\n" if plain else "\n\n").join([text, *notes])


def _spread(spread: Spread | None, *, digits: int) -> str:
    if spread is None:
        return "-"
    mean = f"{spread.mean:.{digits}f}"
    return mean if spread.std is None else f"{mean} ± {spread.std:.{digits}f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def write_json(
    path: Path, study: Study, task: Task, results: Results, rows: list[Row], target: float
) -> None:
    """Write everything measured, with what it was measured on."""
    content = {
        "study": asdict(study),
        "task": describe_task(task),
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
