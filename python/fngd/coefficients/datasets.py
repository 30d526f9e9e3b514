"""Which columns of the table the samples of each dataset take."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any


class _Columns:
    """The columns of one dataset."""

    def __init__(self, offset: int, size: int) -> None:
        self.offset, self.size = offset, size
        # Returns the dataset while it lives. Nobody's yet: those of a state that was loaded.
        self.owner: Callable[[], Any] | None = None

    def give(self, dataset: Any) -> "_Columns":
        try:
            self.owner = weakref.ref(dataset)
        except TypeError:  # a list has no weak references
            self.owner = lambda: dataset
        return self


class Datasets:
    """Columns for the samples of each dataset that was tracked, one dataset after the other.

    A dataset is known by its identity. Those of a loaded state are taken in the order in which datasets of
    the same length come.
    """

    def __init__(self) -> None:
        self._all: list[_Columns] = []

    @property
    def size(self) -> int:
        """How many columns all of them take."""
        return self._all[-1].offset + self._all[-1].size if self._all else 0

    def __len__(self) -> int:
        return len(self._all)

    def columns(self, dataset: Any, size: int) -> tuple[int, bool]:
        """Return the first of a dataset's columns, and whether they were another dataset's, which is gone."""
        for columns in self._all:
            if columns.owner is not None and columns.owner() is dataset:
                if columns is self._all[-1]:  # it may have grown
                    columns.size = max(columns.size, size)
                if size <= columns.size:
                    return columns.offset, False
                columns.owner = _nothing
        for columns in self._all:
            if columns.size == size and (columns.owner is None or columns.owner() is None):
                taken_over = columns.owner is not None
                return columns.give(dataset).offset, taken_over
        self._all.append(_Columns(self.size, size).give(dataset))
        return self._all[-1].offset, False

    def sizes(self) -> list[int]:
        """Return how many columns each dataset takes."""
        return [columns.size for columns in self._all]

    def load(self, sizes: Sequence[int]) -> None:
        """Take over the sizes of a state; datasets that are known already keep their columns."""
        if self.sizes()[: len(sizes)] != list(sizes):
            self._all = []
            for size in sizes:
                self._all.append(_Columns(self.size, size))
        del self._all[len(sizes) :]


def _nothing() -> None:
    return None
