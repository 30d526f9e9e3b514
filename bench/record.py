"""Results on file: one JSON object a line, appended and never overwritten."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def append(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Add `rows` at the end of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")
