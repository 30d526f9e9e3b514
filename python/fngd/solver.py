"""From Gram matrices to the weights of the samples: one batched solve, and a record of what came of it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from fngd_kernels.ops.coefficients import coefficients

from .capture import Layer
from .journal import DeviceCounts
from .memory import within_memory
from .rules import Use
from .sharing import Batch, Sharing
from .stopwatch import Stopwatch

OUTCOMES = (
    "its Gram matrix is not finite or could not be factored",
    "its gradient is zero or underflows in its Gram matrix",
    "its damping was raised",
)
"""What the solve of a layer may come to; all but the last one, RAISED, leave it the plain gradient."""
RAISED = 2
OUT_OF_MEMORY = "out of memory for its Gram matrix"


class Solver:
    """Solves for the weights of a batch in several layers at once; counts, logs and times what it does.

    damping, damping_mode, normalize: as in `fngd_kernels.ops.coefficients`
    """

    def __init__(
        self, layers: Sequence[Layer], sharing: Sharing, damping: float, damping_mode: str, normalize: str
    ) -> None:
        self.layers, self.sharing = list(layers), sharing
        self.damping, self.damping_mode, self.normalize = damping, damping_mode, normalize
        self.solved_batches = 0
        self._last_solved: tuple[int, Batch] | None = None
        # The most that one solving step held: inputs, output gradients and Gram matrices.
        self.captured_bytes = 0
        device = sharing.table.values.device
        self._stopwatch = Stopwatch(device)
        # By outcome and layer, counted where the solves run: reading them is what synchronises.
        self._outcomes = DeviceCounts((len(OUTCOMES), len(self.layers)), device)
        self._journalled = torch.zeros_like(self._outcomes.arrived)

    def solve(
        self, batch: Batch, grams: Mapping[Layer, Tensor], task: int, early: bool = False
    ) -> dict[Layer, Tensor]:
        """Return the weights of the samples in every layer with a Gram matrix, and keep them for later.

        early: before the end of backward, which may still fail: its samples are known only when it did not
        """
        groups: dict[Any, list[tuple[Layer, Tensor]]] = defaultdict(list)
        for layer, gram in grams.items():
            groups[gram.shape[0], gram.device, gram.dtype].append((layer, gram))
        weights: dict[Layer, Tensor] = {}
        solutions = []
        with self._stopwatch.running():
            for members in groups.values():
                layers = [layer for layer, _ in members]
                solved = within_memory(partial(self._coefficients, layers, [k for _, k in members]))
                if solved is None:
                    for layer in layers:
                        layer.keep_plain(OUT_OF_MEMORY)
                    continue
                solutions.append(([layer.index for layer in layers], *solved))
                for layer, row in zip(layers, solved[1].unbind(0), strict=True):
                    layer.solves += 1
                    layer.weights = weights[layer] = row
            keep = partial(self.sharing.keep, batch, solutions)
            if early:
                Variable._execution_engine.queue_callback(keep)
            else:
                keep()
        self._outcomes.send()
        self._write_journals()
        if self._last_solved != (task, batch):  # its layers may come one by one
            self._last_solved = (task, batch)
            self.solved_batches += 1
        return weights

    def _coefficients(self, layers: Sequence[Layer], matrices: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the matrices as one batch k (len(layers), N, N) and their weights s (len(layers), N)."""
        k = torch.stack(matrices)
        s, info = coefficients(k, self.damping, self.damping_mode, self.normalize)
        zero = info == k.shape[-1] + 2
        outcomes = torch.stack([(info > 0) & ~zero, zero, info < 0])
        counts = self._outcomes.values
        counts.index_add_(1, self.sharing.table.index([layer.index for layer in layers]), outcomes.to(counts))
        return k, s

    def _write_journals(self) -> None:
        """Count and log what the host knows by now of the solves that gave plain weights."""
        known = self._outcomes.arrived.clone()
        new, self._journalled = known - self._journalled, known
        for outcome, index in new[:RAISED].nonzero().tolist():
            reason, layer = OUTCOMES[outcome], self.layers[index]
            layer.journal.count(reason, int(new[outcome, index]), f"plain gradient, {reason}")

    def note_bytes(self, uses: Iterable[Use], grams: Iterable[Tensor]) -> None:
        """Note what a solving step holds at a time."""
        held = [x for use in uses for x in (use.a, use.e) if x is not None]
        self.captured_bytes = max(self.captured_bytes, sum(x.nbytes for x in (*held, *grams)))

    # ---- state and reports ----

    def state_dict(self) -> dict[str, Any]:
        """Return the coefficients and the counters, as tensors, strings and numbers."""
        return self.sharing.state_dict() | {
            "layers": [layer.name for layer in self.layers],
            "solves": [layer.solves for layer in self.layers],
            "solved_batches": self.solved_batches,
            "fallbacks": self._fallbacks(),
            "outcomes": self._outcomes.values.clone(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError when the state is of other layers, another way of sharing or another size."""
        names = [layer.name for layer in self.layers]
        if state["layers"] != names:
            differing = ", ".join(sorted(set(names) ^ set(map(str, state["layers"]))) or names)
            raise ValueError(f"state_dict: its layers are not this model's; they differ in {differing}")
        if state["share"] != self.sharing.share:
            raise ValueError(f"state_dict: expected share={self.sharing.share!r}, got {state['share']!r}")
        if len(state["solves"]) != len(names) or state["outcomes"].shape != self._outcomes.values.shape:
            raise ValueError(f"state_dict: expected 'solves' and 'outcomes' of {len(names)} layers")
        if not all(isinstance(counts, Mapping) for counts in state["fallbacks"].values()):
            raise ValueError("state_dict: expected counts by reason in every value of 'fallbacks'")
        self.sharing.check_state(state, len(names))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checked state."""
        self.sharing.load_state_dict(state)
        self.solved_batches = state["solved_batches"]
        self._outcomes.load(state["outcomes"])
        self._journalled = self._outcomes.arrived.clone()
        for layer, solves in zip(self.layers, state["solves"], strict=True):
            layer.solves = solves
            layer.journal.counts = Counter(state["fallbacks"].get(layer.name, {}))

    def _fallbacks(self) -> dict[str, dict[str, int]]:
        """Return how often a layer took the plain gradient, by reason; waits for the device."""
        self._outcomes.send(wait=True)
        self._write_journals()
        return {layer.name: dict(layer.journal.counts) for layer in self.layers if layer.journal.counts}

    def describe(self, layer: Layer, parameter: Tensor) -> str:
        """Return the rule that weights a layer's parameter, or "plain: " and why none did so far."""
        if not parameter.requires_grad:
            return "plain: frozen"
        if layer.solves == 0 and layer.note:
            return f"plain: {layer.note}"
        if layer.solves == 0 and self.solved_batches > 0:
            return "plain: its module took no part in a solving step"
        return f"{layer.kind}, at times plain: {layer.note}" if layer.note else layer.kind

    def stats(self) -> dict[str, Any]:
        """Return the counters, and the spread of each layer's coefficients in its last solve."""
        last = {layer.name: layer.weights for layer in self.layers if layer.weights is not None}
        failed, zero, raised = self._outcomes.values.sum(1).long().tolist()
        return {
            "epoch": self.sharing.epoch,
            "solved_batches": self.solved_batches,
            "failed_solves": failed,
            "zero_grams": zero,
            "raised_dampings": raised,
            "fallbacks": self._fallbacks(),
            "seen_samples": self.sharing.table.count_seen(),
            "coefficients": {
                name: {"min": float(s.min()), "mean": float(s.mean()), "max": float(s.max())}
                for name, s in last.items()
            },
            "solve_seconds": self._stopwatch.seconds(),
            "table_bytes": self.sharing.table.values.nbytes,
            "captured_bytes": self.captured_bytes,
        }
