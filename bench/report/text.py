"""What all sections of the page are written with."""

from collections.abc import Iterable, Mapping
from typing import Any

from tabulate import tabulate


def markdown(lines: list[dict[str, str]]) -> str:
    """Return lines {column: text} as a Markdown table, all but its first column aligned to the right."""
    return tabulate(
        lines,
        headers="keys",
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", *["right"] * (len(lines[0]) - 1)),
    )


def provenance(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return commits, hardware and versions behind a table."""
    rows = list(rows)
    commits = dict.fromkeys(
        f"{row['commit']}{' with uncommitted changes' if row['uncommitted_changes'] else ''}" for row in rows
    )
    machines = dict.fromkeys(f"{hardware(row)}, torch {row['torch']}" for row in rows)
    dates = sorted(row["date"][:10] for row in rows)
    loads = [row["load"] for row in rows]
    period = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return (
        f"*Commit {', '.join(commits)}; {'; '.join(machines)}; {period}; "
        f"load average {min(loads):g} to {max(loads):g}.*"
    )


def hardware(row: Mapping[str, Any]) -> str:
    """Return the GPU of a row, else its processor and threads."""
    return row["gpu"] or f"{row['cpu']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
