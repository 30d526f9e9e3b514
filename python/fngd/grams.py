"""Gram matrices of every layer for one forward and backward, without an optimizer."""

import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Layer, Member, route
from .discovery import find_layers
from .rules import Part, Use, tied_gram


def layer_grams(model: nn.Module, closure: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return K (N, N) of every layer: K_ij = <C_i, C_j>, C_n the contribution of sample n to its gradient.

    For tangent kernels, influence functions, gradient diversity and, on the diagonal, per-sample norms; the
    sum over layers is the Gram matrix of the whole network. Samples are the rows of each layer's input,
    weight and bias are one block. No `.grad` is touched and no weight gradient is formed.

    model: the network, in training mode; modules that no rule serves are named in a warning and left out
    closure: () -> scalar loss, runs the forward; with a batch mean C_n carries the factor 1/N

    Returns: {module name: K}, float32 (float64 for a float64 layer), for the layers that the loss depends on
    Raises: ValueError for a model without layers to serve, or a closure without a differentiable loss.
    Source: the Gram form of the empirical Fisher, Ou et al. 2024 (arXiv 2403.03473).
    """
    layers, left_out = find_layers(model, model.parameters(), affine=True)
    if not layers:
        raise ValueError(f"model: no supported layer in {type(model).__name__}")
    if left_out:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        warnings.warn(f"layer_grams leaves out {reasons}", stacklevel=2)
    collector = _Collector()
    restore = route([member for layer in layers for member in layer.members], collector)
    try:
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"closure: expected a scalar loss with a gradient, got {loss!r}")
        parameters = [p for layer in collector.open for p in layer.parameters if p.requires_grad]
        if parameters:
            torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        restore()
    return collector.grams()


class _Collector:
    """Forms each layer's Gram matrix as soon as all its uses were captured, and lets their tensors go."""

    def __init__(self) -> None:
        self.open: dict[Layer, int] = defaultdict(int)
        self._uses: dict[Layer, list[tuple[Member, Use]]] = defaultdict(list)
        self._grams: dict[Layer, Tensor] = {}

    def forward(self, member: Member, x: Tensor, *arguments: Any) -> Any:
        if not member.takes(x):
            return member.plain(x, *arguments)
        self.open[member.layer] += 1
        return member.rule.forward(member.module, x, None, partial(self._captured, member), *arguments)

    @torch.no_grad()
    def _captured(self, member: Member, a: Any, e: Tensor, biased: bool, selective: bool) -> None:
        layer = member.layer
        self._uses[layer].append((member, Use(a, e, biased)))
        if len(self._uses[layer]) == self.open[layer]:
            self._close(layer)

    def _close(self, layer: Layer) -> None:
        uses: dict[Member, list[Use]] = defaultdict(list)
        for member, use in self._uses.pop(layer):
            uses[member].append(use)
        self._grams[layer] = tied_gram([Part(m.rule, m.module, found) for m, found in uses.items()])

    def grams(self) -> dict[str, Tensor]:
        """Return K by layer name; a use that no gradient reached contributes nothing."""
        for layer in list(self._uses):
            self._close(layer)
        in_order = sorted(self._grams, key=lambda layer: layer.index)
        return {layer.name: self._grams[layer] for layer in in_order}
