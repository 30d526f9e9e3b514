"""The rows of a folder in a few short tables: `python -m bench.report.digest bench/results`."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.kernels import table
from bench.tools import jsonl


def main(argv: Sequence[str] | None = None) -> None:
    """Print what there is in the folder named."""
    (folder,) = sys.argv[1:] if argv is None else argv
    print("\n\n".join(tables(Path(folder))))


def tables(folder: Path) -> Iterator[str]:
    """Yield a table for each kind of row that was measured on a GPU, and trained runs."""
    timed = [row for row in jsonl.read(folder / "gpu.jsonl") if row["contender"] != row["baseline"]]
    if timed:
        yield "step or solve | mode, base | ratio | ms"
        yield _table(
            [
                f"{row['network']}: {row['contender']}",
                " ".join(row[key] for key in ("mode", "base") if key in row),
                row["ratio"],
                1e3 * row["median_s"],
            ]
            for row in timed
        )
    peers = jsonl.read(folder / "peers.jsonl")
    if peers:
        yield "step of another optimizer | over SGD's | ms"
        yield _table(
            [f"{row['network']}: {row['contender']}", row["ratio"], 1e3 * row["median_s"]] for row in peers
        )
    kernels = jsonl.read(folder / "kernels.jsonl")
    if kernels:
        yield "kernels over the fastest plain way, geometric mean\n" + table.table(kernels)
    runs = jsonl.read(folder / "training.jsonl")
    if runs:
        yield "training | epochs | diverged | validation | test"
        yield _table(
            [
                f"{run['task']['title']}: {run['config']['method']}, lr {run['config']['lr']:g}",
                len(run["epochs"]),
                run["diverged"],
                run["validation_score"],
                run["test_score"],
            ]
            for run in runs
        )


def _table(rows: Iterable[list[Any]]) -> str:
    return tabulate(rows, tablefmt="plain", floatfmt=".3f")


if __name__ == "__main__":
    main()
