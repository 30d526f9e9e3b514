"""From Gram matrices to the coefficients of the samples: one batched solve."""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fngd_kernels.ops.coefficients import coefficients

from ..capture import ParameterBlock
from ..memory import within_memory

OUT_OF_MEMORY = "out of memory for its Gram matrix"


class Solved(NamedTuple):
    """Blocks L whose Gram matrices had one shape: k (L, N, N), their coefficients s (L, N), and info (L,).

    info is what `fngd_kernels.ops.coefficients` returns.
    """

    blocks: list[ParameterBlock]
    k: Tensor
    s: Tensor
    info: Tensor

    @property
    def rows(self) -> list[int]:
        """The blocks' rows in the table."""
        return [block.index for block in self.blocks]


class Solver:
    """Solves for the coefficients of a batch in several blocks at once."""

    def __init__(self, damping: float, damping_mode: str, normalize: str) -> None:
        """Take damping, damping_mode and normalize as `fngd_kernels.ops.coefficients` does."""
        self.damping, self.damping_mode, self.normalize = damping, damping_mode, normalize

    def solve(self, grams: Mapping[ParameterBlock, Tensor]) -> list[Solved]:
        """Solve for every block with a Gram matrix; one that memory runs out for keeps the plain gradient."""
        groups: dict[Any, list[ParameterBlock]] = defaultdict(list)
        for block, k in grams.items():
            groups[k.shape[0], k.device, k.dtype].append(block)
        solved = []
        for blocks in groups.values():
            result = within_memory(partial(self._solve, blocks, [grams[block] for block in blocks]))
            if result is None:
                for block in blocks:
                    block.keep_plain(OUT_OF_MEMORY)
            else:
                solved.append(result)
        return solved

    def _solve(self, blocks: list[ParameterBlock], matrices: list[Tensor]) -> Solved:
        k = torch.stack(matrices)
        return Solved(blocks, k, *coefficients(k, self.damping, self.damping_mode, self.normalize))
