"""Gram matrices of every layer for one forward and backward, without an optimizer."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fngd_kernels import Sketch
from fngd_kernels.sketch import as_sketch

from ..rules import block_gram
from .block import Gradients, ParameterBlock, RoutedModule, Uses
from .collector import Collected, UseCollector
from .discovery import USER_REASONS, find_blocks, listed
from .routing import route


def layer_grams(
    model: nn.Module, closure: Callable[[], Tensor], *, sketch: int | Sketch | None = None
) -> dict[str, Tensor]:
    """Return K (N, N) of every layer: K_ij = <C_i, C_j>, C_n the contribution of sample n to its gradient.

    For tangent kernels, influence functions, gradient diversity and, on the diagonal, per-sample norms; the
    sum over layers is the Gram matrix of the whole network. Samples are the rows of each layer's input,
    the weight and bias that train are one block. No `.grad` is touched and no weight gradient is formed.

    Args:
        model: The network, in any mode; modules that no rule serves, and those whose calls cannot be captured
            (nested inputs, torch.func transforms, ...), are named in a warning and left out.
        closure: () -> scalar loss, runs the forward; with a batch mean C_n carries the factor 1/N. It is
            called a second time where the loss holds derivatives of the model.
        sketch: An fngd_kernels.Sketch, or its size alone, to compress contributions; None for the exact K.

    Returns:
        {module name: K}, float32 (float64 for a float64 layer), for the layers that the loss depends on.

    Raises:
        ValueError: A model without layers to serve or with parameters that have no values yet, a closure
            without a differentiable loss, or a sketch out of range.
        TypeError: A sketch of another type.

    Source: the Gram form of the empirical Fisher, Ou et al. 2024 (arXiv 2403.03473).
    """
    sketch = as_sketch(sketch)
    blocks, left_out = find_blocks(model, model.parameters(), affine=True)
    if not blocks:
        raise ValueError(f"model: no supported layer in {type(model).__name__} ({listed(left_out)})")
    collector = _GramCollector(sketch, keeps_uses=False)
    if not _run(closure, blocks, collector):
        collector = _GramCollector(sketch, keeps_uses=True)
        _run(closure, blocks, collector)
    for module, reason in collector.turned_away.items():
        if module.block not in collector.grams:
            left_out[module.name] = reason
    unserved = {name: reason for name, reason in left_out.items() if reason not in USER_REASONS}
    if unserved:
        warnings.warn(f"layer_grams leaves out {listed(unserved)}", stacklevel=2)
    return {block.name: collector.grams[block] for block in blocks if block in collector.grams}


def _run(closure: Callable[[], Tensor], blocks: list[ParameterBlock], collector: "_GramCollector") -> bool:
    """Let a collector form the Gram matrices; return whether it kept what it turned out to need."""
    restore = route([module for block in blocks for module in block.modules], collector)
    try:
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"closure: expected a scalar loss with a gradient, got {loss!r}")
        parameters = [p for block in collector.called_blocks for p in block.parameters if p.requires_grad]
        if parameters:
            torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        restore()
    return not collector.missed


class _GramCollector(UseCollector):
    """Forms each block's Gram matrix as soon as all its uses are in, and may let their tensors go then."""

    returns_gradients = False

    def __init__(self, sketch: Sketch | None, *, keeps_uses: bool) -> None:
        super().__init__()
        self.sketch, self.keeps_uses = sketch, keeps_uses
        self.missed = False  # whether a use came after those before it were let go
        self.grams: dict[ParameterBlock, Tensor] = {}
        self.turned_away: dict[RoutedModule, str] = {}  # why calls were not captured

    def turn_away(self, module: RoutedModule, reason: str) -> None:
        if module.trains():
            self.turned_away[module] = reason

    def forward(self, module: RoutedModule, x: Tensor, *arguments: Any) -> Any:
        return self.collect(module, None, x, *arguments)

    def complete(self, block: ParameterBlock, uses: Uses) -> None:
        self.missed |= block in self.grams and not self.keeps_uses
        if not self.missed:
            self.grams[block] = block_gram(uses, self.sketch)
        if not self.keeps_uses:
            uses.clear()

    def deliver(
        self, batch: None, collected: dict[ParameterBlock, Collected], *, early: bool
    ) -> Iterator[tuple[RoutedModule, Gradients]]:
        """Complete the blocks with calls that no gradient reached, which contribute nothing."""
        for block, found in collected.items():
            self.finish(block, found)
        return iter(())
