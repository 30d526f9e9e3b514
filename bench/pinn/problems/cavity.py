"""The lid-driven cavity: steady Navier-Stokes equations in a square, with a lid that slides."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
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
    gradient,
    laplacian,
)
from bench.pinn.problems.spectral import (
    CHUNK,
    Array,
    chebyshev,
    chebyshev_points,
    differentiation,
    to_coefficients,
)

# At a corner whose wall at X = 0 rests while the one at Y = 0 slides at speed 1, the stream function begins
# with r g(angle), of Stokes flow, g = SLOPE sin + angle (ALONG cos + ACROSS sin), angle = atan2(Y, X)
# (Batchelor 1967, section 4.8).
ALONG = 1 / (math.pi**2 / 4 - 1)
ACROSS = ALONG * math.pi / 2
SLOPE = -ALONG * math.pi**2 / 4
# Terms of higher order, which inertia makes, up to r^ORDER.
ORDER = 3
DEGREE = 32
CORNER_DEGREE = 24
NEWTON_STEPS = 12
# The corners themselves count as the lid's.
TINY = 1e-150


@dataclass(frozen=True)
class Corners:
    """The flow near the upper corners, singular in them: terms Re^(n - 1) r^n g_n(angle) for each.

    Attributes:
        terms: Chebyshev series of Re^(n - 1) g_n on angles from 0 to pi / 2, by n from 2 on.
        slopes: Those of their derivatives.
        forces: Those of r^(4 - n) times their biharmonics.
    """

    terms: dict[int, Tensor]
    slopes: dict[int, Tensor]
    forces: dict[int, Tensor]

    @classmethod
    def of(cls, reynolds: float) -> "Corners":
        """Return those at a Reynolds number, from the equation order by order.

        The Laplacian of r^n g_n is r^(n - 2) w_n with w_n = g_n'' + n^2 g_n, its biharmonic is r^(n - 4)
        (D^2 + (n - 2)^2) w_n, and that is the sum over j + k = n of j g_j w_k' - (k - 2) g_j' w_k.
        """
        degree = CORNER_DEGREE
        angle = (chebyshev_points(degree) + 1) * math.pi / 4
        d = differentiation(degree) * 4 / math.pi
        d2, one, ends = d @ d, np.eye(degree + 1), [0, -1]
        g = {1: SLOPE * np.sin(angle) + angle * (ALONG * np.cos(angle) + ACROSS * np.sin(angle))}
        w = {1: 2 * (ACROSS * np.cos(angle) - ALONG * np.sin(angle))}
        forces = {}
        for n in range(2, ORDER + 1):
            pairs = [(j, n - j) for j in range(1, n)]
            products = [j * g[j] * (d @ w[k]) - (k - 2) * (d @ g[j]) * w[k] for j, k in pairs]
            forces[n] = np.sum(products, axis=0)
            system, right = (d2 + (n - 2) ** 2 * one) @ (d2 + n**2 * one), forces[n].copy()
            # g_n and its derivative vanish on both walls.
            system[ends], system[[1, -2]], right[[0, 1, -2, -1]] = one[ends], d[ends], 0
            g[n] = np.linalg.solve(system, right)
            w[n] = d2 @ g[n] + n**2 * g[n]
        series = to_coefficients(degree)

        def by_order(values: dict[int, Array]) -> dict[int, Tensor]:
            return {n: torch.from_numpy(reynolds ** (n - 1) * (series @ values[n])) for n in forces}

        return cls(by_order(g), by_order({n: d @ values for n, values in g.items()}), by_order(forces))

    def stream(self, x: Tensor) -> Tensor:
        """Return the stream function (N,) at points (N,2)."""
        total = torch.zeros_like(x[:, 0])
        for along, below, sign in _coordinates(x):
            angle, square = torch.atan2(below, along), along.square() + below.square()
            total = total + SLOPE * below + angle * (ALONG * along + ACROSS * below)
            for n, series in self.terms.items():
                total = total + sign ** (n - 1) * square ** (n / 2) * _at_angle(series, angle)
        return total

    def velocity(self, x: Tensor) -> Tensor:
        """Return the velocity (N,2), bounded in the corners, where it jumps."""
        u, v = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
        for along, below, sign in _coordinates(x):
            square = along.square() + below.square()
            angle = torch.atan2(below, along)
            factor = (ALONG * along + ACROSS * below) / square
            u = u - (SLOPE + along * factor + ACROSS * angle)
            v = v - sign * (ALONG * angle - below * factor)
            for n, series in self.terms.items():
                size = sign ** (n - 1) * square ** (n / 2 - 1)
                g, slope = n * _at_angle(series, angle), _at_angle(self.slopes[n], angle)
                u = u - size * (below * g + along * slope)
                v = v - sign * size * (along * g - below * slope)
        return torch.stack([u, v], dim=1)

    def force(self, x: Tensor) -> Tensor:
        """Return the biharmonic (N,) of the stream function, at points that are no corners."""
        total = torch.zeros_like(x[:, 0])
        for along, below, sign in _coordinates(x):
            angle, square = torch.atan2(below, along), along.square() + below.square()
            for n, series in self.forces.items():
                total = total + sign ** (n - 1) * square ** (n / 2 - 2) * _at_angle(series, angle)
        return total


def _coordinates(x: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield the distances from the side wall and from the lid, and -1 where they mirror the plane."""
    below = 1 - x[:, 1]
    yield x[:, 0].clamp_min(TINY), below, 1
    yield (1 - x[:, 0]).clamp_min(TINY), below, -1


def _at_angle(series: Tensor, angle: Tensor) -> Tensor:
    return chebyshev(angle * 4 / math.pi - 1, len(series)) @ series


@dataclass(frozen=True)
class Flow:
    """A velocity: that of the corners, and two Chebyshev series (degree + 1, degree + 1) in x and y."""

    corners: Corners
    u: Tensor
    v: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the velocity (N,2) at points (N,2)."""
        return torch.cat([self._sum(part) for part in x.split(CHUNK)])

    def _sum(self, x: Tensor) -> Tensor:
        in_x, in_y = (chebyshev(2 * z - 1, len(self.u)) for z in x.unbind(1))
        smooth = [((in_x @ series) * in_y).sum(dim=1) for series in (self.u, self.v)]
        return self.corners.velocity(x) + torch.stack(smooth, dim=1)


@cache
def solve(reynolds: float, degree: int = DEGREE) -> Flow:
    """Return the flow from its stream function, a polynomial added to `Corners`, by Newton's method.

    Chebyshev collocation of s_y (Laplace s)_x - s_x (Laplace s)_y = Laplace Laplace s / Re. Without the
    singular flow of the corners, which Botella and Peyret (1998) subtract likewise, the series would
    converge slowly.

    Raises:
        ArithmeticError: Newton's method does not converge.
    """
    n = degree
    d, one, z = 2 * differentiation(n), np.eye(n + 1), (chebyshev_points(n) + 1) / 2
    d2, d3 = d @ d, d @ d @ d
    # Of the nodes, x by x, those inside, those on the walls, and those where the slope across is given too.
    nodes = np.arange((n + 1) ** 2).reshape(n + 1, n + 1)
    inside = nodes[2:-2, 2:-2].ravel()
    walls = np.concatenate([nodes[0], nodes[-1], nodes[1:-1, 0], nodes[1:-1, -1]])
    sides = np.concatenate([nodes[0, 1:-1], nodes[-1, 1:-1]])
    lid, bottom = nodes[2:-2, 0], nodes[2:-2, -1]
    grid = torch.from_numpy(np.stack(np.meshgrid(z, z, indexing="ij"), axis=-1).reshape(-1, 2))

    dx, dy = np.kron(d, one), np.kron(one, d)
    turn_x = (np.kron(d3, one) + np.kron(d, d2))[inside]
    turn_y = (np.kron(d2, d) + np.kron(one, d3))[inside]
    friction = (np.kron(d2 @ d2, one) + 2 * np.kron(d2, d2) + np.kron(one, d2 @ d2))[inside] / reynolds
    conditions = np.concatenate([np.eye(nodes.size)[walls], dx[sides], dy[lid], dy[bottom]])
    inner_dx, inner_dy = dx[inside], dy[inside]

    corners = Corners.of(reynolds)
    u, v = corners.velocity(grid).numpy().T
    given = [-corners.stream(grid[walls]).numpy(), v[sides], 1 - u[lid], -u[bottom]]
    x = grid[inside].requires_grad_()
    turn = gradient(laplacian(corners.stream(x), x), x).detach().numpy()
    force = corners.force(x).detach().numpy() / reynolds

    s = np.zeros(nodes.size)
    for _ in range(NEWTON_STEPS):
        s_x, s_y = inner_dx @ s - v[inside], inner_dy @ s + u[inside]
        w_x, w_y = turn_x @ s + turn[:, 0], turn_y @ s + turn[:, 1]
        residual = s_y * w_x - s_x * w_y - friction @ s - force
        jacobian = (
            s_y[:, None] * turn_x
            + w_x[:, None] * inner_dy
            - s_x[:, None] * turn_y
            - w_y[:, None] * inner_dx
            - friction
        )
        change = np.linalg.solve(
            np.concatenate([conditions, jacobian]),
            np.concatenate([np.concatenate(given) - conditions @ s, -residual]),
        )
        s = s + change
        if np.abs(change).max() < 1e-8:
            break
    else:
        raise ArithmeticError(f"cavity: Newton's method still changes the flow by {np.abs(change).max():.1e}")
    to_series = to_coefficients(n)
    u_series, v_series = (
        torch.from_numpy(to_series @ values.reshape(n + 1, n + 1) @ to_series.T)
        for values in (dy @ s, -dx @ s)
    )
    return Flow(corners, u_series, v_series)


class Cavity(Equation):
    """Velocity and pressure in the unit square, no-slip walls, the upper one sliding at speed 1; Re 100.

    The network's outputs are u, v and p; errors are those of (u, v), as p is free by a constant.
    """

    name = "cavity"
    title = "Lid-driven cavity, Re 100"
    widths = (2, 44, 44, 3)
    low, high = (0.0, 0.0), (1.0, 1.0)
    reynolds = 100.0
    boundary_weight = 10.0

    def __init__(self, *, interior: int, walls: int) -> None:
        self.interior, self.walls = interior, walls
        self.validation = self.pairs(2000, VALIDATION_SEED)
        self.test = self.pairs(4000, TEST_SEED)

    @override
    def solution(self, x: Tensor) -> Tensor:
        """Return the velocity (N,2), to about 1e-5."""
        return solve(self.reynolds)(x)

    @override
    def points(self, seed: int) -> Points:
        walls = self.draw_walls(self.walls, 10 * seed + 1, range(2))
        return {
            "interior": self.draw(self.interior, 10 * seed),
            "walls": walls,
            "speed of the wall": (walls[:, 1] == 1).to(walls.dtype),
        }

    @override
    def residuals(self, model: Model, points: Points) -> Residuals:
        x = points["interior"].clone().requires_grad_()
        u, v, p = model(x).unbind(1)
        u_slope, v_slope, p_slope = gradient(u, x), gradient(v, x), gradient(p, x)
        force_x, force_y = (
            u * slope[:, 0] + v * slope[:, 1] + p_slope[:, axis] - laplacian(of, x) / self.reynolds
            for axis, (of, slope) in enumerate(((u, u_slope), (v, v_slope)))
        )
        walls = model(points["walls"])
        return {
            "momentum along x": (force_x, 1.0),
            "momentum along y": (force_y, 1.0),
            "continuity": (u_slope[:, 0] + v_slope[:, 1], 1.0),
            "walls, u": (walls[:, 0] - points["speed of the wall"], self.boundary_weight),
            "walls, v": (walls[:, 1], self.boundary_weight),
        }
