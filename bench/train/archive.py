"""Finished runs on file: a JSON file each, or rows of a file of results."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.train.run import Run, RunConfig

NO_RUN = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What JSON of another kind raises when a run is read out of it."""


def save_run(path: Path, run: Run) -> None:
    """Write a run as JSON, whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(run), allow_nan=False))
    os.replace(unfinished, path)


def load_run(path: Path) -> Run:
    """Read what `save_run` wrote.

    Raises:
        ValueError: A file that holds anything else.
    """
    try:
        return parse_run(json.loads(path.read_text()))
    except NO_RUN as error:
        raise ValueError(f"output: {path} is not a finished run ({error})") from error


def parse_run(row: Mapping[str, Any]) -> Run:
    """Return the run of a result row, which also says its stage and task."""
    values = {name: value for name, value in row.items() if name not in ("stage", "task")}
    return Run(**{**values, "config": RunConfig(**values["config"])})


def recorded(rows: Path | None) -> dict[tuple[str, RunConfig], Run]:
    """Return the runs in a file of rows by stage and configuration, none when it is not there.

    Raises:
        ValueError: A file that holds anything else, such as half a line.
    """
    if rows is None or not rows.exists():
        return {}
    runs = {}
    for number, line in enumerate(rows.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            run = parse_run(row)
            runs[row["stage"], run.config] = run
        except NO_RUN as error:
            raise ValueError(f"rows: line {number} of {rows} is not a run ({error})") from error
    return runs
