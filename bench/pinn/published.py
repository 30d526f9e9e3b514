"""`python -m bench.pinn.published`: GaussNewton on problems of papers, beside the errors that those report.

Errors are root mean squares of model - u, not relative, as the sources measure them; the loss has their
weights. Figures were read in the run histories from which the authors drew theirs. Not found in a form that
could be read, and therefore not here: arXiv 2505.21404 (dual natural gradient descent), 2405.04230 and
2501.16371 (self-scaled Broyden).
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tabulate import tabulate
from torch import Tensor
from typing_extensions import override

import fngd
from bench.pinn.problems.base import TEST_SEED, Equation, relative_error
from bench.pinn.problems.elliptic import Poisson2d, Poisson5d
from bench.pinn.problems.evolution import Heat
from bench.tools import environment
from bench.tools.arguments import positive_float, positive_int

KFAC = "arXiv 2405.15603"
KFAC_RUNS = "github.com/f-dangel/kfac-pinns-experiments, commit 83ed050, kfac_pinns_exp/{}/best_runs"
WOODBURY = "arXiv 2505.12149"
WOODBURY_RUNS = (
    "github.com/jefferyren/rla-pinns, a copy of the authors', commit bba463c, rla_pinns/{}/best_runs"
)
RTX = "RTX 6000"


class _OneMode(Heat):
    """u_t = u_xx / 4 in the unit interval, u = sin(pi x) at t = 0."""

    title = "Heat equation, 1 dimension"
    diffusivity = 0.25

    @override
    def solution(self, x: Tensor) -> Tensor:
        decay = torch.exp(-self.diffusivity * math.pi**2 * x[:, 1])
        return torch.sin(math.pi * x[:, 0]) * decay


@dataclass(frozen=True)
class Setup:
    """A problem with a paper's network and points.

    Attributes:
        build: Makes the problem.
        widths: Of the tanh network.
        condition_weight: Of each block of conditions; the paper's loss has one mean over all of them.
        fresh: Whether the natural-gradient methods of the source get new points in every step.
        evaluation: Number of points at which errors are measured.
        by_default: Whether a CPU takes many steps in a minute.
    """

    build: Callable[[], Equation]
    widths: tuple[int, ...]
    condition_weight: float = 1.0
    fresh: bool = False
    evaluation: int = 9000
    by_default: bool = True

    def problem(self) -> Equation:
        """Return the problem."""
        problem = self.build()
        problem.widths = self.widths
        problem.boundary_weight = self.condition_weight  # type: ignore[attr-defined]
        return problem


@dataclass(frozen=True)
class Published:
    """What a paper reports of a method on a setup.

    Attributes:
        errors: (seconds of training, root mean square error).
        source: The paper.
        figure: The figure that shows the run, by its label in the paper's source.
        place: The folder where the figures were read.
        run: The run there.
    """

    setup: str
    method: str
    errors: tuple[tuple[float, float], ...]
    source: str
    figure: str
    place: str
    run: str
    hardware: str = RTX


SETUPS = {
    "poisson-2d": Setup(lambda: Poisson2d(interior=900, boundary=120), (2, 64, 1)),
    # 60 initial and 60 boundary points, one mean over both.
    "heat": Setup(lambda: _OneMode(interior=900, initial=60, walls=60), (2, 64, 1), condition_weight=0.5),
    "poisson-5d": Setup(
        lambda: Poisson5d(interior=3000, boundary=500), (5, 64, 1), fresh=True, evaluation=30000
    ),
    "poisson-5d-deep": Setup(
        lambda: Poisson5d(interior=3000, boundary=500),
        (5, 64, 64, 48, 48, 1),
        fresh=True,
        evaluation=30000,
        by_default=False,
    ),
}


def _kfac(
    setup: str, figure: str, folder: str, runs: dict[str, tuple[str, float, float, float]]
) -> list[Published]:
    """Return rows of the errors after 100 seconds and at the end; runs are (name, error, end, error)."""
    return [
        Published(setup, method, ((100, early), (end, late)), KFAC, figure, KFAC_RUNS.format(folder), run)
        for method, (run, early, end, late) in runs.items()
    ]


PUBLISHED: tuple[Published, ...] = (
    *_kfac(
        "poisson-2d",
        "fig:poisson2d-appendix, D = 257",
        "exp09_reproduce_poisson2d",
        {
            "ENGD (full)": ("0ku0xl1j", 2.20e-2, 1000, 6.19e-8),
            "KFAC": ("euc27yi9", 1.28e-5, 1000, 3.37e-7),
            "KFAC*": ("i1txqj6g", 5.12e-6, 1000, 1.99e-7),
            "LBFGS": ("gjbxog62", 1.78e-4, 1000, 1.78e-4),
        },
    ),
    *_kfac(
        "heat",
        "fig:heat1d-appendix, D = 257",
        "exp13_reproduce_heat1d",
        {
            "ENGD (full)": ("ruxdkxho", 5.21e-7, 1000, 3.05e-8),
            "KFAC": ("w8knpy8i", 3.69e-4, 1000, 1.88e-6),
            "KFAC*": ("sddr7a9a", 2.28e-5, 1000, 8.82e-7),
            "LBFGS": ("6734c6vy", 2.69e-4, 1000, 2.69e-4),
        },
    ),
    *_kfac(
        "poisson-5d",
        "fig:poisson5d-appendix, D = 449",
        "exp10_reproduce_poisson5d",
        {
            "ENGD (full)": ("p2mn2dqo", 9.74e-7, 3000, 5.58e-8),
            "KFAC": ("7mwv2292", 9.97e-3, 3000, 4.90e-5),
            "KFAC*": ("sbclpehz", 2.43e-4, 3000, 2.68e-6),
            "LBFGS": ("ys3w3k28", 1.14e-2, 3000, 8.88e-4),
        },
    ),
    Published(
        "poisson-5d-deep",
        "ENGD-W",
        ((100, 5.10e-4), (7000, 6.81e-7)),
        WOODBURY,
        "5d Poisson, D = 10065",
        WOODBURY_RUNS.format("exp1_poisson5d"),
        "tacjf0pi",
        "RTX 6000 (so the scripts of exp8)",
    ),
    Published(
        "poisson-5d-deep",
        "SPRING",
        ((100, 5.84e-5), (7000, 1.09e-6)),
        WOODBURY,
        "5d Poisson, D = 10065",
        WOODBURY_RUNS.format("exp1_poisson5d"),
        "eimjo8j1",
        "RTX 6000 (so the scripts of exp8)",
    ),
)


def train(setup: Setup, *, seconds: float, damping: float, seed: int) -> tuple[int, float, float]:
    """Return the steps of GaussNewton in so many CPU seconds, the seconds they took, and the error."""
    problem = setup.problem()
    torch.manual_seed(seed)
    network, points = problem.network(), problem.points(seed)
    optimizer = fngd.GaussNewton(network, damping="lm", initial_damping=damping)
    # Imports and compilations are not training: the first step is undone.
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fngd.GaussNewton(network, damping="lm", initial_damping=damping).step(
        lambda: problem.residuals(network, points)
    )
    network.load_state_dict(start)
    steps, began = 0, time.process_time()
    while time.process_time() - began < seconds:
        if setup.fresh and steps:
            # Apart from the seeds of other runs.
            points = problem.points(1000 * seed + steps)
        optimizer.step(partial(problem.residuals, network, points))
        steps += 1
    spent = time.process_time() - began
    pairs = problem.pairs(setup.evaluation, TEST_SEED)
    return steps, spent, relative_error(network, pairs) * pairs.u.square().mean().sqrt().item()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pinn.published",
        description="Run GaussNewton on problems of papers, with their networks and numbers of points, and "
        "print its error beside theirs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--problem",
        choices=tuple(SETUPS),
        action="append",
        help="repeatable (default: those on which a CPU takes many steps in a minute)",
    )
    parser.add_argument("--seconds", type=positive_float, default=60.0, help="CPU seconds of training")
    parser.add_argument("--damping", type=positive_float, default=1.0, help="damping at the start")
    parser.add_argument("--seed", type=int, default=1, help="draws the points and the network")
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print a table for each problem; return the exit status."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    names = options.problem or [name for name, setup in SETUPS.items() if setup.by_default]
    for name in dict.fromkeys(names):
        setup = SETUPS[name]
        outcome = train(setup, seconds=options.seconds, damping=options.damping, seed=options.seed)
        print(_table(name, outcome, options.threads), flush=True)
    return 0


def _table(name: str, outcome: tuple[int, float, float], threads: int) -> str:
    """Return the problem, the published errors and ours, and where they were read."""
    setup = SETUPS[name]
    problem = setup.problem()
    published = [row for row in PUBLISHED if row.setup == name]
    rows = [
        (row.method, row.hardware, f"{seconds:g}", f"{error:.2e}", f"{row.source}, run {row.run}")
        for row in published
        for seconds, error in row.errors
    ]
    steps, spent, error = outcome
    cpu = f"{environment.describe(torch.device('cpu'))['cpu']}, threads: {threads}"
    rows.append(("GaussNewton", cpu, f"{spent:.3g}", f"{error:.2e}", f"this repository, {steps} steps"))
    headers = ("method", "hardware", "seconds", "rms error", "source")
    points = ", ".join(f"{len(x)} {key}" for key, x in problem.points(0).items() if x.ndim == 2)
    network = " - ".join(map(str, setup.widths))
    places = dict.fromkeys(f"{row.figure}; {row.place}" for row in published)
    return "\n".join(
        [
            f"\n{problem.title}: network {network}, points: {points}" + ", new in every step" * setup.fresh,
            tabulate(rows, headers, tablefmt="github", disable_numparse=True),
            *places,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
