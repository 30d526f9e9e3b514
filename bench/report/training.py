"""Sections about training."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import PEERS
from bench.report.text import markdown, provenance
from bench.tools.jsonl import Row
from bench.train import figures, table
from bench.train.archive import parse_run
from bench.train.run import Run, RunConfig
from bench.train.study import SHARED, Results


@dataclass(frozen=True)
class Trained:
    """The runs of one study: those that tuned, and the final ones at the settings chosen.

    A method that had a single setting is among the final ones only.
    """

    task: Mapping[str, Any]
    tuning: dict[str, list[Run]]
    final: dict[str, list[Run]]

    @property
    def config(self) -> RunConfig:
        """Return the configuration of some run, whose common part holds of all."""
        return next(runs[0] for runs in itertools.chain(self.tuning.values(), self.final.values())).config

    @property
    def results(self) -> Results:
        """Return what the table is made of; steps are timed elsewhere."""
        tuning = {method: self.tuning.get(method, []) for method in self.final}
        settings = {method: runs[0].config for method, runs in self.final.items()}
        chosen = {method: (config.lr, config.damping) for method, config in settings.items()}
        return Results(tuning, chosen, self.final, steps={})


def studies(rows: list[Row]) -> list[Trained]:
    """Group runs into studies; of runs repeated with the same settings the last one counts."""
    latest = {json.dumps([row["stage"], row["config"]]): row for row in rows}
    found: dict[str, Trained] = {}
    for row in latest.values():
        key = json.dumps({name: row["config"][name] for name in sorted(SHARED)})
        study = found.setdefault(key, Trained(row["task"], {}, {}))
        run = parse_run(row)
        stage = study.tuning if row["stage"] == "tune" else study.final
        stage.setdefault(run.config.method, []).append(run)
    return list(found.values())


def training_sections(rows: list[Row], pictures: Path) -> Iterator[str]:
    """Yield tables and curves of every study."""
    if rows:
        yield "## Training"
        yield (
            "Every method tries the same number of learning rates (and dampings, where it has one) with the "
            "first seed; the best validation score chooses what is trained with all seeds. Mean ± standard "
            "deviation over seeds; seconds are of training alone."
        )
    for number, study in enumerate(studies(rows), start=1):
        config, task = study.config, study.task
        yield f"### {task['title']}: {config.model}, width {config.width}"
        sizes = ", ".join(f"{size} {name}" for name, size in task["sizes"].items())
        yield (
            f"{sizes}; {config.epochs} epochs, batch {config.batch_size}, {config.precision}, "
            f"on {config.device}; target: {task['target']:.0%} validation accuracy."
        )
        if study.final:
            seeds = sorted({run.config.seed for runs in study.final.values() for run in runs})
            title = f"{task['title']}, {config.model}; mean and range of seeds {', '.join(map(str, seeds))}"
            results = study.results
            lines = table.summarise(results, target=task["target"])
            yield table.table(lines, target=task["target"], metric=task["metric"], style="github")
            yield f"Seeds {', '.join(map(str, seeds))}."
            picture = pictures / f"training-{number}.png"
            figures.save_curves(picture, study.final, title=title, target=task["target"])
            yield f"![{title}](pictures/{picture.name})"
        if study.tuning:
            yield f"Validation {task['metric']} by learning rate, first seed, best damping:"
            yield tuning_table(study.tuning)
        untuned = [PEERS[method].label for method in study.final if method not in study.tuning]
        if untuned:
            yield f"Not tuned, with a single setting to try: {', '.join(untuned)}."
        weighed = [run for run in study.final.get("fngd", []) if run.coefficients]
        if weighed:
            picture = pictures / f"coefficients-{number}.png"
            figures.save_coefficients(picture, weighed[0].coefficients or {}, title=task["title"])
            yield coefficient_sentence(weighed[0].coefficients or {})
            yield f"![Coefficients by label](pictures/{picture.name})"
        runs = [run for group in (*study.tuning.values(), *study.final.values()) for run in group]
        yield provenance([run.environment for run in runs if run.environment])


def tuning_table(tuning: Mapping[str, list[Run]]) -> str:
    """Return the best validation score of each method at each learning rate it tried."""
    rates = sorted({run.config.lr for runs in tuning.values() for run in runs})
    lines = []
    for method, runs in tuning.items():
        line = {"method": PEERS[method].label}
        for lr in rates:
            tried = [run for run in runs if run.config.lr == lr]
            scores = [run.validation_score for run in tried if run.validation_score is not None]
            line[f"{lr:g}"] = f"{max(scores):.2f}" if scores else "diverged" if tried else ""
        lines.append(line)
    return markdown(lines)


def coefficient_sentence(coefficients: Mapping[str, list[float]]) -> str:
    """Return medians and middle halves of the coefficients, of samples with kept and with replaced labels."""
    parts = []
    for name, values in coefficients.items():
        low, middle, high = (values[round(share * (len(values) - 1))] for share in (0.25, 0.5, 0.75))
        parts.append(f"{name} labels {middle:.3f} ({low:.3f} to {high:.3f})")
    return f"FNGD's coefficients, mean over layers, median and middle half: {'; '.join(parts)}."
