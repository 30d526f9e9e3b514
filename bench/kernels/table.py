"""Geometric means over the shapes, from rows alone."""

from collections.abc import Iterable, Mapping
from typing import Any

Key = tuple[str, ...]


def last_rows(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the kernels' rows; of repeated measurements the last."""
    return list({(*case_of(row), row["contender"]): row for row in rows if row["role"] == "fngd"}.values())


def best_rows(rows: Iterable[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    """Return the fastest kernel's row of every case."""
    best: dict[Key, Mapping[str, Any]] = {}
    for row in last_rows(rows):
        case = case_of(row)
        if case not in best or row["median_s"] < best[case]["median_s"]:
            best[case] = row
    return best


def case_of(row: Mapping[str, Any]) -> Key:
    """Return what makes two rows comparable."""
    keys = ("gpu", "op", "dtype", "network", "layer", "batch")
    return tuple(str(row[key]) for key in keys)


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive values."""
    listed = list(values)
    product = 1.0
    for value in listed:
        product *= value ** (1 / len(listed))
    return product


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a line for each operator and dtype: shapes, ratios, share of the roofline.

    ratio: of the fastest kernel, geometric mean and worst; public: of the public operator, whatever it chose
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in last_rows(rows):
        groups.setdefault((row["op"], row["dtype"]), []).append(row)
    lines = [f"{'op':<20}{'dtype':<10}{'shapes':>7}{'ratio':>8}{'worst':>8}{'public':>8}{'% roofline':>15}"]
    for (op, dtype), last in groups.items():
        best = best_rows(last).values()
        ratios = [row["ratio"] for row in best]
        public = _mean(row["ratio"] for row in last if row["contender"] == "fngd")
        share = _mean(row["percent_of_roofline"] for row in best if row["percent_of_roofline"])
        mean, worst = _mean(ratios), f"{max(ratios):.2f}"
        lines.append(f"{op:<20}{dtype:<10}{len(best):>7}{mean:>8}{worst:>8}{public:>8}{share:>15}")
    return "\n".join(lines)


def _mean(values: Iterable[float]) -> str:
    listed = list(values)
    return f"{geometric_mean(listed):.2f}" if listed else "-"
