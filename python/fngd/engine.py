"""What one training step does: choose the phase of a batch, capture its layers, solve, hand out weights."""

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
from .coefficients import Table, coefficients
from .rules import Use


class Batch:
    """The samples of the current forward: how many, which, and whether their coefficients are to be solved
    for."""

    def __init__(self, size: int | None, ids: Tensor | None, scales: Sequence[Tensor] | None) -> None:
        self.size, self.ids, self.scales = size, ids, scales

    @property
    def solving(self) -> bool:
        return self.scales is None


class Engine:
    """Routes layers: a solving batch is captured and solved at the end of its backward, others reuse
    coefficients.

    Without sample ids (share = "none", "position", "mean") every layer takes the rows of its own input as
    samples;
    with ids a layer whose input has another number of rows keeps the plain gradient.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        damping: float,
        damping_mode: str,
        normalize: str,
        share: str,
        refresh_every: int | None,
    ) -> None:
        self.layers = list(layers)
        self.damping, self.damping_mode, self.normalize = damping, damping_mode, normalize
        self.share, self.refresh_every = share, refresh_every
        self.table = Table(len(self.layers), self.layers[0].module.weight.device)
        self.dataset_size: int | None = None  # known when a loader is tracked
        self.epoch = 0
        self.solved_batches = 0
        self.solve_seconds = 0.0
        self.captured_bytes = (
            0  # the most that one solving step held: inputs, output gradients and Gram matrices
        )
        self.failed_solves = torch.zeros((), dtype=torch.int64)
        self._batch: Batch | None = None if share == "sample" else Batch(None, None, None)
        # Captured uses by autograd graph task, batch and layer; a backward that failed leaves its own behind.
        self._pending: dict[int, dict[Batch, dict[Layer, list[Use]]]] = {}

    # ---- phases ----------------------------------------------------------------------------------

    def start_epoch(self) -> None:
        """Count an epoch; on the first and then every `refresh_every` epochs coefficients are solved anew."""
        self.epoch += 1
        if self.refresh_every is not None and self.epoch > 1 and (self.epoch - 1) % self.refresh_every == 0:
            self.table.forget()
        if self.share in ("position", "mean"):
            self._batch = self._unnamed_batch()

    def set_samples(self, ids: Tensor) -> None:
        """Name the samples of the next forward: ids (N,) int64 on the CPU, checked by the caller."""
        self._forget_open_uses()
        if self.share != "sample":
            self._batch = Batch(ids.numel(), None, None) if self.share == "none" else self._batch
            return
        highest = int(ids.max()) if ids.numel() else -1
        if self.dataset_size is not None:
            self.table.grow(self.dataset_size)
        elif highest >= len(self.table):
            self.table.grow(max(highest + 1, 2 * len(self.table)))  # doubled: ids may arrive in order
        scales = self.table.gather(ids) if self.table.knows(ids) else None
        self._batch = Batch(ids.numel(), ids, scales)

    def _unnamed_batch(self) -> Batch:
        """Return the batch of a forward that shares by position or mean: solving in the epochs that
        collect."""
        period = self.refresh_every
        collecting = self.epoch <= 1 if period is None else (self.epoch - 1) % period == 0
        return Batch(None, None, None if collecting else self.table.values.unbind(0))

    def finish_step(self) -> None:
        """Drop what a failed or unused backward left behind."""
        self._pending.clear()
        self._forget_open_uses()

    def _forget_open_uses(self) -> None:
        for layer in self.layers:
            layer.open_uses = 0

    # ---- forward ---------------------------------------------------------------------------------

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        """Return the layer's output, computed by a node that weights or captures its parameter gradients."""
        if not layer.takes(x):
            return layer.plain(x)
        batch = self._batch
        if batch is None:
            raise RuntimeError(
                "share='sample' needs to know which samples a batch holds: iterate "
                "`fngd.track(loader, optimizer)`, or call optimizer.set_samples(ids) before the forward, "
                "or choose share='none', 'position' or 'mean'"
            )
        samples = x.shape[0]
        if batch.size is not None and samples != batch.size:
            layer.note = f"its input has {samples} rows, the batch has {batch.size} samples"
            return layer.plain(x)
        if batch.scales is None:
            return self._capture(layer, batch, x)
        scale = batch.scales[layer.index]
        if self.share == "position":
            if samples > scale.shape[0]:
                return self._capture(layer, Batch(None, None, None), x)
            scale = scale[:samples]
        elif self.share == "mean":
            scale = scale.expand(samples)
        return layer.rule.forward(layer.module, x, scale, None)

    @torch.compiler.disable
    def _capture(self, layer: Layer, batch: Batch, x: Tensor) -> Tensor:
        layer.open_uses += 1
        return layer.rule.forward(layer.module, x, None, partial(self._captured, layer, batch))

    # ---- backward --------------------------------------------------------------------------------

    @torch.no_grad()
    def _captured(
        self, layer: Layer, batch: Batch, a: Tensor, e: Tensor, selective: bool
    ) -> Gradients | None:
        """Receive one use of a layer inside backward; the sink of the layer's node."""
        use, task = (a, e), torch._C._current_graph_task_id()
        last_use = layer.open_uses <= 1 and layer.split_task != task
        layer.open_uses = max(0, layer.open_uses - 1)
        if selective or _awaited(layer):
            if last_use:
                return _weighted(layer, [use], self._solve(batch, {layer: [use]}))
            layer.note = "used several times, and its gradient must be returned before the last use is known"
            layer.split_task = task
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
                for parameter, gradient in zip(
                    layer.parameters, _weighted(layer, uses, weights), strict=True
                ):
                    if parameter is not None and parameter.requires_grad and gradient is not None:
                        _accumulate(parameter, gradient)

    def _solve(self, batch: Batch, captured: dict[Layer, list[Use]]) -> dict[Layer, Tensor]:
        """Return the weights of the samples for every layer that can be weighted, and keep them for later
        epochs."""
        started = time.perf_counter()
        groups: dict[Any, list[tuple[Layer, Tensor]]] = defaultdict(list)
        for layer, uses in captured.items():
            sizes = {e.shape[0] for _, e in uses}
            if len(sizes) > 1:
                layer.note = f"used on batches of several sizes ({sorted(sizes)}) in one backward"
                continue
            k = layer.rule.gram(layer.module, uses)
            groups[k.shape[0], k.device, k.dtype].append((layer, k))

        held = [x for uses in captured.values() for use in uses for x in use if x is not None]
        held += [k for members in groups.values() for _, k in members]
        self.captured_bytes = max(self.captured_bytes, sum(x.nbytes for x in held))
        weights: dict[Layer, Tensor] = {}
        for members in groups.values():
            k = torch.stack([k for _, k in members])
            s, solved = coefficients(k, self.damping, self.damping_mode, self.normalize)
            self.failed_solves += (~solved).sum().to(self.failed_solves.device)
            for layer, row in zip([layer for layer, _ in members], s.unbind(0), strict=True):
                layer.solves += 1
                layer.weights = weights[layer] = row
            self._keep(batch, [layer.index for layer, _ in members], k, s)
        self.solved_batches += 1
        self.solve_seconds += time.perf_counter() - started
        return weights

    def _keep(self, batch: Batch, layers: list[int], k: Tensor, s: Tensor) -> None:
        """Keep the weights s (len(layers), N) where they are shared; not those of a batch that was not
        finite."""
        if self.share == "none" or not bool(torch.isfinite(k).all()):
            return
        if self.share == "sample":
            assert batch.ids is not None
            self.table.record(batch.ids, layers, s)
        else:
            self.table.average(layers, s if self.share == "position" else s.mean(1, keepdim=True))

    # ---- state and reports -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the table and the counters, as tensors, strings and numbers."""
        return {
            "layers": [layer.name for layer in self.layers],
            "share": self.share,
            "values": self.table.values,
            "averaged": self.table.averaged,
            "seen": self.table.seen,
            "dataset_size": self.dataset_size,
            "epoch": self.epoch,
            "solved_batches": self.solved_batches,
            "failed_solves": self.failed_solves,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError when the state is of other layers or of another way of sharing."""
        names = [layer.name for layer in self.layers]
        if state["layers"] != names:
            differing = sorted(set(names) ^ set(state["layers"])) or names
            raise ValueError(
                f"state_dict: its layers are not this model's; they differ in {', '.join(differing)}"
            )
        if state["share"] != self.share:
            raise ValueError(f"state_dict: expected share={self.share!r}, got {state['share']!r}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checked state."""
        table = self.table
        table.values = state["values"].to(table.values.device, copy=True)
        table.averaged = state["averaged"].to(table.values.device, copy=True)
        table.seen = state["seen"].to("cpu", copy=True)
        self.dataset_size = state["dataset_size"]
        self.epoch = state["epoch"]
        self.solved_batches = state["solved_batches"]
        self.failed_solves = state["failed_solves"].to(self.failed_solves.device, copy=True)
        if self.share in ("position", "mean"):
            self._batch = self._unnamed_batch()

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
        spread = {}
        for layer in self.layers:
            if layer.weights is not None:
                low, high = layer.weights.aminmax()
                spread[layer.name] = {
                    "min": float(low),
                    "mean": float(layer.weights.mean()),
                    "max": float(high),
                }
        return {
            "epoch": self.epoch,
            "solved_batches": self.solved_batches,
            "failed_solves": int(self.failed_solves),
            "seen_samples": int(self.table.seen.sum()),
            "coefficients": spread,
            "solve_seconds": self.solve_seconds,
            "table_bytes": self.table.values.nbytes,
            "captured_bytes": self.captured_bytes,
        }


def _weighted(layer: Layer, uses: Sequence[Use], weights: dict[Layer, Tensor]) -> Gradients:
    """Return the layer's weighted gradients, or the plain ones for a layer without weights."""
    if layer in weights:
        return layer.rule.combine(layer.module, uses, weights[layer])
    plain = [layer.rule.combine(layer.module, [use], use[1].new_ones(use[1].shape[0])) for use in uses]
    weight, bias = ([g for g in column if g is not None] for column in zip(*plain, strict=True))
    return torch.stack(weight).sum(0), torch.stack(bias).sum(0) if bias else None


def _awaited(layer: Layer) -> bool:
    """Return whether somebody waits for this layer's gradient inside backward: hooks, or a gradient
    reducer."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return True
    return any(
        p is not None and (p._backward_hooks or p._post_accumulate_grad_hooks) for p in layer.parameters
    )


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Do what autograd does with a leaf's gradient: keep the parameter's dtype and memory layout, add in
    place."""
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
