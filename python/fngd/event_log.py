"""What kept the plain gradient or was left out: counted by reason, and logged now and then."""

import logging
from collections import Counter

import torch
from torch import Tensor

log = logging.getLogger("fngd")
"""Warnings about batches whose gradient is plain, and about steps that are left out."""


READ_ON = "; see coverage(), stats() and docs/stats.md of fngd"


class EventLog:
    """Counts by reason what happened to a subject; logs the 1st, 10th, 100th, ... of each."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.counts: Counter[str] = Counter()

    def count(self, reason: str, times: int = 1, detail: str = "") -> None:
        """Count an event.

        Args:
            reason: What it is counted under.
            times: How often it happened.
            detail: What the log line says instead of the reason.
        """
        before = self.counts[reason]
        self.counts[reason] = after = before + times
        if len(str(after)) > len(str(before)) or not before:
            so_far = f" ({after} times so far)" if after > 1 else ""
            log.warning("%s: %s%s%s", self.subject, detail or reason, so_far, READ_ON)


class DeviceCounts:
    """Counters on a device; the host reads those that have arrived, without waiting."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        cuda = device.type == "cuda"
        with torch.inference_mode(False):  # or they could be written to under inference_mode only
            # Numbers that floating-point flags can be added to; exact to 2^53.
            self.values = torch.zeros(shape, dtype=torch.float64, device=device)
            on_host = torch.zeros(shape, dtype=torch.float64, device="cpu", pin_memory=cuda)
        self.arrived = on_host if cuda else self.values
        self._taken = self.arrived.clone()

    def send(self, *, wait: bool = False) -> None:
        """Copy the counts to the host; with `wait`, until they are there."""
        if self.arrived is not self.values:
            self.arrived.copy_(self.values, non_blocking=not wait)

    def take_new(self) -> Tensor:
        """Return by how much the counts that have arrived grew since the last call."""
        arrived = self.arrived.clone()
        new, self._taken = arrived - self._taken, arrived
        return new

    def load(self, values: Tensor | float) -> None:
        """Go on from earlier counts, none of which is new."""
        self.values.copy_(torch.as_tensor(values, dtype=torch.float64, device=self.values.device))
        self.send(wait=True)
        self._taken = self.arrived.clone()
