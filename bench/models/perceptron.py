"""The networks that are trained: tanh perceptrons, as is usual for physics-informed networks."""

import math
from collections.abc import Callable, Sequence
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


class Periodic(nn.Module):
    """A network of (x, t) that is periodic in x: it gets a cosine and a sine of x, and t / `end`."""

    def __init__(self, network: nn.Module, *, period: float, end: float) -> None:
        super().__init__()
        self.network, self.wave, self.end = network, 2 * math.pi / period, end

    def forward(self, x: Tensor) -> Tensor:
        """Return the values (N,outputs) at points (N,2)."""
        phase = self.wave * x[:, 0]
        return self.network(torch.stack([phase.cos(), phase.sin(), x[:, 1] / self.end], dim=1))


class Anchored(nn.Module):
    """fixed(x) + distance(x) network(x): equal to `fixed` wherever the distance is 0, however it trains."""

    def __init__(
        self,
        network: nn.Module,
        fixed: Callable[[Tensor], Tensor],
        distance: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.network, self.fixed, self.distance = network, fixed, distance

    def forward(self, x: Tensor) -> Tensor:
        """Return the values (N,1) at points (N,d)."""
        return self.fixed(x).unsqueeze(-1) + self.distance(x).unsqueeze(-1) * self.network(x)
