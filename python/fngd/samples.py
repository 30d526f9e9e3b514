"""Sample ids for any DataLoader, from its own batch sampler: datasets and collate functions stay the same."""

from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .coefficients import Schedule
from .drawn import DrawnIds, check_ids_can_be_drawn, length, recording, viewed

MOST_SAMPLES = 2**31
"""Bound of ids: rejects hashes and timestamps passed by mistake before a table is allocated for them."""


class TakesSamples(Protocol):
    """An optimizer that a tracked loader tells about its batches."""

    _schedule: Schedule


def checked_ids(ids: Sequence[int] | Tensor, dataset_size: int | None) -> tuple[Tensor, int]:
    """Return ids as (N,) int64 on the CPU, and the highest, -1 for none.

    Raises:
        TypeError: Ids that are no integers of shape (N,).
        ValueError: Ids out of range.
    """
    if isinstance(ids, Tensor) and (ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim != 1):
        raise TypeError(f"ids: expected integers of shape (N,), got {ids.dtype}, {tuple(ids.shape)}")
    if isinstance(ids, (bytes, bytearray)):  # which an array would take for the memory of numbers
        raise TypeError(f"ids: expected integers of shape (N,), got {type(ids).__name__}")
    try:
        # Through an array: of a list, torch would look at every number in Python first.
        named = array("q", ids.tolist() if isinstance(ids, Tensor) else ids)
    except (TypeError, OverflowError) as error:
        raise TypeError(
            f"ids: expected integers of shape (N,), got {ids!r:.80}; "
            "a dataset with other keys needs its own map to 0, 1, 2, ..."
        ) from error
    if not named:  # which frombuffer refuses
        return torch.zeros(0, dtype=torch.int64, device="cpu"), -1
    low, high = min(named), max(named)
    if low < 0 or high >= (MOST_SAMPLES if dataset_size is None else dataset_size):
        bound = "2^31" if dataset_size is None else f"the dataset's length {dataset_size}"
        raise ValueError(f"ids: expected ids >= 0 and below {bound}, got {low} to {high}")
    return torch.frombuffer(named, dtype=torch.int64), high


Key = Hashable | Callable[[Any], Any]


def track(
    loader: DataLoader, optimizer: TakesSamples, *others: TakesSamples, key: Key | None = None
) -> DataLoader:
    """Return a copy of the loader that tells the optimizer the sample ids of every batch it yields.

    The ids are the dataset indices that the loader's own batch sampler draws: any map-style dataset, number
    of workers, shuffling, drop_last or a short last batch. The indices of a Subset are those of the dataset
    it is taken from, and every dataset has coefficients of its own. Only share = "sample" needs ids; for the
    other modes any loader will do.

    The rows of a batch are taken to stand in the order of their indices. Where collate_fn sorts, drops or
    repeats rows, or the dataset has ids of its own, `key` takes them from the batch.

    A pass is an epoch (see `FNGD.start_epoch`) if steps were made since the last one began. The name of a
    batch is for the next forward, or for the one whose input is found in the batch where the loop draws
    batches ahead; elsewhere the gradient stays plain, and a warning says so.

    Args:
        loader: The loader; it stays as it is. The copy is of a subclass of its class.
        optimizer: The FNGD that is told.
        others: More optimizers that are to hear the same, where a loop trains several models.
        key: Where a batch holds its samples' ids, integers (N,): batch[key], or key(batch) for a function.
            Any class of loader will do then.

    Raises:
        TypeError: Loader is not a DataLoader, or optimizer is not an FNGD.
        ValueError: Ids are needed and the loader has none: an IterableDataset, batch_size=None with single
            indices, in_order=False, a loader with a state_dict of its own, or one that accelerate prepared.
        RuntimeError: While iterating, a subclass of DataLoader yields other batches than its sampler draws.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"loader: expected a torch.utils.data.DataLoader, got {type(loader).__name__}")
    optimizers = (optimizer, *others)
    for each in optimizers:
        if not isinstance(getattr(each, "_schedule", None), Schedule):
            raise TypeError(f"optimizer: expected an fngd.FNGD, got {type(each).__name__}")
    schedules = [each._schedule for each in optimizers]
    if key is None and any(schedule.share == "sample" for schedule in schedules):
        check_ids_can_be_drawn(loader)
    kind = type(loader)
    # A class of its own, because frameworks make loaders anew from their class and attributes.
    members = {"_schedules": schedules, "_key": staticmethod(key) if callable(key) else key, "_kind": kind}
    members |= {"__module__": kind.__module__, "__doc__": kind.__doc__}
    tracked: DataLoader = object.__new__(type(kind.__name__, (_Tracked, kind), members))
    tracked.__dict__.update(loader.__dict__)
    if "_iterator" in vars(loader):  # its workers are not ours
        vars(tracked)["_iterator"] = None
    return tracked


class _Tracked:
    """What a tracked loader does otherwise than the one that it is a copy of."""

    _schedules: list[Schedule]
    _key: Key | None
    _kind: type[DataLoader]

    def __iter__(self) -> Iterator[Any]:
        return _Pass(self, super().__iter__)  # type: ignore[misc]


class _Pass:
    """The batches of one pass; like the loader's own iterator it can be asked on after an error."""

    def __init__(self, tracked: Any, iterate: Callable[[], Iterator[Any]]) -> None:
        self._tracked, self._iterate = tracked, iterate
        self._begun = self.finished = False
        self._yielded = 0

    @property
    def yielded_all(self) -> bool:
        """Whether it has yielded as many batches as the loader has."""
        batches = length(self._tracked)
        return batches is not None and self._yielded >= batches

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._begun:  # only when a batch is asked for: frameworks make iterators that they never use
            self._begin()
        try:
            batch = next(self._batches)
        except StopIteration:
            if isinstance(self._ids_of, DrawnIds):
                self._ids_of.check_end()
            self.finished = True
            for schedule in self._tracked._schedules:
                schedule.end_pass()
            raise
        self._yielded += 1
        if self._ids_of is not None:
            self._name(self._ids_of(batch), batch)
        return batch

    def _begin(self) -> None:
        key, schedules = self._tracked._key, self._tracked._schedules
        self._ids_of: Callable[[Any], Any] | None = None
        self._views: list[Any] = []
        dataset, self._size, size = None, None, None
        if key is not None:
            self._batches = self._iterate()
            self._ids_of = key if callable(key) else lambda batch: batch[key]
        elif any(schedule.share == "sample" for schedule in schedules):
            loader, recorder = recording(self._tracked)
            dataset, self._views = viewed(loader.dataset)
            self._size, size = length(loader.dataset), length(dataset)
            self._batches = iter(loader)
            self._ids_of = DrawnIds(loader, self._batches, recorder)
        else:
            self._batches = self._iterate()
        self._offsets = [schedule.begin_pass(self, dataset, size) for schedule in schedules]
        self._begun = True

    def _name(self, indices: Any, batch: Any) -> None:
        ids, highest = checked_ids(indices, self._size)
        for view in self._views:
            ids, highest = checked_ids([int(view[i]) for i in ids.tolist()], None)
        for schedule, offset in zip(self._tracked._schedules, self._offsets, strict=True):
            schedule.name(ids + offset if offset else ids, highest + offset, self, batch)
