"""Which samples a batch holds, whether they are solved for, and the table that keeps their weights."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHARES = ("sample", "position", "mean", "none")


class Batch:
    """The samples of one forward.

    size: their number N, None where each layer takes the rows of its own input as samples
    ids: (N,) int64 on the CPU, their columns in the table, None where samples have no ids
    scales: their weights by layer, (N,) each, None when they are to be solved for
    """

    def __init__(self, size: int | None, ids: Tensor | None, scales: Sequence[Tensor] | None) -> None:
        self.size, self.ids, self.scales = size, ids, scales


class Table:
    """The weight that each sample keeps in each layer: (layers, size) fp32, 1 until it was solved for.

    For share = "position" the columns are batch positions and for "mean" there is one; these hold means over
    the solving batches. `seen` lies on the CPU: choosing the phase of a batch needs no synchronisation.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.values = torch.ones(layers, 0, device=device)
        self.averaged = torch.zeros(layers, 0, device=device)  # how many batches each mean holds
        self.seen = torch.zeros(0, dtype=torch.bool)
        self.complete = False  # whether every column was seen: spares the look-up in the steady state

    def __len__(self) -> int:
        return self.values.shape[1]

    def grow(self, size: int) -> None:
        """Make room for columns 0 to size - 1, unseen."""
        missing = size - len(self)
        if missing > 0:
            self.values = F.pad(self.values, (0, missing), value=1.0)
            self.averaged = F.pad(self.averaged, (0, missing))
            self.seen = F.pad(self.seen, (0, missing), value=False)
            self.complete = False

    def forget(self) -> None:
        """Mark every column unseen; its weights stay until the next solve replaces them."""
        self.seen.zero_()
        self.complete = False
        self.averaged.zero_()

    def knows(self, ids: Tensor) -> bool:
        """Return whether every sample of ids (N,), on the CPU, was solved for."""
        return self.complete or bool(self.seen[ids].all())

    def gather(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return the weights (N,) of the samples, one tensor per layer."""
        return self.values.index_select(1, ids.to(self.values.device, non_blocking=True)).unbind(0)

    def record(self, ids: Tensor, layers: Sequence[int], s: Tensor) -> None:
        """Keep s (len(layers), N) as the weights of the samples ids (N,) in these layers."""
        rows = torch.tensor(layers, device=self.values.device)
        self.values[rows[:, None], ids.to(self.values.device)] = s.to(self.values)
        self.seen[ids] = True
        self.complete = bool(self.seen.all())

    def average(self, layers: Sequence[int], s: Tensor) -> None:
        """Take s (len(layers), N) into the means of columns 0 to N - 1 in these layers."""
        columns = s.shape[1]
        self.grow(columns)
        rows = torch.tensor(layers, device=self.values.device)
        self.averaged[rows, :columns] += 1
        means = self.values[rows, :columns]
        self.values[rows, :columns] = means + (s.to(means) - means) / self.averaged[rows, :columns]


class Sharing:
    """Decides the phase of every batch: solved for, or weighted by what earlier batches left in the table."""

    def __init__(self, share: str, refresh_every: int | None, layers: int, device: torch.device) -> None:
        self.share, self.refresh_every = share, refresh_every
        self.table = Table(layers, device)
        self.dataset_size: int | None = None  # known when a loader is tracked
        self.epoch = 0
        self.batch: Batch | None = None if share == "sample" else Batch(None, None, None)

    def start_epoch(self, dataset_size: int | None) -> None:
        """Count an epoch; every `refresh_every` epochs coefficients are solved anew."""
        self.epoch += 1
        self.dataset_size = dataset_size if dataset_size is not None else self.dataset_size
        if self._refreshes() and self.epoch > 1:
            self.table.forget()
        self._renew_unnamed_batch()

    def set_samples(self, ids: Tensor, highest: int) -> None:
        """Name the samples of the next forward: ids (N,) int64 on the CPU, and the highest."""
        if self.share == "none":
            self.batch = Batch(ids.numel(), None, None)
        if self.share != "sample":
            return
        if self.dataset_size is not None:
            self.table.grow(self.dataset_size)
        elif highest >= len(self.table):
            self.table.grow(max(highest + 1, 2 * len(self.table)))  # doubled: ids may arrive in order
        self.batch = Batch(ids.numel(), ids, self.table.gather(ids) if self.table.knows(ids) else None)

    def weights(self, batch: Batch, layer: int, samples: int) -> Tensor | None:
        """Return a layer's weights (samples,) in this batch, or None when they are to be solved for."""
        if batch.scales is None:
            return None
        scale = batch.scales[layer]
        if self.share == "mean":
            return scale.expand(samples)
        if self.share == "position":
            return scale[:samples] if samples <= scale.shape[0] else None
        return scale

    def keep(self, batch: Batch, layers: Sequence[int], k: Tensor, s: Tensor) -> None:
        """Keep the weights s (len(layers), N) solved from k, unless k was not finite: nothing was learned."""
        if self.share == "none" or not bool(torch.isfinite(k).all()):
            return
        if self.share == "sample":
            assert batch.ids is not None
            self.table.record(batch.ids, layers, s)
        else:
            self.table.average(layers, s if self.share == "position" else s.mean(1, keepdim=True))

    def _refreshes(self) -> bool:
        """Return whether coefficients are solved for in this epoch, whatever was seen before."""
        return self.epoch <= 1 or (
            self.refresh_every is not None and (self.epoch - 1) % self.refresh_every == 0
        )

    def _renew_unnamed_batch(self) -> None:
        """Share by position or mean in the epochs that do not collect."""
        if self.share in ("position", "mean"):
            self.batch = Batch(None, None, None if self._refreshes() else self.table.values.unbind(0))

    def state_dict(self) -> dict[str, Any]:
        """Return the table and the epoch, as tensors, strings and numbers."""
        return {
            "share": self.share,
            "values": self.table.values,
            "averaged": self.table.averaged,
            "seen": self.table.seen,
            "dataset_size": self.dataset_size,
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of the same way of sharing."""
        table = self.table
        table.values = state["values"].to(table.values.device, copy=True)
        table.averaged = state["averaged"].to(table.values.device, copy=True)
        table.seen = state["seen"].to("cpu", copy=True)
        table.complete = bool(table.seen.all())
        self.dataset_size, self.epoch = state["dataset_size"], state["epoch"]
        self._renew_unnamed_batch()
