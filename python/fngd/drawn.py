"""The indices that a loader's own sampler draws, matched with the batches that the loader yields."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate, default_convert

from .event_log import log
from .torch_private import batches_received, is_torchs_iterator

Drawn = deque[tuple[int, Sequence[int]]]
"""Number and indices of the batches that were drawn in a pass, from the last one that was yielded on."""

_KEEP_ROWS: list[Any] = [default_collate, default_convert]


class DrawnIds:
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


def check_ids_can_be_drawn(loader: DataLoader) -> None:
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


def recording(tracked: Any) -> tuple[DataLoader, _RecordingSampler]:
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


def viewed(dataset: Any) -> tuple[Any, list[Any]]:
    """Return what a Subset is taken from, of Subsets perhaps, and the indices of each."""
    views = []
    while isinstance(dataset, Subset):
        views.append(dataset.indices)
        dataset = dataset.dataset
    return dataset, views


def length(sized: Any) -> int | None:
    """Return how many samples a dataset has, or batches a loader, None where it does not say."""
    try:
        return len(sized)
    except TypeError:
        return None
