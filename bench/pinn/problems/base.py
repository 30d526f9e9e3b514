"""What every problem is: training points, residuals at them, and pairs to measure the error on."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.models.perceptron import MLP

# Training points are drawn by the seed of the run; these two are far from any of those.
VALIDATION_SEED, TEST_SEED = 1_000_001, 1_000_002

Model = Callable[[Tensor], Tensor]
Points = dict[str, Tensor]
Residuals = dict[str, tuple[Tensor, float]]


@dataclass(frozen=True)
class Pairs:
    """Points and the values (N,) or (N,c) a network's first outputs should have there."""

    x: Tensor
    u: Tensor


class Problem(ABC):
    """A least-squares problem: the loss is the sum of weight * mean(r^2) over the blocks of residuals."""

    name: str
    title: str
    widths: tuple[int, ...]
    validation: Pairs
    test: Pairs
    # True value of the coefficient to be found, in inverse problems.
    coefficient: float | None = None
    # Noisy data: what counts is where the validation error was lowest, not the end.
    early_stopping = False

    def network(self) -> nn.Module:
        """Return a newly initialised network."""
        return MLP(self.widths)

    @abstractmethod
    def points(self, seed: int) -> Points:
        """Return training points, and what is known at them."""

    @abstractmethod
    def residuals(self, model: Model, points: Points) -> Residuals:
        """Return {block: (residuals (N,), weight)} of `model` at `points`."""


class Equation(Problem):
    """A differential equation in a box, with its solution.

    Attributes:
        low, high: Corners of the box.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    @abstractmethod
    def solution(self, x: Tensor) -> Tensor:
        """Return the solution (N,) at points (N,d), of a system the first outputs (N,c) of its network."""

    def draw(self, count: int, seed: int) -> Tensor:
        """Return scrambled Sobol points (count,d) in the box."""
        low, high = (torch.tensor(corner, dtype=torch.float64) for corner in (self.low, self.high))
        engine = torch.quasirandom.SobolEngine(len(low), scramble=True, seed=seed)
        return low + (high - low) * engine.draw(count, dtype=torch.float64)

    def draw_walls(self, count: int, seed: int, axes: range) -> Tensor:
        """Return points (count,d), equally many on the lower and the upper wall of each of `axes`."""
        x = self.draw(count, seed)
        # Runs of Sobol points: every n-th of them would not spread over the wall.
        for wall, part in enumerate(x.tensor_split(2 * len(axes))):
            axis = axes[wall // 2]
            part[:, axis] = (self.low, self.high)[wall % 2][axis]
        return x

    def pairs(self, count: int, seed: int) -> Pairs:
        """Return fresh points and the solution there."""
        x = self.draw(count, seed)
        return Pairs(x, self.solution(x))


def gradient(u: Tensor, x: Tensor) -> Tensor:
    """Return the gradient (N,d), differentiable, of values (N,) at points (N,d), row by row a function."""
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def laplacian(u: Tensor, x: Tensor) -> Tensor:
    """Return the sum (N,) of the second derivatives along every axis, of values (N,) at points (N,d)."""
    first = gradient(u, x)
    second = [gradient(first[:, axis], x)[:, axis] for axis in range(x.shape[1])]
    return torch.stack(second).sum(dim=0)


def mean_squares(residuals: Residuals) -> Tensor:
    """Return the sum over blocks of weight * mean(r^2)."""
    terms = [weight * block.square().mean() for block, weight in residuals.values()]
    return torch.stack(terms).sum()


def predicted(model: Model, x: Tensor, like: Tensor) -> Tensor:
    """Return the model's outputs at `x` that the values `like` are known of, in their shape."""
    with torch.no_grad():
        outputs = model(x)
    return outputs.squeeze(-1) if like.ndim == 1 else outputs[:, : like.shape[1]]


def relative_error(model: Model, pairs: Pairs) -> float:
    """Return ||model(x) - u|| / ||u||."""
    difference = predicted(model, pairs.x, pairs.u) - pairs.u
    return (difference.norm() / pairs.u.norm()).item()
