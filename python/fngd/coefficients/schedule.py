"""Which samples a batch holds, and whether it is solved for or takes what earlier batches left."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import world_size
from .solver import Solved
from .table import Table

SHARES = ("sample", "position", "mean", "none")


class Batch:
    """The samples of one forward.

    Attributes:
        size: Their number N, None where each layer takes the rows of its own input as samples.
        ids: (N,) int64 on the CPU, their columns in the table, None where samples have no ids.
        columns: Ids on the table's device.
        coefficients: (blocks, N), None where they are to be solved for.
        rows: The rows of coefficients, one per block.
    """

    def __init__(
        self,
        size: int | None,
        ids: Tensor | None = None,
        columns: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> None:
        self.size, self.ids, self.columns, self.coefficients = size, ids, columns, coefficients
        self.rows = None if coefficients is None else coefficients.unbind(0)  # once, not in every layer


class Schedule:
    """Decides the phase of every batch: solved for, or served from the table that earlier batches filled."""

    def __init__(
        self,
        share: str,
        refresh_every: int | None,
        blocks: int,
        device: torch.device,
        process_group: "torch.distributed.ProcessGroup | None" = None,
    ) -> None:
        self.share, self.refresh_every, self.process_group = share, refresh_every, process_group
        self.table = Table(blocks, device)
        self.dataset_size: int | None = None  # known when a loader is tracked
        self.epoch = 0
        self.batch: Batch | None = None if share == "sample" else Batch(None)

    def start_epoch(self, dataset_size: int | None) -> None:
        """Count an epoch; every `refresh_every` epochs coefficients are solved anew.

        In data-parallel runs all ranks call it: they merge what the epoch that ends has left.
        """
        collected = self.solving
        self.epoch += 1
        self.dataset_size = dataset_size if dataset_size is not None else self.dataset_size
        if self._refreshes() and self.epoch > 1:
            self.table.forget()
        elif self.share == "sample" or collected:
            self.merge()
        self._renew_unnamed_batch()

    def merge(self) -> None:
        """Take in what the other ranks have solved for; all of them call it."""
        if world_size(self.process_group) == 1:
            return
        if self.share == "sample":
            self.table.merge_samples(self.process_group)
        elif self.share != "none":
            self.table.merge_means(self.process_group)
            self._renew_unnamed_batch()

    def set_samples(self, ids: Tensor, highest: int) -> None:
        """Name the samples of the next forward: ids (N,) int64 on the CPU, and the highest."""
        if self.share == "none":
            self.batch = Batch(ids.numel())
        if self.share != "sample":
            return
        if self.dataset_size is not None:
            self.table.grow(self.dataset_size)
        elif highest >= len(self.table):
            self.table.grow(max(highest + 1, 2 * len(self.table)))  # doubled: ids may arrive in order
        columns = self.table.columns(ids)
        coefficients = self.table.gather(columns) if self.table.knows(ids) else None
        self.batch = Batch(ids.numel(), ids, columns, coefficients)

    @property
    def solving(self) -> bool:
        """Whether the next forward is solved for."""
        return self.batch is None or self.batch.coefficients is None

    def coefficients(self, batch: Batch, block: int, samples: int) -> Tensor | None:
        """Return a block's coefficients (samples,) in this batch, None where they are to be solved for."""
        if batch.rows is None:
            return None
        s = batch.rows[block]
        if self.share == "mean":
            return s.expand(samples)
        if self.share == "position":
            if samples <= s.shape[0]:
                return s[:samples]
            # No batch was that long: the other positions take the mean of those that are known.
            return torch.cat([s, s.mean().expand(samples - s.shape[0])])
        return s

    def keep(self, batch: Batch, solved: Sequence[Solved]) -> None:
        """Keep what was solved for, unless a Gram matrix was not finite: then nothing was learned."""
        if self.share == "none" or not solved:
            return
        device = self.table.values.device
        # The diagonal bounds the other elements of a positive semidefinite matrix.
        finite = [group.k.diagonal(dim1=-2, dim2=-1).sum().isfinite().to(device) for group in solved]
        learned = finite[0] if len(finite) == 1 else torch.stack(finite).all()
        for group in solved:
            if self.share == "sample":
                assert batch.ids is not None
                assert batch.columns is not None
                self.table.record(batch.ids, batch.columns, group.rows, group.s, learned)
            else:
                s = group.s if self.share == "position" else group.s.mean(1, keepdim=True)
                self.table.average(group.rows, s, learned)

    def _refreshes(self) -> bool:
        """Return whether coefficients are solved for in this epoch, whatever was seen before."""
        return self.epoch <= 1 or (
            self.refresh_every is not None and (self.epoch - 1) % self.refresh_every == 0
        )

    def _renew_unnamed_batch(self) -> None:
        """Share by position or mean in the epochs that do not collect, once something was collected."""
        if self.share in ("position", "mean"):
            collects = self._refreshes() or not self.table.averaged.any()
            self.batch = Batch(None, coefficients=None if collects else self.table.means())

    def stats(self) -> dict[str, Any]:
        """Return the epoch, and how much the table holds; waits for the device."""
        return {
            "epoch": self.epoch,
            "seen_samples": self.table.count_seen(),
            "table_bytes": self.table.values.nbytes,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the table and the epoch, as tensors, strings and numbers."""
        self.table.settle()
        return {
            "share": self.share,
            "values": self.table.values,
            "averaged": self.table.averaged,
            "seen": self.table.seen >= Table.FRESH,
            "fresh": self.table.seen == Table.FRESH,
            "dataset_size": self.dataset_size,
            "epoch": self.epoch,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError for another way of sharing, or a table of other blocks or that is not finite."""
        if state["share"] != self.share:
            raise ValueError(f"state_dict: expected share={self.share!r}, got {state['share']!r}")
        layers, values, averaged = len(self.table.values), state["values"], state["averaged"]
        columns = {"seen": len(state["seen"]), "fresh": len(state["fresh"]), "values": values.shape[-1]}
        if len(values) != layers or len(averaged) != layers or averaged.shape[1] > values.shape[1]:
            shapes = f"{tuple(values.shape)} and {tuple(averaged.shape)}"
            raise ValueError(
                f"state_dict: expected tables 'values', 'averaged' of {layers} layers, got {shapes}"
            )
        if len(set(columns.values())) > 1:
            raise ValueError(f"state_dict: expected one number of samples, got {columns}")
        if not values.isfinite().all():
            raise ValueError("state_dict: expected finite 'values'")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of the same way of sharing."""
        table = self.table
        table.values = state["values"].to(table.values.device, copy=True)
        table.averaged = state["averaged"].to(table.values.device, copy=True)
        table.mark(state["seen"].to("cpu"), state["fresh"].to("cpu"))
        self.dataset_size, self.epoch = state["dataset_size"], state["epoch"]
        self._renew_unnamed_batch()
