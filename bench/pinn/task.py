"""What a method gets to train: a network and the residuals it is to make small."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bench.pinn.problems import Points, Problem, mean_squares
from bench.pinn.problems.base import Residuals


@dataclass(frozen=True)
class Task:
    """A network, its problem and the training points: the `Fit` of bench.peers."""

    problem: Problem
    network: nn.Module
    points: Points

    @classmethod
    def of(cls, problem: Problem, seed: int) -> "Task":
        """Return the training points and the initial network of `seed`."""
        torch.manual_seed(seed)
        return cls(problem, problem.network(), problem.points(seed))

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters."""
        return list(self.network.parameters())

    def residuals(self) -> Residuals:
        """Return the residuals at the training points."""
        return self.problem.residuals(self.network, self.points)

    def backward(self) -> Tensor:
        """Return the loss, and leave its gradient in `.grad`."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = mean_squares(self.residuals())
        # Without `inputs` the gradient at the points would be formed as well.
        loss.backward(inputs=self.parameters)
        return loss
