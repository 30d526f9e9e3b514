"""One autograd node before all uses of a block's parameters: a backward runs it once, after the last use.

Where a hook, DistributedDataParallel or FSDP waits for a gradient, the gradient has to leave inside backward,
and only autograd itself knows which use is the last. So the block's parameters reach their modules through an
identity node: when autograd runs its backward, all uses are in.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from ..rules import Use
from ..torch_private import current_graph_task, parameters_of
from .block import Gradients, ParameterBlock, RoutedModule, Uses

Answer = Callable[[Uses], Mapping[RoutedModule, Gradients]]


class Barrier:
    """Keeps the uses of a block in each backward, and returns the gradients of all of them together.

    answer returns the gradients of the modules' parameters, given all uses in one backward.
    """

    def __init__(self, block: ParameterBlock, answer: Answer) -> None:
        self._answer = answer
        # As they were in the forward: sharding puts others in their place.
        self._parameters = {module: tuple(module.parameters) for module in block.modules}
        self.trained = [p for p in block.parameters if p.requires_grad]
        # Several backwards may go through one forward.
        self._uses: dict[int, Uses] = defaultdict(lambda: defaultdict(list))

    def keep(self, module: RoutedModule, use: Use) -> None:
        """Keep a use until autograd has done all of this backward that leads here."""
        self._uses[current_graph_task()][module].append(use)

    def gradients(self, arrived: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the trained parameters, with those that arrived from uses kept plain."""
        sums: dict[Any, Tensor] = {p: g for p, g in zip(self.trained, arrived, strict=True) if g is not None}
        uses = self._uses.pop(current_graph_task(), None)
        for module, found in ({} if uses is None else self._answer(uses)).items():
            for p, gradient in zip(self._parameters[module], found, strict=True):
                if gradient is not None:
                    sums[p] = sums[p] + gradient if p in sums else gradient
        return [sums.get(p) for p in self.trained]


class ShieldedParameters:
    """A block's parameters behind their barrier: what its modules compute with in one forward.

    Apart from the barrier, which the identity node holds: a node that held its own outputs would never be
    freed.
    """

    def __init__(self, barrier: Barrier) -> None:
        self.barrier = barrier
        self._shielded = dict(zip(barrier.trained, _Identity.apply(barrier, *barrier.trained), strict=True))

    def belong_to(self, block: ParameterBlock) -> bool:
        """Return whether the block's trained parameters are still those behind the barrier."""
        return self._shielded.keys() == {p for p in block.parameters if p.requires_grad}

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """Let the module compute with what is behind the barrier."""
        owned: list[dict[str, Any]] = [parameters_of(each) for each in module.modules()]
        before = [dict(own) for own in owned]
        for own in owned:
            own.update({name: self._shielded.get(p, p) for name, p in own.items()})
        try:
            yield
        finally:
            for own, parameters in zip(owned, before, strict=True):
                own.update(parameters)


class _Identity(Function):
    """Autograd asks for its gradient when everything that used its outputs is done."""

    @staticmethod
    def forward(ctx: Any, barrier: Barrier, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.barrier = barrier
        ctx.set_materialize_grads(False)
        # Not as views, which would lose their history when a parameter is changed in place.
        return tuple(p.detach() for p in parameters)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.barrier.gradients(arrived)
