"""Fits of known functions with several scales, and of tables; the residual is model(x) - y."""

import io
import math
import re
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor
from typing_extensions import override

from bench.pinn.problems.base import (
    TEST_SEED,
    VALIDATION_SEED,
    Equation,
    Model,
    Pairs,
    Points,
    Problem,
    Residuals,
)
from bench.workloads.compressed import members

SPLIT_SEED = 0
CALIFORNIA_ARCHIVE = "cal_housing.tgz"
CALIFORNIA_MEMBER = "CaliforniaHousing/cal_housing.data"
MAX_TABLE_BYTES = 1 << 24
CALIFORNIA_ROWS = 6000


class Regression(Problem):
    """A fit of "y" (N,) at "x" (N,d)."""

    @override
    def residuals(self, model: Model, points: Points) -> Residuals:
        return {"data": (model(points["x"]).squeeze(-1) - points["y"], 1.0)}


class _Fit(Regression, Equation):
    """A known function, to be fitted at scattered points without noise."""

    def __init__(self, *, count: int) -> None:
        self.count = count
        self.validation = self.pairs(2000, VALIDATION_SEED)
        self.test = self.pairs(4000, TEST_SEED)

    @override
    def points(self, seed: int) -> Points:
        x = self.draw(self.count, 10 * seed)
        return {"x": x, "y": self.solution(x)}


class Fit1d(_Fit):
    """sin(2 pi x) + sin(10 pi x) / 2 + sin(30 pi x) / 4 in the unit interval."""

    name = "fit-1d"
    title = "Fit of three scales, 1 dimension"
    widths = (1, 32, 32, 1)
    low, high = (0.0,), (1.0,)

    @override
    def solution(self, x: Tensor) -> Tensor:
        scales = torch.tensor([2.0, 10.0, 30.0], dtype=x.dtype)
        return torch.sin(math.pi * scales * x) @ torch.tensor([1.0, 0.5, 0.25], dtype=x.dtype)


class Fit2d(_Fit):
    """sin(pi x) sin(pi y) + sin(5 pi x) sin(5 pi y) / 4 in [-1, 1]^2."""

    name = "fit-2d"
    title = "Fit of two scales, 2 dimensions"
    widths = (2, 32, 32, 1)
    low, high = (-1.0, -1.0), (1.0, 1.0)

    @override
    def solution(self, x: Tensor) -> Tensor:
        return torch.sin(math.pi * x).prod(dim=1) + torch.sin(5 * math.pi * x).prod(dim=1) / 4


class Table(Regression):
    """Standardised rows of a table, fixed random split: 60 % training, 20 % validation, 20 % test."""

    early_stopping = True

    def __init__(self, name: str, title: str, x: np.ndarray, y: np.ndarray) -> None:
        self.name, self.title, self.widths = name, title, (x.shape[1], 32, 32, 1)
        order = np.random.default_rng(SPLIT_SEED).permutation(len(y))
        train, validation, test = np.split(order, [6 * len(y) // 10, 8 * len(y) // 10])
        x = (x - x[train].mean(axis=0)) / x[train].std(axis=0)
        y = (y - y[train].mean()) / y[train].std()
        self._train, self.validation, self.test = (
            Pairs(torch.from_numpy(x[rows]), torch.from_numpy(y[rows])) for rows in (train, validation, test)
        )

    @override
    def points(self, seed: int) -> Points:
        return {"x": self._train.x, "y": self._train.u}


def diabetes() -> Table:
    """Return the 442 patients of scikit-learn's diabetes table, which comes with the library."""
    x, y = load_diabetes(return_X_y=True)
    return Table("diabetes", "Diabetes progression, 10 columns", x, y)


def california(data_dir: Path) -> Table:
    """Return rows of the California housing table (Pace and Barry 1997), drawn once, out of its archive.

    Raises:
        ValueError: When the archive is not in `data_dir` or does not hold the table.
    """
    archive = data_dir / CALIFORNIA_ARCHIVE
    if not archive.is_file():
        raise ValueError(f"data_dir: expected {CALIFORNIA_ARCHIVE} in {str(data_dir)!r}, found none")
    found = members(archive, re.compile(re.escape(CALIFORNIA_MEMBER)), MAX_TABLE_BYTES)
    content = next((content for _, content in found), None)
    if content is None:
        raise ValueError(f"{archive.name}: expected the table {CALIFORNIA_MEMBER}")
    try:
        values = np.loadtxt(io.StringIO(content.decode("ascii")), delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{archive.name}: expected a table of numbers ({error})") from error
    if values.shape[1] != 9:
        raise ValueError(f"{archive.name}: expected 9 columns, got {values.shape[1]}")
    rows = np.random.default_rng(SPLIT_SEED).permutation(len(values))[:CALIFORNIA_ROWS]
    x, y = values[rows, :-1], values[rows, -1]
    # Per household, as the table is usually prepared: rooms, bedrooms and people grow with the district.
    x[:, 3:6] /= x[:, 6:7]
    return Table("california", "California house values, 8 columns", x, y)
