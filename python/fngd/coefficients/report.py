"""What came of the solves: counted, logged, timed, and told by `coverage()` and `stats()`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ..capture import EVAL_MODE, ParameterBlock
from ..event_log import DeviceCounts, log
from ..rules import Use
from .solver import Solved
from .stopwatch import Stopwatch


class Outcome(IntEnum):
    """What a solve may come to beside plain success."""

    FAILED = 0  # the plain gradient
    ZERO = 1  # the plain gradient
    RAISED = 2  # solved with more damping


REASONS = {
    Outcome.FAILED: "its Gram matrix is not finite or could not be factored",
    Outcome.ZERO: "its gradient is zero or underflows in its Gram matrix",
}
"""Why a block whose solve came to this takes the plain gradient."""


class Report:
    """Counters of an optimizer's solves; reading most of them waits for the device."""

    def __init__(self, blocks: Sequence[ParameterBlock], device: torch.device) -> None:
        self.blocks = list(blocks)
        self.solved_batches = 0
        self.plain_steps = 0  # steps with a gradient before the first solve
        self.solves = [0] * len(self.blocks)
        # The most that one solving step held: inputs, output gradients and Gram matrices.
        self.captured_bytes = 0
        self.last_coefficients: dict[ParameterBlock, Tensor] = {}
        self._last_batch: tuple[int, Any] | None = None
        self._stopwatch = Stopwatch(device)
        # By outcome and block, counted where the solves run: reading them is what synchronises.
        self._outcomes = DeviceCounts((len(Outcome), len(self.blocks)), device)

    def timing(self) -> AbstractContextManager[None]:
        """Count the time of what is done inside as spent on solves."""
        return self._stopwatch.running()

    def note_captured(self, uses: Iterable[Use], grams: Iterable[Tensor]) -> None:
        """Note what a solving step holds at a time."""
        held = [x for use in uses for x in (use.a, use.e) if x is not None]
        self.captured_bytes = max(self.captured_bytes, sum(x.nbytes for x in (*held, *grams)))

    def count(self, batch: Any, task: int, solved: Sequence[Solved], rows: Sequence[Tensor]) -> None:
        """Count what a batch was solved for in a backward.

        Args:
            batch: The batch.
            task: The backward's graph task; its blocks may be solved for one by one.
            solved: The blocks, with their coefficients.
            rows: The blocks' rows in the table, on the device.
        """
        for group, indices in zip(solved, rows, strict=True):
            zero = group.info == group.k.shape[-1] + 2
            outcomes = torch.stack([(group.info > 0) & ~zero, zero, group.info < 0])  # as in Outcome
            self._outcomes.values.index_add_(1, indices, outcomes.to(self._outcomes.values))
            for block, s in zip(group.blocks, group.s.unbind(0), strict=True):
                self.solves[block.index] += 1
                self.last_coefficients[block] = s
        self._outcomes.send()
        self._log_outcomes()
        if self._last_batch != (task, batch):
            self._last_batch = (task, batch)
            self.solved_batches += 1

    def note_plain_step(self) -> None:
        """Note a step before anything was solved for; say so once where that is because of eval mode."""
        self.plain_steps += 1
        if self.plain_steps == 1 and any(block.fallbacks.counts[EVAL_MODE] for block in self.blocks):
            log.warning(
                "model is in eval mode, where no layer is captured: all gradients are plain; "
                "call model.train() to have them weighted"
            )

    def _log_outcomes(self) -> None:
        """Count and log what the host knows by now of the solves that gave plain coefficients."""
        new = self._outcomes.take_new()
        for outcome, reason in REASONS.items():
            for index in new[outcome].nonzero().flatten().tolist():
                self.blocks[index].fallbacks.count(
                    reason, int(new[outcome, index]), f"plain gradient, {reason}"
                )

    def describe(self, block: ParameterBlock, parameter: Tensor, missed: int) -> str:
        """Return the rule that serves a block's parameter, or "plain: " and why none did so far.

        Args:
            missed: How many samples were solved for without the block.
        """
        if not parameter.requires_grad:
            return "plain: frozen"
        if self.solves[block.index] == 0:
            if block.why_plain or block.why_refused:
                return f"plain: {block.why_plain or block.why_refused}"
            if block.fallbacks.counts[EVAL_MODE] and (self._has_trained() or parameter.grad is not None):
                return f"plain: {EVAL_MODE}"
            if self._has_trained():
                return "plain: its module took no part in a solving step"
        why = block.why_plain or (f"it took no part when {missed} samples were solved for" if missed else "")
        return f"{block.kind}, at times plain: {why}" if why else block.kind

    def _has_trained(self) -> bool:
        return self.solved_batches > 0 or self.plain_steps > 0

    def stats(self) -> dict[str, Any]:
        """Return the counters, and the spread of each block's coefficients in its last solve."""
        failed, zero, raised = self._outcomes.values.sum(1).long().tolist()
        last = {
            block.name: self.last_coefficients[block]
            for block in self.blocks
            if block in self.last_coefficients
        }
        return {
            "solved_batches": self.solved_batches,
            "failed_solves": failed,
            "zero_grams": zero,
            "raised_dampings": raised,
            "fallbacks": self._fallbacks(),
            "coefficients": {
                name: {"min": float(s.min()), "mean": float(s.mean()), "max": float(s.max())}
                for name, s in last.items()
            },
            "solve_seconds": self._stopwatch.seconds(),
            "captured_bytes": self.captured_bytes,
        }

    def _fallbacks(self) -> dict[str, dict[str, int]]:
        """Return how often a block took the plain gradient, by reason; waits for the device."""
        self._outcomes.send(wait=True)
        self._log_outcomes()
        return {block.name: dict(block.fallbacks.counts) for block in self.blocks if block.fallbacks.counts}

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as tensors, strings and numbers."""
        return {
            "layers": [block.name for block in self.blocks],
            "solves": list(self.solves),
            "solved_batches": self.solved_batches,
            "fallbacks": self._fallbacks(),
            "outcomes": self._outcomes.values.clone(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError when the state is of other blocks."""
        names = [block.name for block in self.blocks]
        if state["layers"] != names:
            differing = ", ".join(sorted(set(names) ^ set(map(str, state["layers"]))) or names)
            raise ValueError(f"state_dict: its layers are not this model's; they differ in {differing}")
        if len(state["solves"]) != len(names) or state["outcomes"].shape != self._outcomes.values.shape:
            raise ValueError(f"state_dict: expected 'solves' and 'outcomes' of {len(names)} layers")
        if not all(isinstance(counts, Mapping) for counts in state["fallbacks"].values()):
            raise ValueError("state_dict: expected counts by reason in every value of 'fallbacks'")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checked state."""
        self.solved_batches, self.solves = state["solved_batches"], list(state["solves"])
        self._outcomes.load(state["outcomes"])
        for block in self.blocks:
            block.fallbacks.counts = Counter(state["fallbacks"].get(block.name, {}))
