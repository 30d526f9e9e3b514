"""The table that keeps the coefficients of every sample, and which samples it knows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import all_reduce_max, all_reduce_mean, world_size


class Kept(NamedTuple):
    """What is kept of a batch that was solved for, in some blocks."""

    blocks: list[int]
    """Their rows in the table."""
    s: Tensor
    """(len(blocks), n), a coefficient for each sample."""
    finite: Tensor
    """() bool on the device: whether their Gram matrices were."""


class _Pending(NamedTuple):
    """A batch that was solved for."""

    ids: Tensor  # (N,) on the CPU
    new: Tensor  # (N,) on the CPU, which of them had no coefficients before
    learned: Tensor  # () on the device, whether its Gram matrices were finite
    absent: list[int]  # rows of the blocks that took no part


class Table:
    """The coefficient of each sample in each block, kept from its first solve: (blocks, size) fp32, 1 before.

    For share = "position" the columns are batch positions and for "mean" there is one; these hold means over
    the solving batches. `seen` lies on the CPU, so that choosing the phase of a batch need not wait for the
    device. Whether a solved batch was finite is known on the device alone: its new samples are PENDING until
    one of them comes again. Those that only this rank knows are FRESH; merging makes them SEEN on all ranks.
    """

    UNSEEN, PENDING, FRESH, SEEN = 0, 1, 2, 3
    MOST_PENDING = 1024

    def __init__(self, blocks: int, device: torch.device) -> None:
        self.values = torch.ones(blocks, 0, dtype=torch.float32, device=device)
        # How many batches each mean holds.
        self.averaged = torch.zeros(blocks, 0, dtype=torch.float32, device=device)
        self.seen = torch.zeros(0, dtype=torch.uint8, device="cpu")
        self.complete = False  # whether every column was seen: spares the look-up in the steady state
        self.missed = [0] * blocks  # by block, the samples solved for while it took no part: 1 there
        self._pending: list[_Pending] = []
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def __len__(self) -> int:
        return self.values.shape[1]

    def grow(self, size: int) -> None:
        """Make room for columns 0 to size - 1, unseen."""
        missing = size - len(self)
        if missing > 0:
            self.values = F.pad(self.values, (0, missing), value=1.0)
            self.seen = F.pad(self.seen, (0, missing))
            self.complete = False

    def forget(self) -> None:
        """Mark every column unseen; its coefficients stay until the next solve replaces them."""
        self._pending.clear()
        self.seen.zero_()
        self.complete = False
        self.averaged.zero_()
        self.missed = [0] * len(self.missed)

    def forget_columns(self, columns: slice) -> None:
        """Mark some columns as those of samples that nobody has seen."""
        self.settle()
        self.seen[columns] = self.UNSEEN
        self.values[:, columns] = 1.0
        self.complete = False

    def knows(self, ids: Tensor) -> bool:
        """Return whether every sample of ids (N,), on the CPU, was solved for; waits if one is pending."""
        if self.complete or not ids.numel():
            return True
        least = int(self.seen[ids].min())
        if least == self.PENDING:
            self.settle()
            least = int(self.seen[ids].min())
        return least >= self.FRESH

    def settle(self) -> None:
        """Decide which pending samples were seen: waits for the device, once for all of them."""
        if not self._pending:
            return
        learned = torch.stack([solved.learned for solved in self._pending]).tolist()
        for (ids, new, _, absent), seen in zip(self._pending, learned, strict=True):
            self.seen[ids[new]] = self.FRESH if seen else self.UNSEEN
            for row in absent if seen else ():
                self.missed[row] += int(new.sum())
        self._pending = []
        self.complete = bool((self.seen >= self.FRESH).all())

    def mark(self, seen: Tensor, fresh: Tensor) -> None:
        """Set which columns were seen, and which of them on this rank alone: (size,) bool on the CPU."""
        self._pending.clear()
        self.seen = seen.to(torch.uint8) * self.SEEN
        self.seen[fresh] = self.FRESH
        self.complete = bool(seen.all())

    def count_seen(self) -> int:
        """Return how many columns were seen; waits for the pending ones."""
        self.settle()
        return int((self.seen >= self.FRESH).sum())

    def columns(self, ids: Tensor) -> Tensor:
        """Return ids (N,), on the CPU, on the table's device; the host does not wait for the copy."""
        if not self.values.is_cuda:
            return ids
        return ids.pin_memory().to(self.values.device, non_blocking=True)

    def gather(self, columns: Tensor) -> Tensor:
        """Return the coefficients (blocks, N) of the samples."""
        return self.values.index_select(1, columns)

    def record(self, ids: Tensor, columns: Tensor, solved: Sequence[Kept]) -> None:
        """Keep the coefficients of those samples that have none yet, if all Gram matrices were finite.

        Args:
            ids: (n,) the samples, each once, on the CPU.
            columns: The same on the table's device.
            solved: Their coefficients; the last of a block that is there several times count.
        """
        finite = [group.finite for group in solved]
        learned = finite[0] if len(finite) == 1 else torch.stack(finite).all()
        new = self.seen[ids] == self.UNSEEN
        replaced = learned if bool(new.all()) else learned & self.columns(new)
        for group in solved:
            rows = self.index(group.blocks)[:, None]
            kept = self.values[rows, columns]
            self.values[rows, columns] = torch.where(replaced, group.s.to(kept), kept)
        self.seen[ids[new]] = self.PENDING
        absent = {*range(len(self.values))}.difference(*(group.blocks for group in solved))
        self._pending.append(_Pending(ids, new, learned, sorted(absent)))
        if len(self._pending) == self.MOST_PENDING:
            self.settle()

    def average(self, solved: Kept) -> None:
        """Take coefficients into the means of columns 0 to n - 1, if the Gram matrices were finite."""
        blocks, s, learned = solved
        size = s.shape[1]
        self.grow(size)
        self.averaged = F.pad(self.averaged, (0, len(self) - self.averaged.shape[1]))
        rows = self.index(blocks)
        averaged = self.averaged[rows, :size] + learned
        means = self.values[rows, :size]
        self.averaged[rows, :size] = averaged
        self.values[rows, :size] = means + learned * (s.to(means) - means) / averaged.clamp(min=1)

    def means(self) -> Tensor:
        """Return the means (blocks, size); columns without a batch take the mean of the others, or 1."""
        known = self.averaged > 0
        count = known.sum(1, keepdim=True)
        rest = torch.where(known, self.values, 0).sum(1, keepdim=True) / count.clamp(min=1)
        return torch.where(known, self.values, torch.where(count > 0, rest, 1.0))

    def merge_samples(self, group: "torch.distributed.ProcessGroup | None") -> None:
        """Take in the samples that the ranks of a group know since they merged last; all of them call it.

        A sample that several ranks have solved for keeps the mean of its coefficients.
        """
        self.settle()
        fresh, device = self.seen == self.FRESH, self.values.device
        size, any_fresh = all_reduce_max((len(self), int(fresh.any())), group, device)
        self.grow(size)
        if not any_fresh:
            return
        solved = F.pad(fresh, (0, size - len(fresh))).to(self.values)
        for row in self.values:  # one at a time: without a second table
            mean, times = all_reduce_mean(row, solved, group)
            row.copy_(mean)
        self.seen[(times > 0).cpu()] = self.SEEN
        self.complete = bool((self.seen >= self.FRESH).all())

    def merge_means(self, group: "torch.distributed.ProcessGroup | None") -> None:
        """Make the means those over all ranks of a group; all of them call it."""
        size, _ = all_reduce_max((len(self), 0), group, self.values.device)
        self.grow(size)
        averaged = F.pad(self.averaged, (0, size - self.averaged.shape[1]))
        self.values, batches = all_reduce_mean(self.values, averaged, group)
        # Each rank keeps its part of the count, so that merging again changes nothing.
        self.averaged = batches / world_size(group)

    def index(self, blocks: Sequence[int]) -> Tensor:
        """Return the blocks as an index on the device; made once, because the host waits for its copy."""
        key = tuple(blocks)
        if key not in self._rows:
            self._rows[key] = torch.tensor(key, dtype=torch.int64, device=self.values.device)
        return self._rows[key]
