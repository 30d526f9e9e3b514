"""The table of the campaign, and its place in a page."""

from tabulate import tabulate

BEGIN, END = "<!-- begin table -->\n", "<!-- end table -->\n"


def table(tallies: dict[str, dict[str, dict[str, int]]]) -> str:
    """Return the tallies {area: {given: {outcome: cases}}} as Markdown tables, one per area."""
    parts = []
    for area, rows in tallies.items():
        lines = []
        for given, outcomes in rows.items():
            cases = sum(outcomes.values())
            happened = "; ".join(
                outcome if count == cases else f"{count:,} {outcome}" for outcome, count in outcomes.items()
            )
            lines.append((given, f"{cases:,}", happened))
        head = (area, "cases", "what happened")
        parts.append(tabulate(lines, head, "github", colalign=("left", "right", "left")))
    return "\n\n".join(parts) + "\n"


def put(page: str, text: str) -> str:
    """Return the page with the text between its two marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + text + END + rest.split(END)[1]
