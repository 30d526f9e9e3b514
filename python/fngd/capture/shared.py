"""Parameters that came to be shared, or no longer are, after the blocks were found."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from torch import nn

from ..torch_private import parameters_of
from .block import ParameterBlock


class SharedParameters:
    """Notes, as `why_shared`, which blocks have parameters that are no longer theirs alone.

    The gradient of such a parameter would be neither that of one block nor the plain one.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[ParameterBlock]) -> None:
        self._model, self._blocks = model, blocks
        self._places = _places(model.modules())
        self._distinct = self._count_distinct()

    def _count_distinct(self) -> int:
        """Return how many parameters the places hold: fewer once two are tied, more once they are not."""
        return len(set(map(id, chain.from_iterable(map(dict.values, self._places)))))

    def glance(self) -> None:
        """Look anew if the places that were seen last hold more or fewer parameters; takes microseconds."""
        if self._count_distinct() != self._distinct:
            self.look()

    def look(self) -> None:
        """Go through the whole model, modules that joined it since included."""
        modules = dict(self._model.named_modules())
        self._places = _places(modules.values())
        self._distinct = self._count_distinct()
        block_of = {part: block for block in self._blocks for each in block.modules for part in each.parts()}
        holders: dict[int, list[str]] = defaultdict(list)
        owners: dict[int, set[ParameterBlock | None]] = defaultdict(set)
        for name, module in modules.items():
            block = block_of.get(module)
            kind = type(module).__name__ if block is None else block.kind
            for p in module.parameters(recurse=False):
                holders[id(p)].append(f"{name or 'the model itself'} ({kind})")
                owners[id(p)].add(block)
        for block in self._blocks:
            block.why_shared = ""
            shared = [p for p in block.parameters if len(owners[id(p)]) > 1]
            if shared:
                names = ", ".join(holders[id(shared[0])])
                block.why_shared = f"its parameter came to be shared after the optimizer was made, by {names}"
            elif len({id(module.parameters[0]) for module in block.modules}) > 1:
                block.why_shared = "its modules no longer share a weight"


def _places(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    return [place for place in map(parameters_of, modules) if place]
