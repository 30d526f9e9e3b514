"""Tile sizes of the fused kernels, by kernel, architecture and dtype."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Block sizes under the names of the kernel's constexpr arguments, launch options, and their evidence."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    evidence: str

    @property
    def launch(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


_COMPILED = "compiles without spills on its architecture, triton 3.7.1; not timed"

# {kernel: {(architecture, bytes of an input element): tile}}
TILES: dict[str, dict[tuple[int, int], Tile]] = {
    "gram_pairs": {
        (80, 2): Tile({"ROWS": 64, "BK": 32}, 4, 3, _COMPILED),
        (80, 4): Tile({"ROWS": 64, "BK": 32}, 4, 2, _COMPILED),
    },
    "combine": {
        (80, 2): Tile({"BO": 128, "BI": 128, "BK": 64}, 8, 3, _COMPILED),
        (80, 4): Tile({"BO": 128, "BI": 128, "BK": 32}, 8, 3, _COMPILED),
    },
    "combine_sum": {
        (80, 2): Tile({"BD": 1024}, 4, 1, _COMPILED),
        (80, 4): Tile({"BD": 1024}, 4, 1, _COMPILED),
    },
    "contributions": {
        (80, 2): Tile({"BO": 128, "BI": 64, "BT": 32}, 4, 3, _COMPILED),
        (80, 4): Tile({"BO": 64, "BI": 64, "BT": 16}, 4, 3, _COMPILED),
    },
    "contributions_conv": {
        (80, 2): Tile({"BO": 64, "BI": 64, "BT": 32}, 4, 3, _COMPILED),
        (80, 4): Tile({"BO": 64, "BI": 64, "BT": 16}, 4, 3, _COMPILED),
    },
    "add_gram": {(80, 4): Tile({"BN": 128, "BK": 32}, 8, 3, _COMPILED)},
    "sum_partials": {(80, 4): Tile({"BN": 16, "BP": 16}, 4, 1, _COMPILED)},
}


def tile(kernel: str, capability: tuple[int, int], dtype: torch.dtype) -> Tile:
    """Return the tile of the newest architecture up to `capability`, of the oldest one if there is none."""
    arch = 10 * capability[0] + capability[1]
    rows = {row[0]: chosen for row, chosen in TILES[kernel].items() if row[1] == dtype.itemsize}
    return rows[max((row for row in rows if row <= arch), default=min(rows))]
