"""Sections about the time of a step."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.peers import PEERS, training_of
from bench.report.text import hardware, markdown, provenance
from bench.tools.figures import blank
from bench.tools.jsonl import Row

CLAIMS = {"kfac": 2.4, "shampoo": 5.7}
"""What the paper says of a method's time over its own."""


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
        yield markdown(table)
        yield _claims(group)
        picture = pictures / f"steps-{number}.png"
        save_ratios(picture, {line["step of"]: float(line["over SGD's"]) for line in table}, network)
        yield f"![{network}](pictures/{picture.name})"
        yield provenance(group)


def _latest(rows: list[Row]) -> list[list[Row]]:
    """Return the rows of each process, without those whose contenders were all timed again later."""
    processes: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        processes.setdefault((row["network"], hardware(row), row["date"]), []).append(row)
    kept: list[list[Row]] = []
    again: set[tuple[str, str, str]] = set()
    for (network, machine, _), group in sorted(processes.items(), reverse=True):
        timed = {(network, machine, row["contender"]) for row in group}
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


def save_ratios(path: Path, ratios: Mapping[str, float], title: str) -> None:
    """Draw a bar for each contender: its time over SGD's."""
    figure = blank(8, 0.6 + 0.32 * len(ratios))
    axis = figure.subplots()
    ordered = dict(sorted(ratios.items(), key=lambda item: -item[1]))
    bars = axis.barh(list(ordered), list(ordered.values()), color="#0072B2")
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.axvline(1, color="#000000", linewidth=1)
    axis.margins(x=0.12)
    axis.set_xlabel("time of a step over SGD's")
    axis.set_title(title)
    figure.savefig(path, dpi=130)
