"""Pictures: error and loss over seconds and steps; a solution, its prediction and the error of that."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from torch import nn

from bench.peers import PEERS, pinn_of
from bench.pinn.archive import History
from bench.pinn.problems import Equation
from bench.pinn.problems.base import predicted
from bench.pinn.study import Final, describe
from bench.tools.figures import blank

GRID = 101
PLOTTED_POINTS = 200


def save_curves(path: Path, title: str, finals: Mapping[str, Final]) -> None:
    """Draw the final runs that did not diverge: line = median over the seeds, band = lowest to highest."""
    figure = blank(11, 7.5)
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for method, final in finals.items():
        label = f"{PEERS[method].label} ({describe(final.setting)})"
        for row, quantity in enumerate(("test_error", "loss")):
            for column, clock in enumerate(("seconds", "step")):
                draw(axes[row, column], method, final.ended, clock, quantity, label)
    axes[0, 0].set_ylabel("relative L2 error at fresh points")
    axes[1, 0].set_ylabel("loss at the training points")
    axes[1, 0].set_xlabel("CPU seconds of training (evaluation excluded)")
    axes[1, 1].set_xlabel("steps")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def save_fields(path: Path, title: str, problem: Equation, networks: Mapping[str, nn.Module]) -> None:
    """Draw a solution in two variables, the last network's prediction and every network's error."""
    figure = blank(3.6 * (len(networks) + 2), 3.6)
    draw_fields(figure.subplots(1, len(networks) + 2), problem, networks)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def save_side_by_side(
    path: Path,
    title: str,
    problem: Equation,
    networks: Mapping[str, nn.Module],
    histories: Mapping[str, History],
) -> None:
    """Draw the error over seconds of one run of each method above the fields of `save_fields`."""
    figure = blank(3.6 * (len(networks) + 2), 7)
    above, below = np.ravel(np.asarray(figure.subfigures(2, 1)))
    axes = above.subplots(1, 2, sharey=True)
    for axis, clock, name in zip(axes, ("seconds", "step"), ("CPU seconds", "steps"), strict=True):
        for method, history in histories.items():
            draw(axis, method, (history,), clock, "test_error", PEERS[method].label)
        axis.set_xlabel(name)
    axes[0].set_ylabel("relative L2 error at fresh points")
    axes[0].legend()
    draw_fields(below.subplots(1, len(networks) + 2), problem, networks)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def draw(
    axis: Axes, method: str, histories: Sequence[History], clock: str, quantity: str, label: str
) -> None:
    """Draw a quantity of the runs of a method over a clock that all of them cover, on logarithmic axes."""
    if not histories:
        return
    moving = [[entry for entry in history if entry.step > 0] for history in histories]
    clocks = [np.array([getattr(entry, clock) for entry in entries], dtype=float) for entries in moving]
    curves = [np.array([getattr(entry, quantity) for entry in entries]) for entries in moving]
    shared = np.geomspace(max(c[0] for c in clocks), min(c[-1] for c in clocks), PLOTTED_POINTS)
    values = np.stack([np.interp(np.log(shared), np.log(c), v) for c, v in zip(clocks, curves, strict=True)])
    style = pinn_of(method).style
    axis.plot(shared, np.median(values, axis=0), label=label, linewidth=1.8, **style)
    axis.fill_between(
        shared,
        np.min(values, axis=0),
        np.max(values, axis=0),
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(visible=True, linewidth=0.4, alpha=0.5)


def draw_fields(axes: np.ndarray, problem: Equation, networks: Mapping[str, nn.Module]) -> None:
    """Draw the solution, the prediction of the last network, and the errors of all on one scale."""
    (x0, x1), (y0, y1) = zip(problem.low, problem.high, strict=True)
    columns, rows = torch.meshgrid(
        torch.linspace(x0, x1, GRID, dtype=torch.float64),
        torch.linspace(y0, y1, GRID, dtype=torch.float64),
        indexing="xy",
    )
    points = torch.stack([columns.flatten(), rows.flatten()], dim=1)
    values = problem.solution(points)
    outputs = {name: predicted(network, points, values) for name, network in networks.items()}
    exact = _on_grid(values)
    fields = {name: _on_grid(output) for name, output in outputs.items()}
    errors = {name: _on_grid(output - values).abs() for name, output in outputs.items()}
    highest = max(error.max().item() for error in errors.values())
    lowest = min(error.median().item() for error in errors.values()) / 10
    last = list(networks)[-1]
    shown = [("solution", exact), (f"{PEERS[last].label}: prediction", fields[last])]
    colours = {"cmap": "viridis", "vmin": exact.min().item(), "vmax": exact.max().item()}
    error_colours = {"cmap": "magma", "norm": LogNorm(max(lowest, 1e-16), max(highest, 1e-15))}
    for axis, (title, field) in zip(axes, shown, strict=False):
        _field(axis, title, field, (x0, x1, y0, y1), colours)
    for axis, (name, error) in zip(axes[2:], errors.items(), strict=True):
        _field(axis, f"{PEERS[name].label}: |error|", error, (x0, x1, y0, y1), error_colours)


def _on_grid(values: torch.Tensor) -> torch.Tensor:
    """Return values as a picture, of vectors their length."""
    return (values if values.ndim == 1 else values.norm(dim=1)).view(GRID, GRID)


def _field(
    axis: Axes,
    title: str,
    field: torch.Tensor,
    extent: tuple[float, float, float, float],
    colours: Mapping[str, Any],
) -> None:
    image = axis.imshow(field.numpy(), origin="lower", extent=extent, aspect="auto", **colours)
    axis.figure.colorbar(image, ax=axis, shrink=0.8)
    axis.set_title(title, fontsize="medium")
