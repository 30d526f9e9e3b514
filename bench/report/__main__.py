"""`python -m bench.report`: bench/results/REPORT.md, its tables and pictures from the result files alone."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.report.steps import step_sections
from bench.report.training import training_sections
from bench.tools import jsonl
from bench.tools.jsonl import Row

STEP_ROWS, TRAINING_ROWS = "peers.jsonl", "training.jsonl"
# What the paper's claims are about: listed as not measured until there are rows.
WANTED_STEPS = ("ResNet-18", "Transformer")
WANTED_STUDIES = ("cifar10", "cifar100", "multi30k")


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


if __name__ == "__main__":
    sys.exit(main())
