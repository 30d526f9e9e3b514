"""Which rows of a layer belong to which residual of a block.

Most layers are called on one row for each residual. Where the model is called once for several blocks, each
of which takes some of the rows, or where a residual takes several rows (finite differences, the ends of a
period, a quadrature), a layer has R rows for N residuals:

    rows that the block depends on   r_0 < r_1 < ... < r_{kN-1}; the others contribute zero
    in runs                          residual n takes r_n, r_{n+N}, r_{n+2N}, ...
    side by side                     residual n takes r_{kn}, ..., r_{kn+k-1}

Each of the k rows of a residual is one more use. The caller checks that an arrangement is the right one.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from ..capture import RoutedModule, Uses
from ..rules import Use, is_linear_map
from .residuals import Block


class RowFinder:
    """Finds the rows of layers by residual, and remembers which rows a block depends on."""

    def __init__(self) -> None:
        # (R,) bool by R, for the N of the last differentiation, by block and component
        self._inside: dict[tuple[str, int], tuple[int, dict[int, Tensor]]] = {}
        self._side_by_side: set[tuple[str, str]] = set()
        self.changes = 0
        """How often other rows than before were found."""

    def by_residual(
        self, block: Block, component: int, uses: Uses, differentiate_nan: Callable[[], Uses]
    ) -> tuple[Uses, list[RoutedModule]]:
        """Return uses of N rows each, and the layers with rows that no arrangement fits.

        Args:
            block: Its N residuals were differentiated.
            component: Which component of it.
            uses: What was captured, of any number of rows.
            differentiate_nan: Returns the uses when NaN is the gradient of every residual: it arrives in
                the rows that the residuals depend on, also where their derivative happens to be zero.
        """
        samples = len(block.values)
        others = {len(use.e) for use in chain(*uses.values())} - {samples}
        last, inside = self._inside.get((block.name, component), (samples, {}))
        if last != samples:
            inside = {}
        self._inside[block.name, component] = samples, inside
        for rows in others:
            if rows not in inside or bool((_touched(uses, rows) & ~inside[rows]).any()):
                inside[rows] = _touched(differentiate_nan(), rows)
                self.changes += 1
        found: Uses = {}
        misfits = []
        for module, captured in uses.items():
            side_by_side = (block.name, module.name) in self._side_by_side
            found[module] = []
            for use in captured:
                if len(use.e) == samples:
                    found[module].append(use)
                    continue
                index = inside[len(use.e)].nonzero().flatten()
                if len(index) % samples or not (use.a is None or isinstance(use.a, Tensor)):
                    misfits.append(module)
                    break
                if len(index):
                    runs = index.view(samples, -1).T if side_by_side else index.view(-1, samples)
                    found[module] += _taken(use, runs, is_linear_map(module.rule))
        return found, misfits

    def arrange_otherwise(self, block: str, module: RoutedModule) -> bool:
        """Take the rows of a layer for side by side from now on; return False where they already were."""
        key = block, module.name
        tried_all = key in self._side_by_side
        self._side_by_side.add(key)
        return not tried_all


def _touched(uses: Uses, rows: int) -> Tensor:
    """Return which of R rows contribute, (R,) bool, by any use of so many rows."""
    return torch.stack([_contributing(use) for use in chain(*uses.values()) if len(use.e) == rows]).any(0)


def _contributing(use: Use) -> Tensor:
    """Return which rows have a grad_output and, in a derivative, where the two change roles, an input."""
    if use.biased or not (isinstance(use.a, Tensor) and use.a.is_floating_point()):
        return _nonzero(use.e)
    return _nonzero(use.e) & _nonzero(use.a)


def _nonzero(x: Tensor) -> Tensor:
    return (x != 0).unsqueeze(-1).flatten(1).any(1)


def _taken(use: Use, runs: Tensor, is_linear: bool) -> list[Use]:
    """Return the uses of rows (k, N); to a linear map its k rows are positions of one use."""
    indices = runs.T.unsqueeze(0) if is_linear else runs
    return [Use(None if use.a is None else use.a[i], use.e[i], use.biased) for i in indices]
