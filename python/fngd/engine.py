"""What one training step does: layers are captured, solved for at the end of backward, and weighted."""

import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from fngd_kernels.ops.nodes import Gradients

from .capture import Layer
from .coefficients import coefficients
from .rules import Use, added
from .sharing import Batch, Sharing


class Engine:
    """The router of an optimizer's layers: a solving batch is captured, any other is weighted as it runs.

    A layer whose input does not have one row per sample of the batch keeps the plain gradient. Without sample
    ids every layer takes the rows of its own input as samples.
    """

    def __init__(
        self, layers: Sequence[Layer], sharing: Sharing, damping: float, damping_mode: str, normalize: str
    ) -> None:
        self.layers, self.sharing = list(layers), sharing
        self.damping, self.damping_mode, self.normalize = damping, damping_mode, normalize
        self.solved_batches = 0
        self.solve_seconds = 0.0
        # The most that one solving step held: inputs, output gradients and Gram matrices.
        self.captured_bytes = 0
        # Counted where the solves run: reading it is what synchronises.
        self.failed_solves = torch.zeros((), dtype=torch.int64, device=sharing.table.values.device)
        # Captured uses by autograd graph task, batch and layer; a backward that failed leaves its own behind.
        self._pending: dict[int, dict[Batch, dict[Layer, list[Use]]]] = {}

    def finish_step(self) -> None:
        """Drop what a failed or unused backward left behind."""
        self._pending.clear()
        for layer in self.layers:
            layer.open_uses = 0

    # ---- forward ----

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        """Return the layer's output, from a node that weights or captures its parameter gradients."""
        if not layer.takes(x):
            return layer.plain(x)
        batch, samples = self.sharing.batch, x.shape[0]
        if batch is None:
            raise RuntimeError(
                "share='sample' needs to know which samples a batch holds: iterate "
                "`fngd.track(loader, optimizer)`, or call optimizer.set_samples(ids) before the forward, "
                "or choose share='none', 'position' or 'mean'"
            )
        if batch.size not in (None, samples):
            layer.note = f"its input has {samples} rows, the batch has {batch.size} samples"
            return layer.plain(x)
        scale = self.sharing.weights(batch, layer.index, samples)
        if scale is None:
            return self._capture(layer, batch, x)
        return layer.rule.forward(layer.module, x, scale, None)

    @torch.compiler.disable
    def _capture(self, layer: Layer, batch: Batch, x: Tensor) -> Tensor:
        layer.open_uses += 1
        return layer.rule.forward(layer.module, x, None, partial(self._captured, layer, batch))

    # ---- backward ----

    @torch.no_grad()
    def _captured(
        self, layer: Layer, batch: Batch, a: Tensor, e: Tensor, biased: bool, selective: bool
    ) -> Gradients | None:
        """Receive one use of a layer inside backward; the sink of the layer's node."""
        use, task = Use(a, e, biased), torch._C._current_graph_task_id()
        only_use = layer.open_uses <= 1 and layer.answered_task != task
        layer.open_uses = max(0, layer.open_uses - 1)
        if selective or _awaited(layer):
            layer.answered_task = task
            if only_use:
                return _weighted(layer, [use], self._solve(batch, {layer: [use]}))
            layer.note = "used several times, and its gradient must be returned before the last use is known"
            return _weighted(layer, [use], {})
        if task not in self._pending:
            self._pending[task] = defaultdict(lambda: defaultdict(list))
            Variable._execution_engine.queue_callback(partial(self._finish_backward, task))
        self._pending[task][batch][layer].append(use)
        return None

    @torch.no_grad()
    def _finish_backward(self, task: int) -> None:
        """Solve for all layers of a backward at once and add their weighted gradients to .grad."""
        for batch, captured in self._pending.pop(task).items():
            weights = self._solve(batch, captured)
            for layer, uses in captured.items():
                gradients = _weighted(layer, uses, weights)
                for parameter, gradient in zip(layer.parameters, gradients, strict=True):
                    if parameter is not None and parameter.requires_grad and gradient is not None:
                        _accumulate(parameter, gradient)

    def _solve(self, batch: Batch, captured: dict[Layer, list[Use]]) -> dict[Layer, Tensor]:
        """Return the weights of the samples in every layer that can be weighted, and keep them for later."""
        started = time.perf_counter()
        groups: dict[Any, list[tuple[Layer, Tensor]]] = defaultdict(list)
        for layer, uses in captured.items():
            sizes = {use.e.shape[0] for use in uses}
            if len(sizes) > 1:
                layer.note = f"used on batches of several sizes ({sorted(sizes)}) in one backward"
                continue
            k = layer.rule.gram(layer.module, uses)
            groups[k.shape[0], k.device, k.dtype].append((layer, k))

        held = [x for uses in captured.values() for use in uses for x in (use.a, use.e) if x is not None]
        held += [k for members in groups.values() for _, k in members]
        self.captured_bytes = max(self.captured_bytes, sum(x.nbytes for x in held))
        weights: dict[Layer, Tensor] = {}
        for members in groups.values():
            layers, grams = zip(*members, strict=True)
            k = torch.stack(grams)
            s, solved = coefficients(k, self.damping, self.damping_mode, self.normalize)
            self.failed_solves += (~solved).sum().to(self.failed_solves.device)
            self.sharing.keep(batch, [layer.index for layer in layers], k, s)
            for layer, row in zip(layers, s.unbind(0), strict=True):
                layer.solves += 1
                layer.weights = weights[layer] = row
        self.solved_batches += 1
        self.solve_seconds += time.perf_counter() - started
        return weights

    # ---- state and reports ----

    def state_dict(self) -> dict[str, Any]:
        """Return the coefficients and the counters, as tensors, strings and numbers."""
        return self.sharing.state_dict() | {
            "layers": [layer.name for layer in self.layers],
            "solved_batches": self.solved_batches,
            "failed_solves": self.failed_solves,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError when the state is of other layers or of another way of sharing."""
        names = [layer.name for layer in self.layers]
        if state["layers"] != names:
            differing = ", ".join(sorted(set(names) ^ set(state["layers"])) or names)
            raise ValueError(f"state_dict: its layers are not this model's; they differ in {differing}")
        if state["share"] != self.sharing.share:
            raise ValueError(f"state_dict: expected share={self.sharing.share!r}, got {state['share']!r}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checked state."""
        self.sharing.load_state_dict(state)
        self.solved_batches = state["solved_batches"]
        self.failed_solves = state["failed_solves"].to(self.failed_solves.device, copy=True)

    def describe(self, layer: Layer, parameter: Tensor) -> str:
        """Return the rule that weights a layer's parameter, or "plain: " and why none did so far."""
        if not parameter.requires_grad:
            return "plain: frozen"
        if layer.solves == 0 and layer.note:
            return f"plain: {layer.note}"
        if layer.solves == 0 and self.solved_batches > 0:
            return "plain: its module took no part in a solving step"
        return f"{layer.rule.name}, at times plain: {layer.note}" if layer.note else layer.rule.name

    def stats(self) -> dict[str, Any]:
        """Return the counters, and the spread of each layer's coefficients in its last solve."""
        last = {layer.name: layer.weights for layer in self.layers if layer.weights is not None}
        return {
            "epoch": self.sharing.epoch,
            "solved_batches": self.solved_batches,
            "failed_solves": int(self.failed_solves),
            "seen_samples": int(self.sharing.table.seen.sum()),
            "coefficients": {
                name: {"min": float(s.min()), "mean": float(s.mean()), "max": float(s.max())}
                for name, s in last.items()
            },
            "solve_seconds": self.solve_seconds,
            "table_bytes": self.sharing.table.values.nbytes,
            "captured_bytes": self.captured_bytes,
        }


def _weighted(layer: Layer, uses: Sequence[Use], weights: dict[Layer, Tensor]) -> Gradients:
    """Return the layer's weighted gradients, or the plain ones for a layer without weights."""
    if layer in weights:
        return layer.rule.combine(layer.module, uses, weights[layer])
    return added([layer.rule.combine(layer.module, [use], use.e.new_ones(use.e.shape[0])) for use in uses])


def _awaited(layer: Layer) -> bool:
    """Return whether a hook or a gradient reducer waits for this layer's gradient inside backward."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return True
    parameters = [p for p in layer.parameters if p is not None]
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Do what autograd does for a leaf: keep the parameter's dtype and memory layout, add in place."""
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
