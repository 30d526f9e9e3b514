"""Steady equations: Poisson's in several dimensions, and Helmholtz'."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from bench.pinn.problems.base import (
    TEST_SEED,
    VALIDATION_SEED,
    Equation,
    Model,
    Points,
    Residuals,
    laplacian,
)


class _Elliptic(Equation):
    """-Laplace u - k^2 u = f in a box, u given on its boundary."""

    squared_wave_number = 0.0
    # Of 1, 10, 100 and 1000 the one with which Adam does best, here and in evolution.py.
    boundary_weight = 1.0

    def __init__(self, *, interior: int, boundary: int) -> None:
        self.interior, self.boundary = interior, boundary
        self.validation = self.pairs(2000, VALIDATION_SEED)
        self.test = self.pairs(4000, TEST_SEED)

    def forcing(self, x: Tensor) -> Tensor:
        """Return the right-hand side f (N,) at points (N,d)."""
        raise NotImplementedError

    @override
    def points(self, seed: int) -> Points:
        x = self.draw(self.interior, 10 * seed)
        walls = self.draw_walls(self.boundary, 10 * seed + 1, range(x.shape[1]))
        return {
            "interior": x,
            "forcing": self.forcing(x),
            "boundary": walls,
            "boundary values": self.solution(walls),
        }

    @override
    def residuals(self, model: Model, points: Points) -> Residuals:
        x = points["interior"].clone().requires_grad_()
        u = model(x).squeeze(-1)
        interior = -laplacian(u, x) - self.squared_wave_number * u - points["forcing"]
        boundary = model(points["boundary"]).squeeze(-1) - points["boundary values"]
        return {"interior": (interior, 1.0), "boundary": (boundary, self.boundary_weight)}


class Poisson2d(_Elliptic):
    """u = sin(pi x) sin(pi y) in the unit square."""

    name = "poisson-2d"
    title = "Poisson, 2 dimensions"
    widths = (2, 32, 32, 1)
    low, high = (0.0, 0.0), (1.0, 1.0)
    boundary_weight = 100.0

    @override
    def solution(self, x: Tensor) -> Tensor:
        return torch.sin(math.pi * x).prod(dim=1)

    @override
    def forcing(self, x: Tensor) -> Tensor:
        return 2 * math.pi**2 * self.solution(x)


class Poisson5d(_Elliptic):
    """u = sum of cos(pi x_i) in the unit cube of 5 dimensions."""

    name = "poisson-5d"
    title = "Poisson, 5 dimensions"
    widths = (5, 48, 48, 1)
    low, high = (0.0,) * 5, (1.0,) * 5
    boundary_weight = 100.0

    @override
    def solution(self, x: Tensor) -> Tensor:
        return torch.cos(math.pi * x).sum(dim=1)

    @override
    def forcing(self, x: Tensor) -> Tensor:
        return math.pi**2 * self.solution(x)


class Poisson10d(_Elliptic):
    """u = x_1 x_2 + x_3 x_4 + ... + x_9 x_10, harmonic, in the unit cube of 10 dimensions."""

    name = "poisson-10d"
    title = "Laplace, 10 dimensions"
    widths = (10, 48, 48, 1)
    low, high = (0.0,) * 10, (1.0,) * 10
    boundary_weight = 100.0

    @override
    def solution(self, x: Tensor) -> Tensor:
        return (x[:, 0::2] * x[:, 1::2]).sum(dim=1)

    @override
    def forcing(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, 0])


class Helmholtz(_Elliptic):
    """u = sin(pi x) sin(4 pi y), k = 2 pi, in the unit square."""

    name = "helmholtz"
    title = "Helmholtz"
    widths = (2, 32, 32, 1)
    low, high = (0.0, 0.0), (1.0, 1.0)
    squared_wave_number = 4 * math.pi**2
    boundary_weight = 1000.0

    @override
    def solution(self, x: Tensor) -> Tensor:
        return torch.sin(math.pi * x[:, 0]) * torch.sin(4 * math.pi * x[:, 1])

    @override
    def forcing(self, x: Tensor) -> Tensor:
        return (17 * math.pi**2 - self.squared_wave_number) * self.solution(x)
