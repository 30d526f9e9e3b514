"""The table of a problem: final errors, and how much sooner or lower than Adam and Adam + L-BFGS."""

import statistics
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from bench.peers import PEERS
from bench.pinn.archive import History
from bench.pinn.problems import Problem
from bench.pinn.study import Final, describe, outcome

BASELINES = ("adam", "adam-lbfgs")


def table(problem: Problem, finals: Mapping[str, Final]) -> str:
    """Return a Markdown table, a row of each method: medians and ranges of the seeds that did not diverge."""
    errors = {name: _errors(problem, final) for name, final in finals.items()}
    baselines = [name for name in BASELINES if errors.get(name)]
    rows = []
    for name, final in finals.items():
        row = {
            "method": PEERS[name].label,
            "setting": describe(final.setting) + ("*" if at_edge(final) else ""),
            "error": spread(errors[name]),
            **{
                f"{PEERS[baseline].label} / it": _ratio(errors[baseline], errors[name])
                for baseline in baselines
            },
        }
        if "adam" in baselines and not problem.early_stopping:
            target = statistics.median(errors["adam"])
            row["seconds to Adam's error"] = _time_to(target, final)
        ended = final.ended
        row["steps"] = spread([history[-1].step for history in ended])
        if problem.coefficient is not None:
            found = [history[-1].coefficient_error for history in ended]
            row["coefficient's error"] = spread([error for error in found if error is not None])
        if problem.early_stopping:
            row["training error at the end"] = spread([history[-1].loss ** 0.5 for history in ended])
            row["validation error at the end"] = spread([history[-1].validation_error for history in ended])
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def spread(values: Sequence[float]) -> str:
    """Return `median (lowest to highest)`."""
    if not values:
        return "all diverged"
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def at_edge(final: Final) -> bool:
    """Return whether a better setting may lie beyond those tried, where one number was tuned."""
    numbers = [next(iter(setting.values())) for setting in final.tried if len(setting) == 1]
    return len(numbers) > 1 and next(iter(final.setting.values())) in (min(numbers), max(numbers))


def time_to(target: float, history: History) -> float | None:
    """Return the seconds until the test error was `target` or less, None when it never was."""
    return next((entry.seconds for entry in history if entry.test_error <= target), None)


def _errors(problem: Problem, final: Final) -> list[float]:
    return [outcome(problem, history).test_error for history in final.ended]


def _ratio(baseline: Sequence[float], errors: Sequence[float]) -> str:
    return f"{statistics.median(baseline) / statistics.median(errors):.2g}" if errors else ""


def _time_to(target: float, final: Final) -> str:
    times = [time_to(target, history) for history in final.histories]
    reached = [seconds for seconds in times if seconds is not None]
    if not reached:
        return "never"
    missed = f", {len(times) - len(reached)} never" if len(reached) < len(times) else ""
    return spread(reached) + missed
