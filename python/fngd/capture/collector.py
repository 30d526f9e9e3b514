"""From the calls of modules to the complete uses of their parameters: the only judge of "all uses are in".

The life of a use:

1. A routed module is called, and the subclass of `UseCollector` that it is routed to has the call collected:
   `collect` makes an `OpenCall` and runs the module's rule with it as the handler of its node. The call stays
   open until its first use comes, or the autograd graph that holds it is gone.
2. Backward reaches the node, whose handler receives the layer input and grad_output: a `Use`. It is filed in
   the `Backward` of the running autograd graph task, under its batch and its block.
3. When a block has no open call left, `complete` is called at once, while grad_output is in the cache: FNGD
   forms the Gram matrix there on a CPU; on a GPU `deliver` forms many together. If a further use comes (a
   derivative of the forward was taken), `complete` is called again with all uses, and its earlier result is
   dropped.
4. At the end of the graph task `deliver` gets all that was collected and yields gradients, which are added to
   `.grad`.

Three cases depart from this:

- Somebody waits for the gradient inside backward: a hook on a parameter, or a reducer of data-parallel
  training. The module then computes behind a barrier (`barrier.py`), which delivers when autograd has done
  the block's last use.
- Autograd itself wants the gradient of this very use as a return value (`must_return`: autograd.grad,
  checkpoints, or a wait that began after the forward). The consumer answers for the use alone (`answer`).
- The gradient is to be differentiated (create_graph=True): coefficients have no derivative, the use is plain.
  So it is where autograd wants several gradients at once (is_grads_batched), which have no coefficients
  together.

A backward inside another (reentrant checkpoint) files its uses with the outer one. What a failed backward has
collected is dropped when the gradients are zeroed or the step is made.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import is_initialized
from ..rules import Use, added
from ..torch_private import at_end_of_backward, current_graph_task, is_batched, taken_apart
from .barrier import Barrier, ShieldedParameters
from .block import EMPTY, Gradients, ParameterBlock, RoutedModule, Uses

DIFFERENTIATED = "its gradient was asked for with create_graph=True"
IN_A_BATCH = "its gradients were asked for in a batch (is_grads_batched or vmap)"


class Collected:
    """The uses of a block's modules in one backward, and what `complete` made of them."""

    def __init__(self, uses: Uses | None = None) -> None:
        self.uses: Uses = defaultdict(list) if uses is None else uses
        self.is_complete = False  # whether `result` was made of all uses so far
        self.result: Any = None


class Backward:
    """What one backward, an autograd graph task, has collected: by batch and block."""

    def __init__(self) -> None:
        self.collected: dict[Any, dict[ParameterBlock, Collected]] = defaultdict(
            lambda: defaultdict(Collected)
        )


class OpenCall:
    """One collected call: the handler of its node."""

    def __init__(self, collector: UseCollector, module: RoutedModule, batch: Any) -> None:
        self.collector, self.module, self.batch = collector, module, batch
        self.barrier: Barrier | None = None
        # Graph task of the backward in which activation checkpointing runs this forward again; -1 outside.
        self.outer_task = current_graph_task()
        self.is_differentiated = False

    def __call__(self, a: Any, e: Tensor, biased: bool, must_return: bool) -> Gradients | None:
        """Receive a use inside backward, as fngd_kernels/ops/nodes.py describes."""
        use = Use(a, e, biased)
        self.is_differentiated |= torch.is_grad_enabled()
        if is_batched(a) or is_batched(e):
            self.collector.turn_away(self.module, IN_A_BATCH)
            return self._plain_one_by_one(use)
        if not self.is_differentiated:
            return self.collector.receive(self, use, must_return)
        self.collector.turn_away(self.module, DIFFERENTIATED)
        return self._plain(use)

    def _plain(self, use: Use) -> Gradients:
        """Return the plain gradients, by operators that autograd knows."""
        contributions = self.module.rule.contributions(self.module.module, [use])
        return [None if c is None else c.sum(0) for c in contributions]

    def _plain_one_by_one(self, use: Use) -> Gradients:
        """Return the plain gradients of a use that stands for several."""
        parts, joined = taken_apart(use.e if is_batched(use.e) else use.a)
        a, e = (taken_apart(t)[0] if is_batched(t) else [t] * len(parts) for t in use[:2])
        found = [self._plain(Use(*each, use.biased)) for each in zip(a, e, strict=True)]
        return [None if column[0] is None else joined(list(column)) for column in zip(*found, strict=True)]


class UseCollector:
    """Collects the uses of blocks in each backward, and knows when a block's are all in.

    A subclass routes modules (`forward`), has calls collected (`collect`), and says what becomes of complete
    uses (`complete`, `deliver`, `answer`). How it is known that they are complete is told at the top of this
    file, and is nobody else's concern.
    """

    returns_gradients = True
    """Whether autograd gets gradients of what is collected; if not, nothing is answered inside backward."""

    def __init__(self) -> None:
        self._open: dict[ParameterBlock, weakref.WeakSet[OpenCall]] = defaultdict(weakref.WeakSet)
        self._backwards: dict[int, Backward] = {}
        self._answered: dict[ParameterBlock, int] = {}  # the last backward that a use was answered in
        self._shields: dict[ParameterBlock, tuple[Any, ShieldedParameters]] = {}  # of the last forward

    # What a subclass decides

    def serves(self, module: RoutedModule, x: Any) -> bool:
        """Return whether a call on x, samples first, goes through `forward`; by default in any mode."""
        reason = module.reason_against_call(x) or ("" if x.shape[0] > 0 else EMPTY)
        if reason:
            self.turn_away(module, reason)
        return not reason

    def turn_away(self, module: RoutedModule, reason: str) -> None:
        """Note why a call, or a use of it, keeps the plain gradient."""

    def forward(self, module: RoutedModule, x: Tensor, *arguments: Any) -> Any:
        """Return the output of a call that is served: weighted, or by `collect`."""
        raise NotImplementedError

    def complete(self, block: ParameterBlock, uses: Uses) -> Any:
        """Return what is wanted of a block whose uses are all in, as far as is known."""
        raise NotImplementedError

    def completes_at_once(self, e: Tensor) -> bool:
        """Return whether `complete` is called as soon as grad_output e is the last, or by `deliver` only."""
        return True

    def deliver(
        self, batch: Any, collected: dict[ParameterBlock, Collected], *, early: bool
    ) -> Iterator[tuple[RoutedModule, Gradients]]:
        """Yield the gradients of the modules' parameters.

        Args:
            batch: What the calls were collected under.
            collected: What there is of it in a backward; blocks that are done may be taken out.
            early: Whether the backward still goes on, and may fail.
        """
        raise NotImplementedError

    def answer(self, module: RoutedModule, batch: Any, use: Use, *, is_only_use: bool) -> Gradients:
        """Return the gradients of one use; is_only_use: whether the block has no other in this backward."""
        raise NotImplementedError

    def finish(self, block: ParameterBlock, collected: Collected) -> Any:
        """Return `complete`'s result for all uses of a block."""
        if not collected.is_complete:
            collected.result, collected.is_complete = self.complete(block, collected.uses), True
        return collected.result

    # Forward

    def collect(self, module: RoutedModule, batch: Any, x: Tensor, *arguments: Any) -> Any:
        """Return a module's output, from a node whose uses are collected under a batch."""
        call, block = OpenCall(self, module, batch), module.block
        self._open[block].add(call)
        if call.outer_task != -1:
            self._backward(call.outer_task)
        if not self.is_awaited(block):
            return module.rule.forward(module.module, x, None, call, *arguments)
        shield = self._shield(block, batch)
        call.barrier = shield.barrier
        with shield.in_place(module.owner):
            return module.rule.forward(module.module, x, None, call, *arguments)

    def reset(self) -> None:
        """Forget calls that no backward has reached, and what failed backwards have collected."""
        self.drop_failed()
        self._open.clear()
        self._answered.clear()
        self._shields.clear()

    def drop_failed(self) -> None:
        """Forget what failed backwards have collected."""
        self._backwards.clear()

    @property
    def called_blocks(self) -> list[ParameterBlock]:
        """The blocks with a collected call since the last reset."""
        return list(self._open)

    def is_awaited(self, block: ParameterBlock) -> bool:
        """Return whether a hook or a gradient reducer waits for the block's gradient inside backward."""
        return self.returns_gradients and (is_initialized() or block.has_gradient_hooks())

    def _shield(self, block: ParameterBlock, batch: Any) -> ShieldedParameters:
        """Return the shield that all calls of a block in this forward share."""
        shielded_batch, shield = self._shields.get(block, (None, None))
        if shield is None or shielded_batch is not batch or not shield.belong_to(block):
            shield = ShieldedParameters(Barrier(block, partial(self._pass_barrier, block, batch)))
            self._shields[block] = batch, shield
        return shield

    # Backward

    @torch.no_grad()
    def receive(self, call: OpenCall, use: Use, must_return: bool) -> Gradients | None:
        """File a use; return its gradients where they must be known now."""
        module, block, task = call.module, call.module.block, current_graph_task()
        self._open[block].discard(call)
        is_last_use = not self._open[block]
        if call.barrier is not None:
            call.barrier.keep(module, use)
            return None
        if self.returns_gradients and (must_return or self.is_awaited(block)):
            is_only_use = is_last_use and self._answered.get(block) != task
            self._answered[block] = task
            return self.answer(module, call.batch, use, is_only_use=is_only_use)
        if call.outer_task in self._backwards:
            task = call.outer_task
        collected = self._backward(task).collected[call.batch][block]
        collected.uses[module].append(use)
        collected.is_complete = False
        if is_last_use and self.completes_at_once(use.e):
            self.finish(block, collected)
        return None

    @torch.no_grad()
    def _pass_barrier(
        self, block: ParameterBlock, batch: Any, uses: Uses
    ) -> Mapping[RoutedModule, Gradients]:
        """Return the gradients of a block whose uses in this backward are done."""
        return dict(self.deliver(batch, {block: Collected(uses)}, early=True))

    def _backward(self, task: int) -> Backward:
        """Return what a graph task has collected, to be delivered at its end."""
        if task not in self._backwards:
            self._backwards[task] = Backward()
            at_end_of_backward(partial(self._end_of_backward, task))
        return self._backwards[task]

    @torch.no_grad()
    def _end_of_backward(self, task: int) -> None:
        """Deliver all that a backward has collected, and add the gradients to `.grad`."""
        for batch, collected in self._backwards.pop(task).collected.items():
            for module, gradients in self.deliver(batch, collected, early=False):
                for parameter, gradient in zip(module.parameters, gradients, strict=True):
                    if parameter is not None and parameter.requires_grad and gradient is not None:
                        _accumulate(parameter, gradient)


def combined(module: RoutedModule, uses: Sequence[Use], s: Tensor | None) -> Gradients:
    """Return the gradients of a module's parameters with coefficients s (N,); the plain ones without s."""
    if s is not None:
        return module.rule.combine(module.module, uses, s)
    # One by one: the uses may be of batches of several sizes.
    ones = [use.e.new_ones(use.e.shape[0]) for use in uses]
    return added([module.rule.combine(module.module, [u], s) for u, s in zip(uses, ones, strict=True)])


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Do what autograd does for a leaf: keep the parameter's dtype and memory layout, add in place."""
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
