"""Results on file: one JSON object a line, appended and never overwritten."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).resolve().parents[1] / "results"


def append(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Add `rows` at the end of `path`, in one write, so that processes that append at once mix no lines.

    Raises:
        OSError: Where they do not fit.
    """
    content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a buffer, which would write in parts.
    with path.open("ab", buffering=0) as file:
        written = file.write(content)
    if written != len(content):
        raise OSError(f"{path}: {written} of {len(content)} bytes written")


def read(path: Path) -> list[Row]:
    """Return the rows of `path`, none when it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
