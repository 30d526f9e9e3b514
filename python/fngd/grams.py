"""Gram matrices of every layer for one forward and backward, without an optimizer."""

import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fngd_kernels.ops.nodes import Gradients

from .capture import Layer, find_layers, route
from .rules import Use


def layer_grams(model: nn.Module, closure: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return K (N, N) for every layer: K_ij = <C_i, C_j>, C_n sample n's contribution to the layer's
    gradient.

    For tangent kernels, influence functions, gradient diversity and, on the diagonal, per-sample gradient
    norms.
    The sum of all K is the Gram matrix of the whole network. Samples are the rows of each layer's input;
    weight and
    bias are one block; no `.grad` is touched and no weight gradient is formed.

    model: the network, in training mode; modules that no rule serves are named in a warning and left out.
    closure: () -> scalar loss; runs the forward. With a batch mean, C_n carries the factor 1/N.

    Returns:
        {module name: K}, fp32 (fp64 for a fp64 layer), for the layers that took part in the loss.

    Raises:
        ValueError: the model has no supported layer, or the closure does not return a scalar with a gradient.
    """
    layers, left_out = find_layers(model, model.parameters(), affine=True)
    if not layers:
        raise ValueError(f"model: no supported layer in {type(model).__name__}")
    if left_out:
        warnings.warn(
            f"layer_grams leaves out {'; '.join(f'{n}: {r}' for n, r in left_out.items())}", stacklevel=2
        )
    collector = _Collector()
    restore = route(layers, collector)
    try:
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"closure: expected a scalar loss with a gradient, got {loss!r}")
        weights = [layer.module.weight for layer in collector.open]
        if weights:
            torch.autograd.grad(loss, weights, allow_unused=True)
    finally:
        restore()
    return collector.grams()


class _Collector:
    """Forms each layer's Gram matrix as soon as all its uses were captured, and lets their tensors go."""

    def __init__(self) -> None:
        self.open: dict[Layer, int] = defaultdict(int)
        self._uses: dict[Layer, list[Use]] = defaultdict(list)
        self._grams: dict[Layer, Tensor] = {}

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        if not layer.takes(x):
            return layer.plain(x)
        self.open[layer] += 1
        return layer.rule.forward(layer.module, x, None, partial(self._captured, layer))

    @torch.no_grad()
    def _captured(self, layer: Layer, a: Tensor, e: Tensor, selective: bool) -> Gradients | None:
        self._uses[layer].append((a, e))
        if len(self._uses[layer]) == self.open[layer]:
            self._close(layer)
        return None

    def _close(self, layer: Layer) -> None:
        self._grams[layer] = layer.rule.gram(layer.module, self._uses.pop(layer))

    def grams(self) -> dict[str, Tensor]:
        """Return K by layer name; a use that no gradient reached contributes nothing."""
        for layer in list(self._uses):
            self._close(layer)
        return {
            layer.name: self._grams[layer] for layer in sorted(self._grams, key=lambda layer: layer.index)
        }
