"""Equations in (x, t) between walls: heat, viscous Burgers, waves, diffusion with an unknown coefficient."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from bench.models.perceptron import MLP, WithCoefficient
from bench.pinn.problems.base import (
    TEST_SEED,
    VALIDATION_SEED,
    Equation,
    Points,
    Residuals,
    gradient,
)


class _Evolution(Equation):
    """An equation for u(x, t) from t = 0 on, with u given at t = 0 and on both walls."""

    boundary_weight = 1.0

    def __init__(self, *, interior: int, initial: int, walls: int) -> None:
        self.interior, self.initial, self.walls = interior, initial, walls
        self.validation = self.pairs(2000, VALIDATION_SEED)
        self.test = self.pairs(4000, TEST_SEED)

    def equation(self, model: Any, u: Tensor, x: Tensor) -> Tensor:
        """Return the equation's residual (N,) of values u (N,) at points (N,2)."""
        raise NotImplementedError

    @override
    def points(self, seed: int) -> Points:
        start = self.draw(self.initial, 10 * seed + 1)
        start[:, 1] = 0
        walls = self.draw_walls(self.walls, 10 * seed + 2, range(1))
        return {
            "interior": self.draw(self.interior, 10 * seed),
            "initial": start,
            "initial values": self.solution(start),
            "walls": walls,
        }

    @override
    def residuals(self, model: Any, points: Points) -> Residuals:
        x = points["interior"].clone().requires_grad_()
        initial = model(points["initial"]).squeeze(-1) - points["initial values"]
        walls = model(points["walls"]).squeeze(-1)
        return {
            "interior": (self.equation(model, model(x).squeeze(-1), x), 1.0),
            "initial": (initial, self.boundary_weight),
            "walls": (walls, self.boundary_weight),
        }


def _two_modes(x: Tensor, diffusivity: float) -> Tensor:
    """Return the solution of u_t = diffusivity u_xx: two waves in x, the shorter one dying sooner."""
    return sum(
        amplitude * torch.sin(k * math.pi * x[:, 0]) * torch.exp(-diffusivity * (k * math.pi) ** 2 * x[:, 1])
        for k, amplitude in ((1, 1.0), (3, 0.5))
    )  # type: ignore[return-value]


class Heat(_Evolution):
    """u_t = 0.1 u_xx in the unit interval."""

    name = "heat"
    title = "Heat equation"
    widths = (2, 32, 32, 1)
    low, high = (0.0, 0.0), (1.0, 1.0)
    diffusivity = 0.1
    boundary_weight = 10.0

    @override
    def solution(self, x: Tensor) -> Tensor:
        return _two_modes(x, self.diffusivity)

    @override
    def equation(self, model: Any, u: Tensor, x: Tensor) -> Tensor:
        first = gradient(u, x)
        return first[:, 1] - self.diffusivity * gradient(first[:, 0], x)[:, 0]


class Burgers(_Evolution):
    """u_t + u u_x = nu u_xx in [-1, 1], u = -sin(pi x) at t = 0: a front forms at x = 0."""

    name = "burgers"
    title = "Burgers' equation"
    widths = (2, 32, 32, 1)
    low, high = (-1.0, 0.0), (1.0, 1.0)
    viscosity = 0.1 / math.pi

    def solution(self, x: Tensor) -> Tensor:
        """Return the Cole-Hopf transform, its integrals by the trapezoidal rule, exact to rounding."""
        z = torch.linspace(-12, 12, 601, dtype=x.dtype)
        y = x[:, :1] - z * (4 * self.viscosity * x[:, 1:]).sqrt()
        log_density = -z.square() - torch.cos(math.pi * y) / (2 * math.pi * self.viscosity)
        return -(log_density.softmax(dim=1) * torch.sin(math.pi * y)).sum(dim=1)

    @override
    def equation(self, model: Any, u: Tensor, x: Tensor) -> Tensor:
        first = gradient(u, x)
        second = gradient(first[:, 0], x)[:, 0]
        return first[:, 1] + u * first[:, 0] - self.viscosity * second


class Wave(_Evolution):
    """u_tt = 4 u_xx in the unit interval, at rest at t = 0: a wave and one four times as fast."""

    name = "wave"
    title = "Wave equation, two frequencies"
    widths = (2, 32, 32, 32, 1)
    low, high = (0.0, 0.0), (1.0, 1.0)
    squared_speed = 4.0
    boundary_weight = 100.0

    @override
    def solution(self, x: Tensor) -> Tensor:
        speed = math.sqrt(self.squared_speed)
        return sum(
            amplitude * torch.sin(k * math.pi * x[:, 0]) * torch.cos(k * math.pi * speed * x[:, 1])
            for k, amplitude in ((1, 1.0), (4, 0.5))
        )  # type: ignore[return-value]

    @override
    def equation(self, model: Any, u: Tensor, x: Tensor) -> Tensor:
        first = gradient(u, x)
        second = [gradient(first[:, axis], x)[:, axis] for axis in range(2)]
        return second[1] - self.squared_speed * second[0]

    @override
    def residuals(self, model: Any, points: Points) -> Residuals:
        start = points["initial"].clone().requires_grad_()
        speed = gradient(model(start).squeeze(-1), start)[:, 1]
        return super().residuals(model, points) | {"initial speed": (speed, self.boundary_weight)}


class InverseDiffusion(_Evolution):
    """u_t = c u_xx with c to be found, besides u, from measurements of u at scattered points."""

    name = "inverse-diffusion"
    title = "Diffusion, coefficient unknown"
    widths = (2, 32, 32, 1)
    low, high = (0.0, 0.0), (1.0, 1.0)
    coefficient = 0.1
    start = 1.0
    boundary_weight = 10.0

    def __init__(self, *, interior: int, initial: int, walls: int, measurements: int) -> None:
        super().__init__(interior=interior, initial=initial, walls=walls)
        self.measurements = measurements

    @override
    def network(self) -> nn.Module:
        return WithCoefficient(MLP(self.widths), start=self.start)

    @override
    def solution(self, x: Tensor) -> Tensor:
        return _two_modes(x, self.coefficient)

    @override
    def equation(self, model: Any, u: Tensor, x: Tensor) -> Tensor:
        first = gradient(u, x)
        return first[:, 1] - model.coefficient * gradient(first[:, 0], x)[:, 0]

    @override
    def points(self, seed: int) -> Points:
        points = super().points(seed)
        x = self.draw(self.measurements, 10 * seed + 3)
        return points | {"measured at": x, "measured": self.solution(x)}

    @override
    def residuals(self, model: Any, points: Points) -> Residuals:
        data = model(points["measured at"]).squeeze(-1) - points["measured"]
        return super().residuals(model, points) | {"measurements": (data, self.boundary_weight)}
