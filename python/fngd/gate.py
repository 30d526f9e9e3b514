"""One autograd node before all uses of a layer's parameters: a backward runs it once, after the last use."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .capture import Layer, Member
from .rules import Use

Uses = Mapping[Member, Sequence[Use]]
Answer = Callable[[Uses], Mapping[Member, Sequence[Tensor | None]]]


class Gate:
    """Collects the uses of a layer that no gradient was returned for, and answers for them together.

    answer: returns the gradients of the members' parameters from all uses in one backward
    """

    def __init__(self, layer: Layer, answer: Answer) -> None:
        self.answer = answer
        # As they were in the forward: sharding puts others in their place.
        self.parameters = {member: tuple(member.parameters) for member in layer.members}
        self.trained = [p for p in layer.parameters if p.requires_grad]
        # By autograd graph task: several backwards may go through one forward.
        self.uses: dict[int, dict[Member, list[Use]]] = defaultdict(lambda: defaultdict(list))

    def collect(self, member: Member, use: Use) -> None:
        """Keep a use until autograd has done all of this backward."""
        self.uses[torch._C._current_graph_task_id()][member].append(use)

    def gradients(self, arrived: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the trained parameters, and those that arrived from uses kept plain."""
        sums: dict[Any, Tensor] = {p: g for p, g in zip(self.trained, arrived, strict=True) if g is not None}
        uses = self.uses.pop(torch._C._current_graph_task_id(), None)
        for member, found in ({} if uses is None else self.answer(uses)).items():
            for p, gradient in zip(self.parameters[member], found, strict=True):
                if gradient is not None:
                    sums[p] = sums[p] + gradient if p in sums else gradient
        return [sums.get(p) for p in self.trained]


class Passage:
    """A layer's parameters behind their gate: what its modules compute with in one forward."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self._passed = dict(zip(gate.trained, _Pass.apply(gate, *gate.trained), strict=True))

    def leads_to(self, layer: Layer) -> bool:
        """Return whether the layer's trained parameters are still those behind the gate."""
        return self._passed.keys() == {p for p in layer.parameters if p.requires_grad}

    @contextmanager
    def open(self, module: nn.Module) -> Iterator[None]:
        """Let the module compute with what passed the gate."""
        owned: list[dict[str, Any]] = [each._parameters for each in module.modules()]
        before = [dict(own) for own in owned]
        for own in owned:
            own.update({name: self._passed.get(p, p) for name, p in own.items()})
        try:
            yield
        finally:
            for own, parameters in zip(owned, before, strict=True):
                own.update(parameters)


class _Pass(Function):
    """The identity: autograd asks for its gradient when everything that used its outputs is done."""

    @staticmethod
    def forward(ctx: Any, gate: Gate, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.gate = gate
        ctx.set_materialize_grads(False)
        # Not as views, which would lose their history when a parameter is changed in place.
        return tuple(p.detach() for p in parameters)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.gate.gradients(arrived)
