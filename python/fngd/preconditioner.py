"""What FNGD does with the calls of a model's blocks: plain, weighted, or collected and solved for."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fngd_kernels import Sketch
from fngd_kernels.ops.devices import runs_triton
from fngd_kernels.ops.gram import gram_batch

from .capture import (
    EMPTY,
    EVAL_MODE,
    Collected,
    Gradients,
    ParameterBlock,
    RoutedModule,
    SharedParameters,
    UseCollector,
    Uses,
    combined,
)
from .coefficients import OUT_OF_MEMORY, Batch, Report, Schedule, Solver
from .memory import within_memory
from .rules import Use, block_gram, layer_of
from .torch_private import at_end_of_backward, current_graph_task

EAGER = torch.compiler.disable(reason="a batch that is solved for runs eagerly; see fngd.FNGD.solving")


class Preconditioner(UseCollector):
    """Gives sum_n s_n C_n for the gradient; s is solved for in some batches, looked up in the others.

    A block whose input does not have one row per sample of the batch keeps the plain gradient. Without sample
    ids every block takes the rows of its own input as samples.
    """

    def __init__(
        self,
        blocks: Sequence[ParameterBlock],
        schedule: Schedule,
        solver: Solver,
        report: Report,
        sketch: Sketch | None,
        shared: SharedParameters,
    ) -> None:
        super().__init__()
        self.blocks, self.shared = list(blocks), shared
        self._schedule, self._solver, self._report = schedule, solver, report
        self._sketch = sketch
        # Handles of hooks that note gradients from elsewhere in the first backward that solves.
        self._watches: dict[ParameterBlock, list[Any]] = defaultdict(list)

    @property
    def modules(self) -> list[RoutedModule]:
        """The modules of all blocks."""
        return [module for block in self.blocks for module in block.modules]

    def reset(self) -> None:
        """Forget what was collected, and the hooks that were set, since the last step."""
        super().reset()
        self._stop_watching()
        if not self._report.solved_batches and self._has_gradients():
            self._report.note_plain_step()

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for block in self.blocks for p in block.parameters)

    # Forward

    def serves(self, module: RoutedModule, x: Any) -> bool:
        """Return whether a call on x, samples first, is weighted or solved for; note why if it is not."""
        reason = module.reason_against_call(x) if module.owner.training else EVAL_MODE
        if reason:
            if torch.is_grad_enabled():
                self.turn_away(module, reason)
            return False
        batch = self._schedule.batch
        if batch is None:
            raise RuntimeError(
                "share='sample' needs to know which samples a batch holds: iterate "
                "`fngd.track(loader, optimizer)`, or call optimizer.set_samples(ids) before the forward, "
                "or choose share='none', 'position' or 'mean'"
            )
        if not batch.certain and not torch.compiler.is_compiling():
            batch = self._schedule.identify(x)
        if batch.why_plain:
            self._note_plain(module.block, batch)
            return False
        batch.used = True
        samples = x.shape[0]
        # Spelled out: torch.compile is wrong about `in` where a size is symbolic.
        if batch.size is not None and batch.size != samples:
            self.turn_away(
                module,
                "its input has other rows than the batch's samples",
                f"its input has {samples} rows, the batch has {batch.size} samples",
            )
            return False
        if samples == 0:
            self.turn_away(module, EMPTY)
            return False
        if batch.rows is None and not self._open:
            self._look()
        if module.block.why_shared:
            self.turn_away(module, module.block.why_shared)
            return False
        return True

    def turn_away(self, module: RoutedModule, reason: str, detail: str = "") -> None:
        """Note why a call, or a use of it, keeps the plain gradient, if it has any."""
        if not module.trains():
            return
        if module.owner.training:
            module.block.keep_plain(reason, detail)
        else:
            module.block.note_eval_mode()

    def forward(self, module: RoutedModule, x: Tensor, *arguments: Any) -> Any:
        """Return the module's output; its node weights the parameters' gradient, or has its use collected."""
        batch = self._schedule.batch
        assert batch is not None  # else the call was not served
        s = self._schedule.coefficients(batch, module.block.index, x.shape[0])
        if s is None:
            return self._collect(module, batch, x, *arguments)
        return module.rule.forward(module.module, x, s, None, *arguments)

    def _note_plain(self, block: ParameterBlock, batch: Batch) -> None:
        """Count a call that is plain because its batch is; logged once for all blocks."""
        block.why_plain = batch.why_plain
        if not torch.compiler.is_compiling():
            block.fallbacks.counts[batch.why_plain] += 1
            self._schedule.note_plain(batch)

    @EAGER
    def _look(self) -> None:
        self.shared.look()

    @EAGER
    def _collect(self, module: RoutedModule, batch: Batch, x: Tensor, *arguments: Any) -> Any:
        module.served_through = module.owner.__dict__.get("forward")
        y = self.collect(module, batch, x, *arguments)
        if not self._report.solves[module.block.index] and not self.is_awaited(module.block):
            self._watch(module)
        return y

    def _watch(self, module: RoutedModule) -> None:
        """Note gradients that reach a module's parameters past its calls, which is a matter of the model."""

        def note(gradients: Sequence[Tensor | None]) -> None:
            if gradients[0] is not None and not module.block.why_plain:
                outside = "a parameter of it is also used outside of its calls"
                module.block.keep_plain(module.block.why_refused or outside)

        for p in module.parameters:
            if p is not None and p.requires_grad:
                node = torch.autograd.graph.get_gradient_edge(p).node
                self._watches[module.block].append(node.register_prehook(note))

    def _stop_watching(self, *, solved_only: bool = False) -> None:
        """Remove the hooks of `_watch`, for all blocks or for those that were solved for."""
        for block in list(self._watches):
            if not solved_only or self._report.solves[block.index]:
                for handle in self._watches.pop(block):
                    handle.remove()

    # Backward

    def completes_at_once(self, e: Tensor) -> bool:
        """On a GPU all wait for the end of backward, where one launch serves many layers."""
        return not runs_triton(e.device)

    def complete(self, block: ParameterBlock, uses: Uses) -> Tensor | None:
        """Return the block's Gram matrix, None where its uses are of several sizes or memory runs out."""
        sizes = {use.e.shape[0] for found in uses.values() for use in found}
        if len(sizes) > 1:
            reason = "used on batches of several sizes"
            block.keep_plain(reason, f"{reason} ({sorted(sizes)}) in one backward")
            return None
        k = within_memory(partial(block_gram, uses, self._sketch))
        if k is None:
            block.keep_plain(OUT_OF_MEMORY)
        return k

    def deliver(
        self, batch: Batch, collected: dict[ParameterBlock, Collected], *, early: bool
    ) -> Iterator[tuple[RoutedModule, Gradients]]:
        """Solve for all blocks at once; each block's tensors are let go as soon as they were combined."""
        self._form_together(collected.values())
        found = {block: self.finish(block, each) for block, each in collected.items()}
        grams = {block: k for block, k in found.items() if k is not None}
        del found
        uses = (use for each in collected.values() for own in each.uses.values() for use in own)
        self._report.note_captured(uses, grams.values())
        coefficients = self._solve(batch, grams, early=early)
        del grams
        while collected:
            block, each = collected.popitem()
            each.result = None
            while each.uses:
                module, own = each.uses.popitem()
                gradients = combined(module, own, coefficients.get(block))
                del own
                yield module, gradients

    def _form_together(self, collected: Iterable[Collected]) -> None:
        """Form the Gram matrices of equal linear layers that wait for it, as far as there is memory."""
        alike = defaultdict(list)
        for each in collected:
            layer = None if each.is_complete else layer_of(each.uses)
            if layer is not None and self._sketch is not None:
                layer = within_memory(partial(layer.sketched, self._sketch))
            if layer is not None:
                alike[layer.kind].append((each, layer))
        for group in alike.values():
            if len(group) > 1 or self._sketch is not None:  # what is compressed already is not so again
                a, e, (bias, *_) = zip(*(layer for _, layer in group), strict=True)
                grams = within_memory(partial(gram_batch, a, e, bias))
                if grams is not None:  # else each is formed, or keeps the plain gradient, by itself
                    for (each, _), k in zip(group, grams.unbind(0), strict=True):
                        each.result, each.is_complete = k, True

    def answer(self, module: RoutedModule, batch: Batch, use: Use, *, is_only_use: bool) -> Gradients:
        """Solve for the block at once where this is its only use; else the use keeps the plain gradient."""
        coefficients: Mapping[ParameterBlock, Tensor] = {}
        block, uses = module.block, {module: [use]}
        if not is_only_use:
            block.keep_plain(
                "used several times, and its gradient must be returned before the last use is known"
            )
        elif (k := self.complete(block, uses)) is not None:
            self._report.note_captured([use], [k])
            coefficients = self._solve(batch, {block: k}, early=True)
        return combined(module, [use], coefficients.get(block))

    def _solve(
        self, batch: Batch, grams: Mapping[ParameterBlock, Tensor], *, early: bool
    ) -> dict[ParameterBlock, Tensor]:
        """Return the coefficients (N,) of every block with a Gram matrix, and keep them for later batches."""
        with self._report.timing():
            solved = self._solver.solve({block: batch.by_sample(k) for block, k in grams.items()})
            keep = partial(self._schedule.keep, batch, solved)
            if early:  # the backward may still fail: samples are known only when it did not
                at_end_of_backward(keep)
            else:
                keep()
        rows = [self._schedule.table.index(group.rows) for group in solved]
        self._report.count(batch, current_graph_task(), solved, rows)
        if self._watches:
            at_end_of_backward(partial(self._stop_watching, solved_only=True))
        return {
            block: batch.by_row(s)
            for group in solved
            for block, s in zip(group.blocks, group.s.unbind(0), strict=True)
        }
