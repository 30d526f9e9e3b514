"""Sample ids for any DataLoader, from its own batch sampler: datasets and collate functions stay the same."""

from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate, default_convert

from .coefficients import Schedule
from .event_log import log
from .torch_private import batches_received, is_torchs_iterator

if TYPE_CHECKING:
    from .optimizer import FNGD

Drawn = deque[tuple[int, Sequence[int]]]
"""Number and indices of the batches that were drawn in a pass, from the last one that was yielded on."""

_KEEP_ROWS: list[Any] = [default_collate, default_convert]

MOST_SAMPLES = 2**31
"""Bound of ids: rejects hashes and timestamps passed by mistake before a table is allocated for them."""


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
        return torch.zeros(0, dtype=torch.int64), -1
    low, high = min(named), max(named)
    if low < 0 or high >= (MOST_SAMPLES if dataset_size is None else dataset_size):
        bound = "2^31" if dataset_size is None else f"the dataset's length {dataset_size}"
        raise ValueError(f"ids: expected ids >= 0 and below {bound}, got {low} to {high}")
    return torch.frombuffer(named, dtype=torch.int64), high


Key = Hashable | Callable[[Any], Any]


def track(loader: DataLoader, optimizer: "FNGD", *others: "FNGD", key: Key | None = None) -> DataLoader:
    """Return a copy of the loader that tells the optimizer the sample ids of every batch it yields.

    The ids are the dataset indices that the loader's own batch sampler draws: any map-style dataset, number
    of workers, shuffling, drop_last or a short last batch. The rows of a batch must stand in that order;
    where collate_fn sorts, drops or repeats rows, or the dataset has ids of its own, `key` takes them from
    the batch. The indices of a Subset are those of the dataset it is taken from, and every dataset has
    coefficients of its own. Only share = "sample" needs ids; for the other modes any loader will do.

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
        _check_ids_can_be_drawn(loader)
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
        try:
            return self._yielded >= len(self._tracked)
        except TypeError:
            return False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._begun:  # only when a batch is asked for: frameworks make iterators that they never use
            self._begin()
        try:
            batch = next(self._batches)
        except StopIteration:
            if isinstance(self._ids_of, _DrawnIds):
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
            loader, recorder = _recording(self._tracked)
            dataset, self._views = _viewed(loader.dataset)
            self._size, size = _length(loader.dataset), _length(dataset)
            self._batches = iter(loader)
            self._ids_of = _DrawnIds(loader, self._batches, recorder)
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


class _DrawnIds:
    """The dataset indices of each batch of a pass, as its sampler has drawn them."""

    def __init__(self, loader: DataLoader, batches: Iterator[Any], recorder: "_RecordingSampler") -> None:
        self._loader, self._batches, self._drawn = loader, batches, recorder.drawn
        self._is_torchs = is_torchs_iterator(batches)
        self._next = 0

    def __call__(self, batch: Any) -> Sequence[int]:
        """Return the indices of the batch that was yielded last."""
        number = self._next
        if self._is_torchs:
            received = batches_received(self._batches)
            # Without workers nothing is drawn ahead.
            number = self._drawn[-1][0] if received is None else received - 1
        while self._drawn and self._drawn[0][0] < number:
            self._drawn.popleft()
        if not self._drawn:
            raise self._not_its_batches()
        self._next = number + 1
        return self._drawn[0][1]

    def check_end(self) -> None:
        """Raise RuntimeError if batches were drawn that were not yielded."""
        if not self._is_torchs and self._drawn and self._drawn[-1][0] >= self._next:
            raise self._not_its_batches() from None

    def _not_its_batches(self) -> RuntimeError:
        return RuntimeError(
            f"loader: this {type(self._loader).__name__} does not yield the batches that its sampler draws; "
            "take the ids from the batch, fngd.track(..., key=...), or call optimizer.set_samples(ids) "
            "before each forward"
        )


class _RecordingSampler:
    """A batch sampler that notes the indices of each batch, in the order in which the loader yields them."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.drawn: Drawn = deque()

    def __iter__(self) -> Iterator[Any]:
        # A new queue for every pass: workers draw ahead of the loop, which may leave it early.
        self.drawn = deque()
        return self._draw(self.drawn)

    def _draw(self, drawn: Drawn) -> Iterator[Any]:
        for number, indices in enumerate(self.sampler):
            listed = indices.tolist() if hasattr(indices, "tolist") else indices
            if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes)):
                raise ValueError(
                    "loader: its sampler draws single indices (batch_size=None), which do not name the "
                    "samples of a batch; give the loader a batch_size, or call optimizer.set_samples(ids)"
                )
            drawn.append((number, listed))
            yield indices

    def __len__(self) -> int:
        return len(self.sampler)


def _check_ids_can_be_drawn(loader: DataLoader) -> None:
    """Raise ValueError for a loader whose batches cannot be matched with what its sampler draws."""
    reason = ""
    if isinstance(loader.dataset, IterableDataset):
        reason = "an IterableDataset has no sample indices"
    elif not issubclass(type(loader), DataLoader):  # accelerate's loaders only say that they are one
        reason = f"a {type(loader).__name__} around a DataLoader draws batches ahead"
    elif hasattr(loader, "state_dict"):
        reason = f"a {type(loader).__name__} with a state of its own may begin anywhere"
    elif not getattr(loader, "in_order", True):
        reason = "expected in_order=True, batches out of order cannot be matched with their indices"
    if reason:
        raise ValueError(
            f"loader: {reason}; let the batches hold their ids and pass key=, or call "
            "optimizer.set_samples(ids) before each forward, or choose share='none' (solve at every step), "
            "share='position' or share='mean'"
        )
    if loader.collate_fn not in _KEEP_ROWS:
        _KEEP_ROWS.append(loader.collate_fn)  # once for each
        log.warning(
            "loader: the rows of a batch are taken to stand in the order of their indices; where the "
            "collate_fn %s sorts, drops or repeats rows, pass key=",
            getattr(loader.collate_fn, "__qualname__", loader.collate_fn),
        )


def _recording(tracked: Any) -> tuple[DataLoader, _RecordingSampler]:
    """Return a copy of the loader that draws through a recording sampler, and that sampler.

    The copy stays, with the workers it may have, until an attribute of the loader is replaced.
    """
    attributes = {k: v for k, v in vars(tracked).items() if k not in ("_iterator", "_recording")}
    kept = vars(tracked).get("_recording")
    if (
        kept is None
        or kept[0].keys() != attributes.keys()
        or any(kept[0][k] is not v for k, v in attributes.items())
    ):
        recording: DataLoader = object.__new__(tracked._kind)
        recording.__dict__.update(attributes, _iterator=None)
        # A DataLoader forbids to set its samplers after construction; the copy has drawn nothing yet.
        which = "sampler" if recording.batch_sampler is None else "batch_sampler"
        recording.__dict__[which] = recorder = _RecordingSampler(getattr(recording, which))
        vars(tracked)["_recording"] = kept = (attributes, recording, recorder)
    return kept[1], kept[2]


def _viewed(dataset: Any) -> tuple[Any, list[Any]]:
    """Return what a Subset is taken from, of Subsets perhaps, and the indices of each."""
    views = []
    while isinstance(dataset, Subset):
        views.append(dataset.indices)
        dataset = dataset.dataset
    return dataset, views


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None
