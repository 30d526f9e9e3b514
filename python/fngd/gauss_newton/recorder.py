"""Records the uses of layers in each differentiation of the residuals."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..capture import (
    Collected,
    Gradients,
    ParameterBlock,
    RoutedModule,
    UseCollector,
    Uses,
    combined,
)
from ..rules import Use


class UseRecorder(UseCollector):
    """Collects the uses of each differentiation of the residuals, of which there may be many.

    Every use of a weight counts, in the forward and in derivatives that the closure takes of it.
    """

    def __init__(self) -> None:
        super().__init__()
        # Where it is set, every use is answered with the ordinary gradient and none is collected.
        self.returns_gradients = False
        self.uses: Uses = {}  # in the last differentiation

    def forward(self, module: RoutedModule, x: Tensor, *arguments: Any) -> Any:
        """Return the module's output, from a node that collects."""
        return self.collect(module, None, x, *arguments)

    def complete(self, block: ParameterBlock, uses: Uses) -> None:
        """Do nothing before the end: the graph serves several differentiations."""

    def deliver(
        self, batch: None, collected: dict[ParameterBlock, Collected], *, early: bool
    ) -> Iterator[tuple[RoutedModule, Gradients]]:
        """Keep the uses; no gradient is made of them."""
        self.uses = {module: uses for each in collected.values() for module, uses in each.uses.items()}
        return iter(())

    def answer(self, module: RoutedModule, batch: None, use: Use, *, is_only_use: bool) -> Gradients:
        """Return the ordinary gradient."""
        return combined(module, [use], None)
