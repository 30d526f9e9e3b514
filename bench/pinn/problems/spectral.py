"""Reference solutions by spectral methods: Fourier series in x that evolve in t, and Chebyshev series."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
# On a circle of radius 1 the mean over so many points gives the weights of a step to rounding.
CONTOUR = 16
# Points at which a series is summed at once; bounds the memory.
CHUNK = 2048


@dataclass(frozen=True)
class Series:
    """A real function of (x, t), a Fourier series in x whose coefficients are Chebyshev series in t.

    Attributes:
        coefficients: Complex (degree in t + 1, wave number), of wave numbers from 0 on.
        start, period: Where x begins and how long a period is.
        end: t runs from 0 to it.
    """

    coefficients: Tensor
    start: float
    period: float
    end: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the values (N,) at points (N,2), differentiable with respect to them."""
        return torch.cat([self._sum(part) for part in x.split(CHUNK)])

    def _sum(self, x: Tensor) -> Tensor:
        degrees, waves = self.coefficients.shape
        in_time = chebyshev(2 * x[:, 1] / self.end - 1, degrees)
        phase = (x[:, :1] - self.start) * (2 * math.pi / self.period) * torch.arange(waves, dtype=x.dtype)
        real, imaginary = in_time @ self.coefficients.real, in_time @ self.coefficients.imag
        return (real * phase.cos() - imaginary * phase.sin()).sum(dim=1)


def evolve(
    start_values: Callable[[Array], Array],
    linear: Callable[[Array], Array],
    nonlinear: Callable[[Array], tuple[Array, Array]],
    *,
    start: float,
    period: float,
    end: float,
    points: int,
    step: float,
    nodes: int,
) -> Series:
    """Return the solution of u_t = L u + a(u) + d/dx b(u) from u(x, 0) on, periodic in x.

    Fourier collocation in space; in time exponential Runge-Kutta steps of fourth order (Cox and Matthews
    2002), whose weights are means over a circle (Kassam and Trefethen 2005), to Chebyshev points.

    Args:
        start_values: u(x, 0) at points (points,).
        linear: The symbol of L, from wave numbers.
        nonlinear: The values a and b at values of u.
        points: Collocation points of a period, even.
        step: The longest time step.
        nodes: Degree of the Chebyshev series in time.
    """
    grid = start + period * np.arange(points) / points
    waves = 2 * math.pi / period * np.arange(points // 2 + 1)
    derivative = 1j * waves
    # The derivative of the highest wave is not seen on the grid.
    derivative[-1] = 0
    symbol = np.asarray(linear(waves), dtype=complex)

    def slope(v: Array) -> Array:
        a, b = nonlinear(np.fft.irfft(v, points))
        return np.fft.rfft(a) + derivative * np.fft.rfft(b)

    times = end * (1 - np.cos(math.pi * np.arange(nodes + 1) / nodes)) / 2
    v = np.fft.rfft(start_values(grid))
    states = [v]
    for length in np.diff(times):
        count = math.ceil(length / step)
        weights = _weights(length / count * symbol, length / count)
        for _ in range(count):
            v = _advance(v, slope, *weights)
        states.append(v)
    coefficients = _to_chebyshev(np.stack(states)) / points
    # A wave and its negative, which is not stored.
    coefficients[:, 1:-1] *= 2
    return Series(torch.from_numpy(coefficients), start, period, end)


def _weights(z: Array, h: float) -> tuple[Array, ...]:
    """Return what a step of length h takes of the state and of its slopes; z = h times the symbol."""
    circle = z[:, None] + np.exp(2j * math.pi * (np.arange(CONTOUR) + 0.5) / CONTOUR)
    e = np.exp(circle)
    cube = circle**3
    half = h * ((np.exp(circle / 2) - 1) / circle).mean(axis=1)
    first = h * ((-4 - circle + e * (4 - 3 * circle + circle**2)) / cube).mean(axis=1)
    middle = h * ((2 + circle + e * (circle - 2)) / cube).mean(axis=1)
    last = h * ((-4 - 3 * circle - circle**2 + e * (4 - circle)) / cube).mean(axis=1)
    return np.exp(z), np.exp(z / 2), half, first, middle, last


def _advance(
    v: Array,
    slope: Callable[[Array], Array],
    whole_decay: Array,
    half_decay: Array,
    half: Array,
    first: Array,
    middle: Array,
    last: Array,
) -> Array:
    n = slope(v)
    a = half_decay * v + half * n
    n_a = slope(a)
    n_b = slope(half_decay * v + half * n_a)
    n_c = slope(half_decay * a + half * (2 * n_b - n))
    return whole_decay * v + first * n + 2 * middle * (n_a + n_b) + last * n_c


def chebyshev(z: Tensor, count: int) -> Tensor:
    """Return the Chebyshev polynomials of degree 0 to `count` - 1 (N,count) at z (N,), by recurrence."""
    columns = [torch.ones_like(z), z]
    while len(columns) < count:
        columns.append(2 * z * columns[-1] - columns[-2])
    return torch.stack(columns[:count], dim=1)


def chebyshev_points(degree: int) -> Array:
    """Return cos(pi j / degree), from 1 down to -1."""
    return np.cos(math.pi * np.arange(degree + 1) / degree)


def to_coefficients(degree: int) -> Array:
    """Return the matrix that makes Chebyshev coefficients of the values at `chebyshev_points`."""
    angles = math.pi * np.outer(np.arange(degree + 1), np.arange(degree + 1)) / degree
    matrix = 2 / degree * np.cos(angles)
    matrix[:, [0, -1]] /= 2
    matrix[[0, -1]] /= 2
    return matrix


def differentiation(degree: int) -> Array:
    """Return the matrix (Trefethen 2000) that differentiates the interpolant at `chebyshev_points`."""
    x = chebyshev_points(degree)
    signs = (-1.0) ** np.arange(degree + 1)
    signs[[0, -1]] *= 2
    matrix = np.outer(signs, 1 / signs) / (x[:, None] - x + np.eye(degree + 1))
    return matrix - np.diag(matrix.sum(axis=1))


def _to_chebyshev(values: Array) -> Array:
    """Return coefficients of values at times in ascending order."""
    return to_coefficients(len(values) - 1) @ values[::-1]
