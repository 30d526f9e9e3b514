"""Finished runs on file: a JSON file each, or rows of a file of results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.training import Run, RunConfig


def save_run(path: Path, run: Run) -> None:
    """Write a run as JSON, whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(run), allow_nan=False))
    os.replace(unfinished, path)


def load_run(path: Path) -> Run:
    """Read what `save_run` wrote."""
    return parse_run(json.loads(path.read_text()))


def parse_run(row: Mapping[str, Any]) -> Run:
    """Run of a result row, which also says its stage and task."""
    values = {name: value for name, value in row.items() if name not in ("stage", "task")}
    return Run(**{**values, "config": RunConfig(**values["config"])})


def recorded(rows: Path | None) -> dict[tuple[str, RunConfig], Run]:
    """Finished runs of a file of rows by stage and configuration; none when it is not there."""
    if rows is None or not rows.exists():
        return {}
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    runs = [(row["stage"], parse_run(row)) for row in found]
    return {(stage, run.config): run for stage, run in runs}
