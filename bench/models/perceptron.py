"""The networks that are trained: tanh perceptrons, as is usual for physics-informed networks."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Tanh perceptron of the given `widths`, input first, with Glorot weights and zero biases; float64."""

    def __init__(self, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            linear = nn.Linear(inputs, outputs, dtype=torch.float64)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.Tanh()]
        super().__init__(*layers[:-1])


class WithCoefficient(nn.Module):
    """A network for the solution, and beside it the coefficient of the equation that is to be found."""

    def __init__(self, network: nn.Module, start: float) -> None:
        super().__init__()
        self.network = network
        self.coefficient = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the solution (N,1) at points (N,d)."""
        return self.network(x)
