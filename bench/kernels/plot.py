"""Pictures of a results file: speed-up and share of the roofline per shape, one picture an operator."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.kernels import table
from bench.tools.figures import blank

FASTER, SLOWER, SHARE = "#0072B2", "#D55E00", "#56B4E9"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the file, draw a picture of every operator and dtype into the folder."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in table.best_rows(rows).values():
        groups.setdefault((row["op"], row["dtype"]), []).append(row)
    options.folder.mkdir(parents=True, exist_ok=True)
    for (op, dtype), best in groups.items():
        save(options.folder / f"{op.replace(' ', '-')}-{dtype}.png", f"{op}, {dtype}", best)


def save(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the baseline's time over the fastest kernel's, and the kernel's share of the roofline."""
    rows = sorted(rows, key=lambda row: -row["ratio"])
    figure = blank(12, 1.6 + 0.24 * len(rows))
    speed, share = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    speed_ups = [1 / row["ratio"] for row in rows]
    colours = [FASTER if value >= 1 else SLOWER for value in speed_ups]
    # Bars would start at zero, which a logarithm has not.
    speed.hlines(places, 1, speed_ups, colors=colours)
    speed.scatter(speed_ups, places, c=colours, zorder=2)
    speed.set_xscale("log")
    speed.xaxis.set_major_formatter("{x:g}")
    speed.xaxis.set_minor_formatter("{x:g}")
    speed.axvline(1, color="#666666", linewidth=1)
    speed.set_yticks(places, [f"{row['network']}: {row['layer']}, N={row['batch']}" for row in rows])
    speed.set_xlabel("speed-up over the fastest plain torch")
    share.barh(places, [row["percent_of_roofline"] or 0 for row in rows], color=SHARE)
    share.set_xlim(0, 100)
    share.set_xlabel("% of the roofline" if rows[0]["percent_of_roofline"] else "no roofline for this device")
    for row, place in zip(rows, places, strict=True):
        share.annotate(f" {row['contender']} {row['bound'] or ''}", (0, place), va="center", fontsize=7)
    figure.suptitle(f"{title}, {rows[0]['gpu'] or rows[0]['cpu']}")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
