"""The problems by name, in the sizes that one CPU core can train in half a minute."""

from collections.abc import Callable
from pathlib import Path

from bench.pinn.problems.base import Equation, Pairs, Points, Problem, mean_squares, relative_error
from bench.pinn.problems.cavity import Cavity
from bench.pinn.problems.elliptic import Helmholtz, Poisson2d, Poisson5d, Poisson10d
from bench.pinn.problems.evolution import Burgers, Heat, InverseDiffusion, Wave
from bench.pinn.problems.periodic import AllenCahn, Convection, KortewegDeVries, KuramotoSivashinsky
from bench.pinn.problems.regression import Fit1d, Fit2d, Regression, california, diabetes

__all__ = [
    "NAMES",
    "Equation",
    "Pairs",
    "Points",
    "Problem",
    "Regression",
    "load",
    "mean_squares",
    "relative_error",
]

_EMBEDDED: dict[str, Callable[[], Problem]] = {
    "fit-1d": lambda: Fit1d(count=400),
    "fit-2d": lambda: Fit2d(count=900),
    "poisson-2d": lambda: Poisson2d(interior=600, boundary=120),
    "poisson-5d": lambda: Poisson5d(interior=700, boundary=300),
    "poisson-10d": lambda: Poisson10d(interior=600, boundary=400),
    "heat": lambda: Heat(interior=600, initial=80, walls=80),
    "helmholtz": lambda: Helmholtz(interior=700, boundary=160),
    "burgers": lambda: Burgers(interior=800, initial=80, walls=80),
    "inverse-diffusion": lambda: InverseDiffusion(interior=600, initial=60, walls=60, measurements=100),
    "wave": lambda: Wave(interior=1000, initial=80, walls=80),
    "convection": lambda: Convection(interior=1100, initial=100),
    "allen-cahn": lambda: AllenCahn(interior=1200),
    "kdv": lambda: KortewegDeVries(interior=1100, initial=100),
    "kuramoto-sivashinsky": lambda: KuramotoSivashinsky(interior=1100, initial=100),
    "cavity": lambda: Cavity(interior=400, walls=160),
    "diabetes": diabetes,
}
NAMES = (*_EMBEDDED, "california")


def load(name: str, *, data_dir: Path | None = None) -> Problem:
    """Return the problem called `name`; only california reads `data_dir`.

    Raises:
        ValueError: An unknown name or missing data.
    """
    if name in _EMBEDDED:
        return _EMBEDDED[name]()
    if name != "california":
        raise ValueError(f"problem: expected one of {', '.join(NAMES)}, got {name!r}")
    if data_dir is None:
        raise ValueError("data_dir: california needs the folder that holds its archive, got none")
    return california(data_dir)
