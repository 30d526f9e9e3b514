"""The table that keeps the weight of every sample, and which samples it knows."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Table:
    """The weight that each sample keeps in each layer: (layers, size) fp32, 1 until it was solved for.

    For share = "position" the columns are batch positions and for "mean" there is one; these hold means over
    the solving batches. `seen` lies on the CPU, so that choosing the phase of a batch need not wait for the
    device. Whether a solved batch was finite is known on the device alone: its samples are PENDING until one
    of them comes again.
    """

    UNSEEN, PENDING, SEEN = 0, 1, 2
    MOST_PENDING = 1024

    def __init__(self, layers: int, device: torch.device) -> None:
        self.values = torch.ones(layers, 0, device=device)
        self.averaged = torch.zeros(layers, 0, device=device)  # how many batches each mean holds
        self.seen = torch.zeros(0, dtype=torch.uint8)
        self.complete = False  # whether every column was seen: spares the look-up in the steady state
        self._pending: list[tuple[Tensor, Tensor]] = []  # ids, and () bool: whether they were learned
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def __len__(self) -> int:
        return self.values.shape[1]

    def grow(self, size: int) -> None:
        """Make room for columns 0 to size - 1, unseen."""
        missing = size - len(self)
        if missing > 0:
            self.values = F.pad(self.values, (0, missing), value=1.0)
            self.averaged = F.pad(self.averaged, (0, missing))
            self.seen = F.pad(self.seen, (0, missing))
            self.complete = False

    def forget(self) -> None:
        """Mark every column unseen; its weights stay until the next solve replaces them."""
        self._pending.clear()
        self.seen.zero_()
        self.complete = False
        self.averaged.zero_()

    def knows(self, ids: Tensor) -> bool:
        """Return whether every sample of ids (N,), on the CPU, was solved for; waits if one is pending."""
        if self.complete or not ids.numel():
            return True
        least = int(self.seen[ids].min())
        if least == self.PENDING:
            self.settle()
            least = int(self.seen[ids].min())
        return least == self.SEEN

    def settle(self) -> None:
        """Decide which pending samples were seen: waits for the device, once for all of them."""
        if not self._pending:
            return
        ids, learned = zip(*self._pending, strict=True)
        self._pending = []
        for samples, seen in zip(ids, torch.stack(learned).tolist(), strict=True):
            self.seen[samples] = self.SEEN if seen else self.UNSEEN
        self.complete = bool((self.seen == self.SEEN).all())

    def mark(self, seen: Tensor) -> None:
        """Set which columns were seen: (size,) bool on the CPU."""
        self._pending.clear()
        self.seen = seen.to(torch.uint8) * self.SEEN
        self.complete = bool(seen.all())

    def count_seen(self) -> int:
        """Return how many columns were seen; waits for the pending ones."""
        self.settle()
        return int((self.seen == self.SEEN).sum())

    def columns(self, ids: Tensor) -> Tensor:
        """Return ids (N,), on the CPU, on the table's device; the host does not wait for the copy."""
        if not self.values.is_cuda:
            return ids
        return ids.pin_memory().to(self.values.device, non_blocking=True)

    def gather(self, columns: Tensor) -> Tensor:
        """Return the weights (layers, N) of the samples."""
        return self.values.index_select(1, columns)

    def record(self, ids: Tensor, columns: Tensor, layers: Sequence[int], s: Tensor, learned: Tensor) -> None:
        """Keep s (len(layers), N) as the weights of the samples ids (N,) in these layers, if learned."""
        rows = self._index(layers)[:, None]
        kept = self.values[rows, columns]
        self.values[rows, columns] = torch.where(learned, s.to(kept), kept)
        if self._pending and self._pending[-1][0] is ids:  # the same batch, solved for layer by layer
            learned = self._pending.pop()[1] & learned
        self.seen[ids] = self.PENDING
        self.complete = False
        self._pending.append((ids, learned))
        if len(self._pending) == self.MOST_PENDING:
            self.settle()

    def average(self, layers: Sequence[int], s: Tensor, learned: Tensor) -> None:
        """Take s (len(layers), N) into the means of columns 0 to N - 1 in these layers, if learned."""
        size = s.shape[1]
        self.grow(size)
        rows = self._index(layers)
        averaged = self.averaged[rows, :size] + learned
        means = self.values[rows, :size]
        self.averaged[rows, :size] = averaged
        self.values[rows, :size] = means + learned * (s.to(means) - means) / averaged.clamp(min=1)

    def _index(self, layers: Sequence[int]) -> Tensor:
        """Return the layers as an index on the device; made once, because the host waits for its copy."""
        key = tuple(layers)
        if key not in self._rows:
            self._rows[key] = torch.tensor(key, device=self.values.device)
        return self._rows[key]
