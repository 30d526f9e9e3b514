"""`python -m bench.report`: bench/results/REPORT.md, its tables and pictures from the result files alone."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.peers import PEERS, training_of
from bench.tools import jsonl
from bench.train import figures, table
from bench.train.archive import parse_run
from bench.train.run import Run, RunConfig
from bench.train.study import SHARED, Results

STEP_ROWS, TRAINING_ROWS = "peers.jsonl", "training.jsonl"
# What the paper's claims are about: listed as not measured until there are rows.
WANTED_STEPS = ("ResNet-18", "Transformer")
WANTED_STUDIES = ("cifar10", "cifar100", "multi30k")
CLAIMS = {"kfac": 2.4, "shampoo": 5.7}
"""What the paper says of a method's time over its own."""

Row = dict[str, Any]


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


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=jsonl.RESULTS, help="folder of the result files")
    folder = parser.parse_args(argv).results
    peers, training = jsonl.read(folder / STEP_ROWS), jsonl.read(folder / TRAINING_ROWS)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    page = "\n\n".join(
        [
            "# Report",
            f"Written by `python -m bench.report` from `{STEP_ROWS}` and `{TRAINING_ROWS}`; every table "
            "names the commit and the hardware its figures come from. "
            "How steps are timed: [README](README.md).",
            *step_sections(peers, pictures),
            *training_sections(training, pictures),
            *unmeasured(peers, training),
        ]
    )
    (folder / "REPORT.md").write_text(page + "\n")
    print(folder / "REPORT.md")
    return 0


def step_sections(rows: list[Row], pictures: Path) -> Iterator[str]:
    """Yield a table and a picture of each process that timed something last on its network and machine."""
    if rows:
        yield "## Time of a step"
        yield (
            "Seconds of a whole step in turns with all others in one process: median, and 20th and 80th "
            "percentile. A method that refreshes a preconditioner every so many steps has the average over "
            "that period. FNGD average: one epoch with solves, then without."
        )
    for number, group in enumerate(_latest(rows), start=1):
        network = group[0]["network"]
        table = [
            {
                "step of": step_label(row["contender"], row.get("epochs")),
                "over SGD's": f"{row['ratio']:.2f}",
                "ms": f"{1e3 * row['median_s']:.2f}",
                "20 % - 80 %": f"{1e3 * row['p20_s']:.2f} - {1e3 * row['p80_s']:.2f}"
                if "p20_s" in row
                else "",
                "peak MB": f"{row['peak_bytes'] / 2**20:.1f}",
            }
            for row in group
        ]
        yield f"### {network}"
        yield _markdown(table)
        yield _claims(group)
        picture = pictures / f"steps-{number}.png"
        figures.save_ratios(picture, {line["step of"]: float(line["over SGD's"]) for line in table}, network)
        yield f"![{network}](pictures/{picture.name})"
        yield provenance(group)


def _latest(rows: list[Row]) -> list[list[Row]]:
    """Return the rows of each process that has something which none after it timed again."""
    processes: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        processes.setdefault((row["network"], _hardware(row), row["date"]), []).append(row)
    kept: list[list[Row]] = []
    again: set[tuple[str, str, str]] = set()
    for (network, hardware, _), group in sorted(processes.items(), reverse=True):
        timed = {(network, hardware, row["contender"]) for row in group}
        if not timed <= again:
            kept.append(group)
        again |= timed
    return kept[::-1]


def step_label(contender: str, epochs: int | None) -> str:
    """Return the name of a contender for tables."""
    method, _, phase = contender.partition(" ")
    label = PEERS[method].label
    if phase == "average":
        return f"{label}, average of {epochs} epochs"
    if training_of(method).solves == "first epoch":
        return f"{label}, {phase or 'steady'}"
    return label


def _claims(rows: list[Row]) -> str:
    seconds = {row["contender"]: row["median_s"] for row in rows}
    own = seconds.get("fngd average")
    lines = [
        f"- {PEERS[name].label} over FNGD average: {seconds[name] / own:.2f} (in the paper: {claim})"
        for name, claim in CLAIMS.items()
        if own and name in seconds
    ]
    return "\n".join(lines) or "No claim of the paper can be read off this table."


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
    return _markdown(lines)


def coefficient_sentence(coefficients: Mapping[str, list[float]]) -> str:
    """Return medians and middle halves of the coefficients, of samples with kept and with replaced labels."""
    parts = []
    for name, values in coefficients.items():
        low, middle, high = (values[round(share * (len(values) - 1))] for share in (0.25, 0.5, 0.75))
        parts.append(f"{name} labels {middle:.3f} ({low:.3f} to {high:.3f})")
    return f"FNGD's coefficients, mean over layers, median and middle half: {'; '.join(parts)}."


def unmeasured(peers: list[Row], training: list[Row]) -> Iterator[str]:
    """Yield what the paper's claims need and no row has."""
    timed = {row["network"] for row in peers if row["gpu"]}
    trained = {row["config"]["data"] for row in training if row["config"]["device"] == "cuda"}
    missing = [
        *(f"steps of {name} on a GPU" for name in WANTED_STEPS if not any(n.startswith(name) for n in timed)),
        *(f"training on {name} on a GPU" for name in WANTED_STUDIES if name not in trained),
    ]
    if missing:
        yield "## Not measured"
        yield "\n".join(f"- {what}" for what in missing)


def provenance(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return commits, hardware and versions behind a table."""
    rows = list(rows)
    commits = dict.fromkeys(
        f"{row['commit']}{' with uncommitted changes' if row['uncommitted_changes'] else ''}" for row in rows
    )
    machines = dict.fromkeys(f"{_hardware(row)}, torch {row['torch']}" for row in rows)
    dates = sorted(row["date"][:10] for row in rows)
    loads = [row["load"] for row in rows]
    period = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return (
        f"*Commit {', '.join(commits)}; {'; '.join(machines)}; {period}; "
        f"load average {min(loads):g} to {max(loads):g}.*"
    )


def _hardware(row: Mapping[str, Any]) -> str:
    return row["gpu"] or f"{row['cpu']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def _markdown(lines: list[dict[str, str]]) -> str:
    return tabulate(
        lines,
        headers="keys",
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", *["right"] * (len(lines[0]) - 1)),
    )


if __name__ == "__main__":
    sys.exit(main())
