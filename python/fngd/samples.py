"""Sample ids for any DataLoader, from its own batch sampler: datasets and collate functions stay the same."""

import copy
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .torch_private import batches_received, is_torchs_iterator

Drawn = deque[tuple[int, Sequence[int]]]
"""Number and indices of the batches that were drawn in a pass, from the last one that was yielded on."""

MOST_SAMPLES = 2**31
"""Bound of ids: rejects hashes and timestamps passed by mistake before a table is allocated for them."""


class TakesSamples(Protocol):
    """What a tracked loader tells about its batches: an optimizer."""

    def set_samples(self, ids: Sequence[int]) -> None:
        """Receive the ids of the samples in the next batch."""

    def start_epoch(self, dataset_size: int | None = None) -> None:
        """Hear that the loader begins anew."""


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


def track(loader: DataLoader, optimizer: TakesSamples, *others: TakesSamples) -> "TrackedLoader":
    """Return the loader, iterated as before, telling the optimizer the sample ids of every batch it yields.

    The ids are the dataset indices that the loader's own batch sampler draws: any map-style dataset,
    collate_fn, number of workers, shuffling, drop_last or a short last batch. Only share = "sample" needs
    ids; for the other modes any loader will do, an IterableDataset included.

    Args:
        loader: The loader.
        optimizer: The FNGD that is told.
        others: More optimizers that are to hear the same, where a loop trains several models.

    Raises:
        TypeError: Loader is not a DataLoader, or optimizer does not take sample ids.
        ValueError: Ids are needed and the loader has none: an IterableDataset, batch_size=None with single
            indices, in_order=False, or a loader that accelerate prepared.
        RuntimeError: While iterating, a subclass of DataLoader yields other batches than its sampler draws.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"loader: expected a torch.utils.data.DataLoader, got {type(loader).__name__}")
    optimizers = (optimizer, *others)
    for each in optimizers:
        if not hasattr(each, "set_samples"):
            raise TypeError(f"optimizer: expected an fngd.FNGD, got {type(each).__name__}")
    return TrackedLoader(loader, optimizers)


class TrackedLoader:
    """A DataLoader that reports sample ids; every attribute but iteration is the loader's own."""

    def __init__(self, loader: DataLoader, optimizers: Sequence[TakesSamples]) -> None:
        self.loader, self.optimizers = loader, optimizers
        self._recorder: _RecordingSampler | None = None
        self._source = loader
        if any(getattr(optimizer, "share", "sample") == "sample" for optimizer in optimizers):
            self._source, self._recorder = _recording(loader)

    def __iter__(self) -> Iterator[Any]:
        return (
            self._plainly()
            if self._recorder is None
            else _NamedBatches(self._begin, self.loader, self.optimizers)
        )

    def _plainly(self) -> Iterator[Any]:
        for optimizer in self.optimizers:
            optimizer.start_epoch()
        yield from self._source

    def _begin(self) -> tuple[Iterator[Any], Drawn]:
        """Begin a pass: return its batches, and where their ids are noted."""
        assert self._recorder is not None
        for optimizer in self.optimizers:
            optimizer.start_epoch(len(self.loader.dataset))  # type: ignore[arg-type]
        batches = iter(self._source)
        return batches, self._recorder.drawn

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not yet set while unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)


class _NamedBatches:
    """The batches of one pass; like the loader's own iterator it can be asked on after an error."""

    def __init__(
        self,
        begin: Callable[[], tuple[Iterator[Any], Drawn]],
        loader: DataLoader,
        optimizers: Sequence[TakesSamples],
    ) -> None:
        self.begin, self.loader, self.optimizers = begin, loader, optimizers
        self.begun = False
        self.yielded = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self.begun:  # only when a batch is asked for: frameworks make iterators that they never use
            self.batches, self.drawn = self.begin()
            self.is_torchs = is_torchs_iterator(self.batches)
            self.begun = True
        try:
            batch = next(self.batches)
        except StopIteration:
            if not self.is_torchs and self.drawn and self.drawn[-1][0] >= self.yielded:
                raise _not_its_batches(self.loader) from None
            raise
        number = self.yielded
        if self.is_torchs:
            received = batches_received(self.batches)
            # Without workers nothing is drawn ahead.
            number = self.drawn[-1][0] if received is None else received - 1
        while self.drawn and self.drawn[0][0] < number:
            self.drawn.popleft()
        if not self.drawn:
            raise _not_its_batches(self.loader)
        self.yielded = number + 1
        for optimizer in self.optimizers:
            optimizer.set_samples(self.drawn[0][1])
        return batch


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
            if not isinstance(indices, Sequence) or isinstance(indices, (str, bytes)):
                raise ValueError(
                    "loader: its sampler draws single indices (batch_size=None), which do not name the "
                    "samples of a batch; give the loader a batch_size, or call optimizer.set_samples(ids)"
                )
            drawn.append((number, indices))
            yield indices

    def __len__(self) -> int:
        return len(self.sampler)


def _not_its_batches(loader: DataLoader) -> RuntimeError:
    return RuntimeError(
        f"loader: this {type(loader).__name__} does not yield the batches that its sampler draws; "
        "call optimizer.set_samples(ids) before each forward"
    )


def _recording(loader: DataLoader) -> tuple[DataLoader, _RecordingSampler]:
    """Return a copy of the loader that draws through a recording sampler, and that sampler."""
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "loader: an IterableDataset has no sample indices; call optimizer.set_samples(ids) before each "
            "forward, or choose share='none' (solve at every step), share='position' or share='mean'"
        )
    if not issubclass(type(loader), DataLoader):  # accelerate's loaders only say that they are one
        raise ValueError(
            f"loader: a {type(loader).__name__} around a DataLoader draws batches ahead; let the dataset "
            "return its indices and call optimizer.set_samples(ids) before each forward"
        )
    if not getattr(loader, "in_order", True):
        raise ValueError(
            "loader: expected in_order=True, batches out of order cannot be matched with their ids"
        )
    which = "sampler" if loader.batch_sampler is None else "batch_sampler"
    recorder = _RecordingSampler(getattr(loader, which))
    recording = copy.copy(loader)
    # A DataLoader forbids to set its samplers after construction; the copy has drawn nothing yet.
    recording.__dict__[which] = recorder
    recording.__dict__["_iterator"] = None
    return recording, recorder
