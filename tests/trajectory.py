"""FNGD with share="sample" from its definition: float64 gradients per sample, dense solves, a dictionary."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from networks import blocks, layer_names


class Definition:
    """A copy of a model whose `backward` leaves what FNGD's should: one weight per sample and layer.

    known: {sample: {layer: weight}}
    plain: layers that keep the plain gradient
    """

    def __init__(self, model: nn.Module, damping: float = 0.1, plain: Sequence[str] = ()) -> None:
        self.model, self.damping, self.plain = copy.deepcopy(model), damping, plain
        self.known: dict[int, dict[str, Tensor]] = {}
        self.ids: Sequence[int] = ()
        self.new: set[int] = set()  # those of ids that had no weight yet: known ones keep theirs
        self.solving = True

    def name(self, ids: Sequence[int]) -> None:
        """Name the samples of the next forwards, which are solved for if one of them is not known."""
        self.ids, self.new = ids, {i for i in ids if i not in self.known}
        self.solving = bool(self.new)

    def backward(self, contributions: Tensor) -> None:
        """Add the weighted gradient to .grad; contributions (N,) are what the samples add to the loss."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        rows = [torch.autograd.grad(part, parameters, retain_graph=True) for part in contributions]
        gradients = {n: torch.stack(g) for n, g in zip(names, zip(*rows, strict=True), strict=True)}
        if self.solving:
            weights = {m: self._solved(m, g) for m, g in blocks(self.model, gradients).items()}
            for n, i in enumerate(self.ids):
                if i in self.new:  # the table keeps single precision
                    self.known[i] = {m: s[n].float().double() for m, s in weights.items()}
        else:
            weights = {m: torch.stack([self.known[i][m] for i in self.ids]) for m in self.known[self.ids[0]]}
        layers = layer_names(self.model)
        for name, parameter in self.model.named_parameters():
            gradient = torch.tensordot(weights[layers[name]], gradients[name], dims=1)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _solved(self, module: str, g: Tensor) -> Tensor:
        if module in self.plain:
            return torch.ones(len(g), dtype=g.dtype)
        k = g @ g.T
        v = torch.linalg.solve(
            k + self.damping * k.trace() * torch.eye(len(g), dtype=g.dtype), k.new_ones(len(g))
        )
        return v / v.mean()
