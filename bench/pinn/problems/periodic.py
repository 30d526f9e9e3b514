"""Equations in (x, t) with spectral references: waves and fronts that are periodic in x, and Allen-Cahn's."""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from bench.models.perceptron import MLP, Anchored, Periodic
from bench.pinn.problems.base import (
    TEST_SEED,
    VALIDATION_SEED,
    Equation,
    Points,
    Residuals,
    gradient,
)
from bench.pinn.problems.spectral import Array, Series, evolve


class _Periodic(Equation):
    """An equation for u(x, t), u given at t = 0, whose network is periodic in x."""

    # Of 1, 10, 100 and 1000 the one with which 8 seconds of Adam do best.
    boundary_weight = 1.0

    def __init__(self, *, interior: int, initial: int) -> None:
        self.interior, self.initial = interior, initial
        self.validation = self.pairs(2000, VALIDATION_SEED)
        self.test = self.pairs(4000, TEST_SEED)

    def equation(self, u: Tensor, x: Tensor) -> Tensor:
        """Return the equation's residual (N,) of values u (N,) at points (N,2)."""
        raise NotImplementedError

    @classmethod
    def box(cls) -> dict[str, float]:
        """Return where x begins, how long its period is, and when t ends, as `evolve` takes them."""
        return {"start": cls.low[0], "period": cls.high[0] - cls.low[0], "end": cls.high[1]}

    @override
    def network(self) -> nn.Module:
        return Periodic(MLP(self.widths), period=self.high[0] - self.low[0], end=self.high[1])

    @override
    def points(self, seed: int) -> Points:
        start = self.draw(self.initial, 10 * seed + 1)
        start[:, 1] = 0
        return {
            "interior": self.draw(self.interior, 10 * seed),
            "initial": start,
            "initial values": self.solution(start),
        }

    @override
    def residuals(self, model: Any, points: Points) -> Residuals:
        x = points["interior"].clone().requires_grad_()
        initial = model(points["initial"]).squeeze(-1) - points["initial values"]
        return {
            "interior": (self.equation(model(x).squeeze(-1), x), 1.0),
            "initial": (initial, self.boundary_weight),
        }


class Convection(_Periodic):
    """u_t + 40 u_x = 0, u = sin(x) at t = 0 (Krishnapriyan et al., arXiv 2109.01050)."""

    name = "convection"
    title = "Convection, speed 40"
    widths = (3, 32, 32, 32, 1)
    low, high = (0.0, 0.0), (2 * math.pi, 1.0)
    speed = 40.0
    boundary_weight = 100.0

    @override
    def solution(self, x: Tensor) -> Tensor:
        return torch.sin(x[:, 0] - self.speed * x[:, 1])

    @override
    def equation(self, u: Tensor, x: Tensor) -> Tensor:
        first = gradient(u, x)
        return first[:, 1] + self.speed * first[:, 0]


class KortewegDeVries(_Periodic):
    """u_t + u u_x + 0.0025 u_xxx = 0, u = cos(pi x) at t = 0: a wave breaks up into solitons.

    Raissi, Perdikaris and Karniadakis, 2019, section 4.2.
    """

    name = "kdv"
    title = "Korteweg and de Vries' equation"
    widths = (3, 44, 44, 1)
    low, high = (-1.0, 0.0), (1.0, 1.0)
    dispersion = 0.0025
    boundary_weight = 10.0

    @override
    def solution(self, x: Tensor) -> Tensor:
        return self.reference()(x)

    @classmethod
    @cache
    def reference(cls, points: int = 256, step: float = 5e-4, nodes: int = 192) -> Series:
        """Return the solution to 1e-8; the arguments are those of `evolve`."""
        return evolve(
            lambda x: np.cos(math.pi * x),
            lambda k: 1j * cls.dispersion * k**3,
            lambda u: (np.zeros_like(u), -u * u / 2),
            **cls.box(),
            points=points,
            step=step,
            nodes=nodes,
        )

    @override
    def equation(self, u: Tensor, x: Tensor) -> Tensor:
        first = gradient(u, x)
        third = gradient(gradient(first[:, 0], x)[:, 0], x)[:, 0]
        return first[:, 1] + u * first[:, 0] + self.dispersion * third


class KuramotoSivashinsky(_Periodic):
    """u_t + alpha u u_x + beta u_xx + gamma u_xxxx = 0, u = cos(x) (1 + sin(x)) at t = 0, until t = 0.2.

    Wang, Sankaran, Wang and Perdikaris, "An expert's guide to training PINNs", arXiv 2308.08468, who go on
    until t = 1, into chaos, in windows of 0.1.
    """

    name = "kuramoto-sivashinsky"
    title = "Kuramoto and Sivashinsky's equation until t = 0.2"
    widths = (3, 44, 44, 1)
    low, high = (0.0, 0.0), (2 * math.pi, 0.2)
    alpha, beta, gamma = 100 / 16, 100 / 16**2, 100 / 16**4
    boundary_weight = 1000.0

    @override
    def solution(self, x: Tensor) -> Tensor:
        return self.reference()(x)

    @classmethod
    @cache
    def reference(cls, points: int = 512, step: float = 1e-4, nodes: int = 80) -> Series:
        """Return the solution to 1e-8; the arguments are those of `evolve`."""
        return evolve(
            lambda x: np.cos(x) * (1 + np.sin(x)),
            lambda k: cls.beta * k**2 - cls.gamma * k**4,
            lambda u: (np.zeros_like(u), -cls.alpha * u * u / 2),
            **cls.box(),
            points=points,
            step=step,
            nodes=nodes,
        )

    @override
    def equation(self, u: Tensor, x: Tensor) -> Tensor:
        first = gradient(u, x)
        second = gradient(first[:, 0], x)[:, 0]
        fourth = gradient(gradient(second, x)[:, 0], x)[:, 0]
        return first[:, 1] + self.alpha * u * first[:, 0] + self.beta * second + self.gamma * fourth


class AllenCahn(Equation):
    """u_t = 1e-4 u_xx + 5 (u - u^3), u = x^2 cos(pi x) at t = 0 and -1 at both walls, built into the network.

    The network is u_0(x) + t (1 - x^2) times a perceptron, so that the equation alone is trained (as Wu et
    al., arXiv 2207.10289, do it). Continued with period 2, u_0 has a kink at the walls, which
    u_0 + t times a smooth periodic network would keep for all time, an error of 3e-4; the problem with
    u = -1 there differs from the periodic one only within 0.003 of the walls.
    """

    name = "allen-cahn"
    title = "Allen and Cahn's equation"
    widths = (2, 32, 32, 32, 1)
    low, high = (-1.0, 0.0), (1.0, 1.0)
    diffusivity, rate = 1e-4, 5.0

    def __init__(self, *, interior: int) -> None:
        self.interior = interior
        self.validation = self.pairs(2000, VALIDATION_SEED)
        self.test = self.pairs(4000, TEST_SEED)

    @override
    def network(self) -> nn.Module:
        return Anchored(
            MLP(self.widths), lambda x: _start(x[:, 0]), lambda x: x[:, 1] * (1 - x[:, 0].square())
        )

    @override
    def solution(self, x: Tensor) -> Tensor:
        return self.reference()(x) - 1

    @classmethod
    @cache
    def reference(cls, points: int = 2048, step: float = 2.5e-3, nodes: int = 40) -> Series:
        """Return u + 1 to 1e-7, near t = 0 at the walls, elsewhere to 1e-9; arguments as of `evolve`.

        Mirrored at the walls with its sign, u + 1 is a sine series of period 4.
        """

        def start_values(x: Array) -> Array:
            mirrored = np.where(x < 1, x, 2 - x)
            return np.where(x < 1, 1, -1) * (1 + _start(torch.from_numpy(mirrored)).numpy())

        return evolve(
            start_values,
            lambda k: -cls.diffusivity * k**2,
            lambda w: (cls.rate * w * (np.abs(w) - 1) * (2 - np.abs(w)), np.zeros_like(w)),
            start=cls.low[0],
            period=2 * (cls.high[0] - cls.low[0]),
            end=cls.high[1],
            points=points,
            step=step,
            nodes=nodes,
        )

    @override
    def points(self, seed: int) -> Points:
        return {"interior": self.draw(self.interior, 10 * seed)}

    @override
    def residuals(self, model: Any, points: Points) -> Residuals:
        x = points["interior"].clone().requires_grad_()
        u = model(x).squeeze(-1)
        first = gradient(u, x)
        second = gradient(first[:, 0], x)[:, 0]
        return {"interior": (first[:, 1] - self.diffusivity * second - self.rate * (u - u**3), 1.0)}


def _start(x: Tensor) -> Tensor:
    return x.square() * torch.cos(math.pi * x)
