"""What kept the plain gradient or was left out: counted by reason, and logged now and then."""

import logging
from collections import Counter

import torch
from torch import Tensor

log = logging.getLogger("fngd")
"""Warnings about batches whose gradient is plain, and about steps that are left out."""


class Journal:
    """Counts by reason what happened to a layer; logs the 1st, 10th, 100th, ... of each."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.counts: Counter[str] = Counter()

    def count(self, reason: str, times: int = 1, detail: str = "") -> None:
        """Count what happened; detail: what a line says instead of the reason."""
        before = self.counts[reason]
        self.counts[reason] = after = before + times
        if len(str(after)) > len(str(before)) or not before:
            so_far = f" ({after} times so far)" if after > 1 else ""
            log.warning("%s: %s%s", self.subject, detail or reason, so_far)


class DeviceCounts:
    """Counters on a device, of which the host reads what has arrived, without waiting."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        # Numbers that floating-point flags can be added to; exact to 2^53.
        self.values = torch.zeros(shape, dtype=torch.float64, device=device)
        cuda = device.type == "cuda"
        self.arrived = torch.zeros(shape, dtype=torch.float64, pin_memory=cuda) if cuda else self.values

    def send(self, *, wait: bool = False) -> None:
        """Let the counts go to the host; wait: until they are there."""
        if self.arrived is not self.values:
            self.arrived.copy_(self.values, non_blocking=not wait)

    def load(self, values: Tensor | float) -> None:
        """Go on from earlier counts."""
        for counts in (self.values, self.arrived):
            counts.copy_(torch.as_tensor(values))
