"""Pictures: curves over epochs and over seconds, coefficients by label."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from bench.peers import PEERS, training_of
from bench.tools.figures import blank
from bench.train.run import Run
from bench.train.study import describe_point


def save_curves(path: Path, final: Mapping[str, list[Run]], *, title: str, target: float) -> None:
    """Draw the final runs of each method: line = mean over seeds, band = lowest to highest seed.

    Runs that shared the device are not drawn over seconds.
    """
    done = {method: [run for run in runs if not run.diverged] for method, runs in final.items()}
    timed = {method: [run for run in runs if not run.shared_device] for method, runs in done.items()}
    columns = 2 if any(timed.values()) else 1
    figure = blank(5.5 * columns, 7.5)
    axes = figure.subplots(2, columns, sharex="col", sharey="row", squeeze=False)
    for method, runs in done.items():
        if runs:
            _draw(axes[:, 0], method, runs, np.arange(1, len(runs[0].epochs) + 1))
    for method, runs in timed.items():
        if runs:
            seconds = [[epoch["seconds"] for epoch in run.epochs] for run in runs]
            _draw(axes[:, 1], method, runs, np.cumsum(seconds, axis=1).mean(axis=0))
    axes[0, 0].set_ylabel("training loss (mean of the epoch)")
    axes[1, 0].set_ylabel("validation error (%)")
    axes[1, 0].set_xlabel("epoch")
    if columns == 2:
        without = "" if timed == done else "; without runs on a shared device"
        axes[1, 1].set_xlabel(f"seconds of training (evaluation excluded{without})")
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.grid(visible=True, which="both", linewidth=0.4, alpha=0.5)
    axes[1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[1]:
        axis.axhline(100 * (1 - target), color="#666666", linewidth=1)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[1, 0].annotate(
        f"target {target:.1%} accuracy",
        (0.99, 100 * (1 - target)),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        horizontalalignment="right",
        color="#444444",
    )
    axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper right", fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _draw(axes: np.ndarray, method: str, runs: list[Run], x: np.ndarray) -> None:
    loss = np.array([[epoch["train_loss"] for epoch in run.epochs] for run in runs])
    accuracy = np.array([[epoch["validation_accuracy"] for epoch in run.epochs] for run in runs])
    config = runs[0].config
    label = f"{PEERS[method].label} ({describe_point((config.lr, config.damping))})"
    # A log axis has no place for no error at all: such points are left out.
    error = np.where(accuracy < 1, 100 * (1 - accuracy), np.nan)
    for axis, values in zip(axes, (loss, error), strict=True):
        _band(axis, x, values, training_of(method).style, label)


def _band(axis: Axes, x: np.ndarray, values: np.ndarray, style: dict[str, str], label: str) -> None:
    mean = values.mean(axis=0)
    axis.plot(x, mean, label=label, linewidth=1.8, marker=".", **style)  # type: ignore[arg-type]
    axis.fill_between(
        x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.12, linewidth=0
    )


def save_coefficients(path: Path, coefficients: Mapping[str, list[float]], *, title: str) -> None:
    """Draw the share of samples whose coefficient is lower, apart for kept and replaced labels."""
    figure = blank(6, 4)
    axis = figure.subplots()
    styles = {"kept": {"color": "#0072B2"}, "replaced": {"color": "#D55E00", "linestyle": "--"}}
    for name, values in coefficients.items():
        axis.plot(values, np.linspace(0, 100, len(values)), label=f"label {name}", **styles[name])  # type: ignore[arg-type]
    axis.set_xlabel("coefficient, mean over layers")
    axis.set_ylabel("samples below (%)")
    axis.grid(visible=True, linewidth=0.4, alpha=0.5)
    axis.legend()
    axis.set_title(title)
    figure.savefig(path, dpi=130)
