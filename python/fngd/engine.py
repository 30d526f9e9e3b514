"""What one training step does: layers are captured, solved for at the end of backward, and weighted."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from .capture import Layer, Member
from .distributed import in_use, is_split
from .gate import Gate, Passage
from .memory import within_memory
from .rules import Part, Use, added, tied_gram
from .sharing import Batch, Sharing
from .solver import OUT_OF_MEMORY, Solver

Uses = dict[Member, list[Use]]


class Captured:
    """The uses of a layer's members in one batch, and what came of its Gram matrix inside backward."""

    def __init__(self) -> None:
        self.uses: Uses = defaultdict(list)
        self.complete = False  # whether k was looked for with all uses known
        self.k: Tensor | None = None


class Sink:
    """What hands the uses of one forward to the engine; alive as long as they may be differentiated."""

    def __init__(self, engine: "Engine", member: Member, batch: Batch) -> None:
        self.engine, self.member, self.batch = engine, member, batch
        self.differentiated = False  # whether the parameters' gradient was asked for with create_graph=True
        self.gate: Gate | None = None
        # Of the backward that this forward runs in, where a checkpoint runs it again; else -1.
        self.task = torch._C._current_graph_task_id()

    def __call__(self, a: Any, e: Tensor, biased: bool, selective: bool) -> Sequence[Tensor | None] | None:
        """Receive one use inside backward, as nodes.py describes."""
        use = Use(a, e, biased)
        self.differentiated |= selective and torch.is_grad_enabled()
        if not self.differentiated:
            return self.engine.captured(self, use, selective)
        # Weights have no derivative: the plain gradient, and its own, by operators that autograd knows.
        self.member.layer.keep_plain("its gradient was asked for with create_graph=True")
        contributions = self.member.rule.contributions(self.member.module, [use])
        return [None if c is None else c.sum(0) for c in contributions]


class Engine:
    """The router of an optimizer's layers: a solving batch is captured, any other is weighted as it runs.

    A layer whose input does not have one row per sample of the batch keeps the plain gradient. Without sample
    ids every layer takes the rows of its own input as samples.
    """

    def __init__(self, layers: Sequence[Layer], sharing: Sharing, solver: Solver) -> None:
        self.layers, self.sharing, self.solver = list(layers), sharing, solver
        self._captures = False  # whether a forward was captured since the last step
        self._watches: list[Any] = []  # handles of the hooks that were set since then
        # By autograd graph task, batch and layer; a backward that failed leaves its own behind.
        self._pending: dict[int, dict[Batch, dict[Layer, Captured]]] = {}
        self._passages: dict[Layer, tuple[Batch, Passage]] = {}  # of the last forward

    def finish_step(self) -> None:
        """Drop what a failed or unused backward left behind."""
        self.drop_failed()
        self._passages.clear()
        if self._captures:
            self._captures = False
            while self._watches:
                self._watches.pop().remove()
            for layer in self.layers:
                layer.open_uses.clear()

    def drop_failed(self) -> None:
        """Drop what a failed backward has captured."""
        self._pending.clear()

    # ---- forward ----

    @property
    def members(self) -> list[Member]:
        """The modules of all layers."""
        return [member for layer in self.layers for member in layer.members]

    def forward(self, member: Member, x: Tensor, *arguments: Any) -> Any:
        """Return the module's output, from a node that weights or captures its parameter gradients."""
        if not member.takes(x):
            return member.plain(x, *arguments)
        layer, batch, samples = member.layer, self.sharing.batch, x.shape[0]
        if batch is None:
            raise RuntimeError(
                "share='sample' needs to know which samples a batch holds: iterate "
                "`fngd.track(loader, optimizer)`, or call optimizer.set_samples(ids) before the forward, "
                "or choose share='none', 'position' or 'mean'"
            )
        # Spelled out: torch.compile is wrong about `in` where a size is symbolic.
        if batch.size is not None and batch.size != samples:
            layer.keep_plain(
                "its input has other rows than the batch's samples",
                f"its input has {samples} rows, the batch has {batch.size} samples",
            )
            return member.plain(x, *arguments)
        if is_split(member.module._parameters["weight"]):
            layer.keep_plain("its weight is split over ranks by tensor parallelism")
            return member.plain(x, *arguments)
        if member.substituted:
            layer.keep_plain("other tensors stand in the place of its parameters")
            return member.plain(x, *arguments)
        scale = self.sharing.weights(batch, layer.index, samples)
        if scale is None:
            return self._capture(member, batch, x, *arguments)
        return member.rule.forward(member.module, x, scale, None, *arguments)

    @torch.compiler.disable(reason="a batch that is solved for runs eagerly; see fngd.FNGD.solving")
    def _capture(self, member: Member, batch: Batch, x: Tensor, *arguments: Any) -> Any:
        self._captures = True
        sink = Sink(self, member, batch)
        member.layer.open_uses.add(sink)
        if sink.task != -1:
            self._open_task(sink.task)
        if not _awaited(member.layer):
            y = member.rule.forward(member.module, x, None, sink, *arguments)
            if member.layer.solves == 0:
                self._watch(member)
            return y
        passage = self._passage(member.layer, batch)
        sink.gate = passage.gate
        with passage.open(member.owner):
            return member.rule.forward(member.module, x, None, sink, *arguments)

    def _passage(self, layer: Layer, batch: Batch) -> Passage:
        """Return the one through which all uses of a layer in this forward reach its parameters."""
        named, passage = self._passages.get(layer, (None, None))
        if passage is None or named is not batch or not passage.leads_to(layer):
            passage = Passage(Gate(layer, partial(self._answer, layer, batch)))
            self._passages[layer] = batch, passage
        return passage

    def _watch(self, member: Member) -> None:
        """Note gradients that reach a member's parameters past its calls, which is a matter of the model."""

        def note(gradients: Sequence[Tensor | None]) -> None:
            if gradients[0] is not None and not member.layer.note:
                member.layer.keep_plain("a parameter of it is also used outside of its calls")

        for p in member.parameters:
            if p is not None and p.requires_grad:
                self._watches.append(torch.autograd.graph.get_gradient_edge(p).node.register_prehook(note))

    # ---- backward ----

    @torch.no_grad()
    def captured(self, sink: Sink, use: Use, selective: bool) -> Sequence[Tensor | None] | None:
        """Receive one use of a layer inside backward; return its gradients where they must be known now."""
        member, batch, task = sink.member, sink.batch, torch._C._current_graph_task_id()
        layer = member.layer
        layer.open_uses.discard(sink)
        last_use = not layer.open_uses
        if sink.gate is not None:
            sink.gate.collect(member, use)
            return None
        if selective or _awaited(layer):
            only_use = last_use and layer.answered_task != task
            layer.answered_task = task
            weights: dict[Layer, Tensor] = {}
            if not only_use:
                layer.keep_plain(
                    "used several times, and its gradient must be returned before the last use is known"
                )
            elif (k := _gram(layer, {member: [use]})) is not None:
                self.solver.note_bytes([use], [k])
                weights = self.solver.solve(batch, {layer: k}, task, early=True)
            return _combined(member, [use], weights.get(layer))
        # Of one backward inside another: the uses of both are solved for together.
        if sink.task in self._pending:
            task = sink.task
        self._open_task(task)
        captured = self._pending[task][batch][layer]
        captured.uses[member].append(use)
        # At once, while e is in the cache; a derivative of the layer that comes still later makes it void.
        captured.complete = last_use
        captured.k = _gram(layer, captured.uses) if last_use else None
        return None

    @torch.no_grad()
    def _answer(self, layer: Layer, batch: Batch, uses: Uses) -> dict[Member, Sequence[Tensor | None]]:
        """Return the weighted gradients of a layer whose uses in this backward are done."""
        k = _gram(layer, uses)
        grams = {} if k is None else {layer: k}
        self.solver.note_bytes((use for found in uses.values() for use in found), grams.values())
        weights = self.solver.solve(batch, grams, torch._C._current_graph_task_id(), early=True)
        return {member: _combined(member, found, weights.get(layer)) for member, found in uses.items()}

    def _open_task(self, task: int) -> None:
        """Have the end of the backward that runs now solve for what is captured until then."""
        if task not in self._pending:
            self._pending[task] = defaultdict(lambda: defaultdict(Captured))
            Variable._execution_engine.queue_callback(partial(self._finish_backward, task))

    @torch.no_grad()
    def _finish_backward(self, task: int) -> None:
        """Solve for all layers of a backward at once and add their weighted gradients to .grad."""
        for batch, captured in self._pending.pop(task).items():
            grams = {}
            for layer, found in captured.items():
                k = found.k if found.complete else _gram(layer, found.uses)
                if k is not None:
                    grams[layer] = k
            self.solver.note_bytes(
                (use for found in captured.values() for uses in found.uses.values() for use in uses),
                grams.values(),
            )
            weights = self.solver.solve(batch, grams, task)
            while captured:  # each layer's tensors are let go as soon as they were combined
                layer, found = captured.popitem()
                while found.uses:
                    member, uses = found.uses.popitem()
                    gradients = _combined(member, uses, weights.get(layer))
                    del uses
                    for parameter, gradient in zip(member.parameters, gradients, strict=True):
                        if parameter is not None and parameter.requires_grad and gradient is not None:
                            _accumulate(parameter, gradient)


def _gram(layer: Layer, uses: Mapping[Member, Sequence[Use]]) -> Tensor | None:
    """Return the layer's Gram matrix, None where its uses are not of the same samples or memory runs out."""
    sizes = {use.e.shape[0] for found in uses.values() for use in found}
    if len(sizes) > 1:
        reason = "used on batches of several sizes"
        layer.keep_plain(reason, f"{reason} ({sorted(sizes)}) in one backward")
        return None
    parts = [Part(member.rule, member.module, found) for member, found in uses.items()]
    k = within_memory(partial(tied_gram, parts))
    if k is None:
        layer.keep_plain(OUT_OF_MEMORY)
    return k


def _combined(member: Member, uses: Sequence[Use], s: Tensor | None) -> Sequence[Tensor | None]:
    """Return the gradients of a member's parameters, weighted by s; without s the plain ones."""
    if s is not None:
        return member.rule.combine(member.module, uses, s)
    ones = [use.e.new_ones(use.e.shape[0]) for use in uses]
    return added([member.rule.combine(member.module, [u], s) for u, s in zip(uses, ones, strict=True)])


def _awaited(layer: Layer) -> bool:
    """Return whether a hook or a gradient reducer waits for this layer's gradient inside backward."""
    return in_use() or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in layer.parameters)


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Do what autograd does for a leaf: keep the parameter's dtype and memory layout, add in place."""
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
