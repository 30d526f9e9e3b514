"""Geometric means over the shapes, from rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Key = tuple[str, ...]


def best_rows(rows: Iterable[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    """Return the fastest kernel's row of every case; of repeated measurements the last counts."""
    last = {(*case_of(row), row["contender"]): row for row in rows if row["role"] == "fngd"}
    best: dict[Key, Mapping[str, Any]] = {}
    for row in last.values():
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
    """Return a line for each operator and dtype: shapes, mean and worst ratio, mean share of the roofline."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in best_rows(rows).values():
        groups.setdefault((row["op"], row["dtype"]), []).append(row)
    lines = [f"{'op':<20}{'dtype':<10}{'shapes':>7}{'ratio':>8}{'worst':>8}{'% of roofline':>15}"]
    for (op, dtype), best in groups.items():
        ratios = [row["ratio"] for row in best]
        shares = [row["percent_of_roofline"] for row in best if row["percent_of_roofline"]]
        share = f"{geometric_mean(shares):.0f}" if shares else "-"
        mean = geometric_mean(ratios)
        lines.append(f"{op:<20}{dtype:<10}{len(best):>7}{mean:>8.2f}{max(ratios):>8.2f}{share:>15}")
    return "\n".join(lines)
