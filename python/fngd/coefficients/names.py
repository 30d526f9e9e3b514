"""Which batch a forward belongs to, where loaders name their batches as they yield them.

A loop may draw batches ahead of their use (prefetchers do), or leave some out. As soon as a batch is named
before the last one was used, nothing is taken for granted: a forward's input is looked for in the batches
that wait for their use.
"""

import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Pass(Protocol):
    """One pass over a tracked loader."""

    finished: bool
    """Whether it has said that there are no more batches."""

    @property
    def yielded_all(self) -> bool:
        """Whether it has yielded as many batches as the loader has."""


class Named(NamedTuple):
    """A batch that a tracked loader has yielded."""

    ids: Tensor
    """(N,) int64 on the CPU."""
    highest: int
    """The highest of ids, -1 for none."""
    batches: "weakref.ref[Pass]"
    """The pass that it comes from."""
    content: Any
    """What the loader has yielded."""

    def holds(self, x: Tensor) -> bool:
        """Return whether x is one of its tensors, in whatever shape, dtype and place."""
        found = (t for t in _tensors(self.content) if t.numel() == x.numel())
        return any(torch.equal(t.detach().to(x).flatten(), x.detach().flatten()) for t in found)


class Names:
    """The batches that were named and not used yet."""

    MOST_WAITING = 16

    def __init__(self) -> None:
        self._latest: Named | None = None  # where no other waits: the next forward is of this one
        self._waiting: deque[Named] = deque(maxlen=self.MOST_WAITING)

    @property
    def waiting(self) -> bool:
        """Whether forwards have to be told apart by their inputs."""
        return bool(self._waiting)

    def put(self, named: Named, *, used: bool) -> bool:
        """Take in a batch; return whether the next forward must be of it.

        Args:
            used: Whether a forward has used the one that must have come next.
        """
        self.doubt(used=used)
        if not self._waiting:
            self._latest = named
            return True
        self._waiting.append(named)
        return False

    def doubt(self, *, used: bool) -> None:
        """Hear that another batch may come before the one that must have come next, if that was not used."""
        if self._latest is not None and not used:
            self._waiting.append(self._latest)
        self._latest = None

    def find(self, x: Tensor) -> Named | None:
        """Return the batch that waits and holds a forward's input, if there is exactly one.

        It waits no longer, nor do those before it, which were left out.
        """
        found = [n for n, named in enumerate(self._waiting) if named.holds(x)]
        if len(found) != 1:
            return None
        for _ in range(found[0]):
            self._waiting.popleft()
        return self._waiting.popleft()

    def forget_ended(self) -> None:
        """Forget the batches of passes that have ended."""
        kept = [named for named in self._waiting if goes_on(named.batches)]
        self._waiting = deque(kept, self.MOST_WAITING)
        if self._latest is not None and not goes_on(self._latest.batches):
            self._latest = None

    def clear(self, *, waiting: bool = True) -> None:
        """Forget the batch that was to come next, and those that wait."""
        self._latest = None
        if waiting:
            self._waiting.clear()


def goes_on(batches: "weakref.ref[Pass] | None") -> bool:
    """Return whether a pass is alive and has more batches."""
    found = None if batches is None else batches()
    return found is not None and not found.finished


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        yield from _tensors(list(content.values()))
    elif isinstance(content, (list, tuple)):
        for each in content:
            yield from _tensors(each)
