"""Which samples a batch holds, and whether it is solved for or takes what earlier batches left."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import world_size
from ..event_log import EventLog
from .batch import Batch
from .datasets import Datasets
from .names import Named, Names, Pass, goes_on
from .solver import Solved
from .table import Kept, Table

SHARES = ("sample", "position", "mean", "none")

SPENT = "its samples were not named since the last step"
DRAWN_AHEAD = "its samples are not known, batches are drawn ahead of their use"
MANY_SAMPLES = 2**24
"""From here on a table may well be due to ids with gaps, such as keys of a database."""
ADVICE = "call optimizer.set_samples(ids) before each forward"


class Schedule:
    """Decides the phase of every batch: solved for, or served from the table that earlier batches filled.

    What is solved for is kept at the step; what no step has taken by the time gradients are zeroed is
    dropped, as the gradients are. A name is good for one step.
    """

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
        self._datasets = Datasets()
        self._names = Names()
        self._solved: dict[Batch, list[Kept]] = {}  # since the last step
        self._pass: weakref.ref[Pass] | None = None  # whose batches the epoch consists of
        self._stepped = True  # whether a step was made since the epoch began: the next pass is a new one
        self._log = EventLog("batch")
        self._noted: Batch | None = None  # the last that was logged as plain

    # Epochs

    @torch.inference_mode(False)
    def start_epoch(self, dataset_size: int | None) -> None:
        """Count an epoch; every `refresh_every` epochs coefficients are solved anew.

        In data-parallel runs all ranks call it: they merge what the epoch that ends has left.
        """
        collected = self.solving
        self.epoch += 1
        self._stepped = False
        self.dataset_size = dataset_size if dataset_size is not None else self.dataset_size
        if self._refreshes() and self.epoch > 1:
            self.table.forget()
        elif self.share == "sample" or collected:
            self.merge()
        self._renew_unnamed_batch()

    def begin_pass(self, batches: Pass, dataset: Any, size: int | None) -> int:
        """Hear that a tracked loader begins anew.

        It is an epoch if steps were made since the last one began, no other pass goes on, and gradients are
        enabled.

        Args:
            batches: The pass.
            dataset: Where its ids are indices of a dataset, this one.
            size: The dataset's length, None if unknown.

        Returns:
            What is added to its ids.
        """
        self._names.forget_ended()
        if torch.is_grad_enabled() and not goes_on(self._pass):
            self._pass = weakref.ref(batches)
            if self._stepped:
                self.start_epoch(None)
        if size is None:
            return 0
        offset, taken_over = self._datasets.columns(dataset, size)
        self.dataset_size = size if len(self._datasets) == 1 else self._datasets.size
        if taken_over:
            with torch.inference_mode(False):
                self.table.forget_columns(slice(offset, offset + size))
        if offset or taken_over:
            self._log.count("another dataset is tracked, its samples have coefficients of their own")
        return offset

    def end_pass(self) -> None:
        """Hear that a tracked loader has no more batches; what nobody has used may be left for good."""
        self._names.doubt(used=self._is_used())
        if self._names.waiting:
            self.batch = _unknown()

    def merge(self) -> None:
        """Take in what the other ranks have solved for; all of them call it."""
        if world_size(self.process_group) == 1:
            return
        if self.share == "sample":
            self.table.merge_samples(self.process_group)
        elif self.share != "none":
            self.table.merge_means(self.process_group)
            self._renew_unnamed_batch()

    # Names

    def set_samples(self, ids: Tensor, highest: int) -> None:
        """Name the samples of the next forward: ids (N,) int64 on the CPU, and the highest."""
        self._names.clear()
        self._look_up(ids, highest)

    def name(self, ids: Tensor, highest: int, batches: Pass, content: Any) -> None:
        """Name the samples of a batch that a tracked loader yields, and whose use is to come."""
        named = Named(ids, highest, weakref.ref(batches), content)
        if self.share != "sample" or self._names.put(named, used=self._is_used()):
            self._look_up(ids, highest)
        else:
            self.batch = _unknown()

    def identify(self, x: Tensor) -> Batch:
        """Return the batch of a call with input x: the one that holds it, or that of the call before."""
        named = self._names.find(x)
        if named is not None:
            self._look_up(named.ids, named.highest)
        assert self.batch is not None
        self.batch.certain = not self._names.waiting and not self.batch.why_plain
        return self.batch

    def _is_used(self) -> bool:
        return self.batch is not None and self.batch.used

    def _look_up(self, ids: Tensor, highest: int) -> None:
        """Make the named samples the batch, with their coefficients if all of them have some."""
        if torch.is_inference_mode_enabled():  # the table and the batch outlive it
            with torch.inference_mode(False):
                return self._look_up(ids, highest)
        if self.share in ("position", "mean"):
            return
        if self.share == "sample":
            if self.dataset_size is not None:
                self.table.grow(self.dataset_size)
            if highest >= len(self.table):
                self.table.grow(max(highest + 1, 2 * len(self.table)))  # doubled: ids may arrive in order
                if len(self.table) > MANY_SAMPLES:
                    self._log.count(
                        "its ids make a large table; number samples from 0 on, without gaps",
                        detail=f"ids up to {highest} make a table of {self.table.values.nbytes:,} bytes; "
                        "number samples from 0 on, without gaps",
                    )
            if self.table.knows(ids):
                known = self.table.columns(ids)
                self.batch = Batch(ids.numel(), ids, known, self.table.gather(known))
                return
        size, sample_of = ids.numel(), None
        if len(set(ids.tolist())) < size:
            ids, places = ids.unique(return_inverse=True)
            sample_of = self.table.columns(places)
        columns = self.table.columns(ids) if self.share == "sample" else None
        self.batch = Batch(size, ids, columns, sample_of=sample_of)

    @property
    def solving(self) -> bool:
        """Whether the next forward is solved for."""
        batch = self.batch
        return batch is None or (batch.coefficients is None and not batch.why_plain) or not batch.certain

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

    # Steps

    def keep(self, batch: Batch, solved: Sequence[Solved]) -> None:
        """Have the step keep what was solved for, unless a Gram matrix was not finite."""
        if self.share == "none":
            return
        device = self.table.values.device
        for group in solved:
            # The diagonal bounds the other elements of a positive semidefinite matrix.
            finite = group.k.diagonal(dim1=-2, dim2=-1).sum().isfinite().to(device)
            s = group.s.mean(1, keepdim=True) if self.share == "mean" else group.s
            self._solved.setdefault(batch, []).append(Kept(group.rows, s, finite))

    def drop(self) -> None:
        """Let go of what was solved for since the last step, as the gradients are let go."""
        self._solved.clear()

    def end_step(self) -> None:
        """Keep what was solved for since the last step; from here on another batch is to be named."""
        self._stepped = True
        for batch, solved in self._solved.items():
            if batch.ids is not None and batch.columns is not None:
                self.table.record(batch.ids, batch.columns, solved)
            else:
                for group in solved:
                    self.table.average(group)
        self._solved.clear()
        if self.share != "sample" or self.batch is None:
            return
        self._names.clear(waiting=False)
        self.batch = _unknown() if self._names.waiting else Batch(None, why_plain=SPENT)

    def _is_within_pass(self) -> bool:
        current = None if self._pass is None else self._pass()
        return current is not None and not (current.finished or current.yielded_all)

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

    # Reports and state

    def note_plain(self, batch: Batch) -> None:
        """Count and log, once for a batch, that its gradient is plain."""
        if batch is not self._noted:
            self._noted = batch
            self._log.count(batch.why_plain, detail=f"plain gradient, {batch.why_plain}; {ADVICE}")

    def missed(self, block: int) -> int:
        """Return how many samples were solved for while a block took no part: their weight there is 1."""
        self.table.settle()
        return self.table.missed[block]

    def stats(self) -> dict[str, Any]:
        """Return the epoch, and how much the table holds; waits for the device."""
        return {
            "epoch": self.epoch,
            "seen_samples": self.table.count_seen(),
            "table_bytes": self.table.values.nbytes,
        }

    def added(self) -> dict[str, Any]:
        """Return what states of earlier versions do not hold."""
        return {"missed": [0] * len(self.table.values), "datasets": [], "epoch_ended": True}

    def state_dict(self) -> dict[str, Any]:
        """Return the table and the epoch, as tensors, strings and numbers."""
        self.table.settle()
        return {
            "share": self.share,
            "values": self.table.values,
            "averaged": self.table.averaged,
            "seen": self.table.seen >= Table.FRESH,
            "fresh": self.table.seen == Table.FRESH,
            "missed": list(self.table.missed),
            "dataset_size": self.dataset_size,
            "datasets": self._datasets.sizes(),
            "epoch": self.epoch,
            "epoch_ended": self._stepped and not self._is_within_pass(),  # or the next pass goes on with it
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
        if len(state["missed"]) != layers:
            raise ValueError(f"state_dict: expected 'missed' of {layers} layers, got {len(state['missed'])}")
        for key in ("missed", "datasets"):
            if not all(isinstance(count, int) and count >= 0 for count in state[key]):
                raise ValueError(f"state_dict: expected integers >= 0 in {key!r}, got {state[key]!r:.80}")
        if len(set(columns.values())) > 1:
            raise ValueError(f"state_dict: expected one number of samples, got {columns}")
        if not values.isfinite().all():
            raise ValueError("state_dict: expected finite 'values'")

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of the same way of sharing."""
        table = self.table
        table.values = state["values"].to(table.values.device, copy=True)
        table.averaged = state["averaged"].to(table.values.device, copy=True)
        table.mark(state["seen"].to("cpu"), state["fresh"].to("cpu"))
        table.missed = list(state["missed"])
        self.dataset_size, self.epoch = state["dataset_size"], state["epoch"]
        self._datasets.load(state["datasets"])
        self._stepped, self._pass = state["epoch_ended"], None
        self._renew_unnamed_batch()


def _unknown() -> Batch:
    """Return the batch of forwards that are told apart by their input."""
    return Batch(None, why_plain=DRAWN_AHEAD, certain=False)
