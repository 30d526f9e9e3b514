"""Tile sizes of the kernels, by kernel, architecture and dtype; standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NamedTuple


@dataclass(frozen=True)
class Tile:
    """Block sizes by the kernel's constexpr arguments, launch options, and why they were chosen."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    evidence: str

    @property
    def launch(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


_COMPILED = "spills in no launch of the offline compile tests, triton 3.7.1; not timed"

# {kernel: {(architecture, bytes of an input element): tile}}
TILES: dict[str, dict[tuple[int, int], Tile]] = {
    "gram_pairs": {
        (80, 2): Tile({"ROWS": 64, "BK": 64}, 4, 4, _COMPILED),
        (80, 4): Tile({"ROWS": 64, "BK": 16}, 8, 2, _COMPILED),
        (90, 2): Tile({"ROWS": 128, "BK": 64}, 8, 4, _COMPILED),
        (100, 2): Tile({"ROWS": 128, "BK": 32}, 8, 4, _COMPILED),
    },
    "gram_pairs_unaligned": {
        (80, 2): Tile({"ROWS": 64, "BK": 32}, 8, 3, _COMPILED),
        (80, 4): Tile({"ROWS": 64, "BK": 16}, 8, 2, _COMPILED),
        (100, 4): Tile({"ROWS": 64, "BK": 16}, 8, 3, _COMPILED),
    },
    "gram_pairs_few": {
        (80, 2): Tile({"ROWS": 32, "BK": 64}, 4, 4, _COMPILED),
        (80, 4): Tile({"ROWS": 32, "BK": 32}, 4, 3, _COMPILED),
        (90, 2): Tile({"ROWS": 64, "BK": 64}, 4, 4, _COMPILED),
        (90, 4): Tile({"ROWS": 32, "BK": 16}, 4, 3, _COMPILED),
    },
    "gram_pairs_few_unaligned": {
        (80, 2): Tile({"ROWS": 32, "BK": 64}, 4, 3, _COMPILED),
        (80, 4): Tile({"ROWS": 32, "BK": 16}, 2, 3, _COMPILED),
    },
    # Small tiles: fewer pairs of them then share an id.
    "gram_embedding": {
        (80, 2): Tile({"ROWS": 32, "BK": 64}, 4, 3, _COMPILED),
        (80, 4): Tile({"ROWS": 32, "BK": 16}, 2, 3, _COMPILED),
        (90, 4): Tile({"ROWS": 64, "BK": 32}, 8, 3, _COMPILED),
        (100, 4): Tile({"ROWS": 64, "BK": 32}, 8, 2, _COMPILED),
    },
    "gram_embedding_unaligned": {
        (80, 2): Tile({"ROWS": 32, "BK": 32}, 4, 3, _COMPILED),
        (80, 4): Tile({"ROWS": 32, "BK": 16}, 4, 2, _COMPILED),
    },
    "gram_hadamard": {
        (80, 2): Tile({"ROWS": 128, "BK": 32}, 8, 4, _COMPILED),
        (80, 4): Tile({"ROWS": 64, "BK": 16}, 8, 3, _COMPILED),
        (90, 2): Tile({"ROWS": 128, "BK": 64}, 8, 4, _COMPILED),
        (90, 4): Tile({"ROWS": 64, "BK": 32}, 8, 3, _COMPILED),
    },
    "gram_hadamard_unaligned": {
        (80, 2): Tile({"ROWS": 64, "BK": 32}, 8, 3, _COMPILED),
        (80, 4): Tile({"ROWS": 32, "BK": 32}, 4, 3, _COMPILED),
    },
    "gram_hadamard_few": {
        (80, 2): Tile({"ROWS": 32, "BK": 128}, 4, 4, _COMPILED),
        (80, 4): Tile({"ROWS": 32, "BK": 32}, 4, 4, _COMPILED),
        (100, 2): Tile({"ROWS": 32, "BK": 64}, 4, 4, _COMPILED),
    },
    "gram_hadamard_few_unaligned": {
        (80, 2): Tile({"ROWS": 32, "BK": 64}, 4, 4, _COMPILED),
        (80, 4): Tile({"ROWS": 32, "BK": 32}, 4, 3, _COMPILED),
    },
    "combine_embedding": {
        (80, 2): Tile({"BR": 16, "BD": 128}, 4, 1, _COMPILED),
        (80, 4): Tile({"BR": 16, "BD": 128}, 4, 1, _COMPILED),
    },
    "contributions": {
        (80, 2): Tile({"BO": 128, "BI": 128, "BT": 32}, 8, 4, _COMPILED),
        (80, 4): Tile({"BO": 128, "BI": 128, "BT": 16}, 8, 3, _COMPILED),
        (90, 2): Tile({"BO": 128, "BI": 128, "BT": 64}, 8, 3, _COMPILED),
    },
    "contributions_unaligned": {
        (80, 2): Tile({"BO": 128, "BI": 128, "BT": 32}, 8, 4, _COMPILED),
        (80, 4): Tile({"BO": 64, "BI": 64, "BT": 16}, 4, 3, _COMPILED),
        (100, 4): Tile({"BO": 64, "BI": 64, "BT": 16}, 4, 2, _COMPILED),
    },
    # Tiles of several kernel offsets: every column has its own addresses and masks.
    "contributions_taps": {
        (80, 2): Tile({"BO": 128, "BI": 128, "BT": 32}, 8, 3, _COMPILED),
        (80, 4): Tile({"BO": 64, "BI": 64, "BT": 16}, 4, 3, _COMPILED),
        (90, 4): Tile({"BO": 64, "BI": 64, "BT": 16}, 4, 2, _COMPILED),
    },
    # From sm_90 on, matrix products of a warp group have 64 rows or more.
    "add_gram": {
        (80, 2): Tile({"BN": 128, "MIN_BN": 16, "BK": 32}, 8, 4, _COMPILED),
        (80, 4): Tile({"BN": 128, "MIN_BN": 16, "BK": 16}, 8, 4, _COMPILED),
        (90, 2): Tile({"BN": 128, "MIN_BN": 64, "BK": 64}, 8, 4, _COMPILED),
        (90, 4): Tile({"BN": 128, "MIN_BN": 64, "BK": 16}, 8, 4, _COMPILED),
    },
    "sketch": {
        (80, 2): Tile({"BP": 128, "BR": 32}, 4, 1, _COMPILED),
        (80, 4): Tile({"BP": 128, "BR": 32}, 4, 1, _COMPILED),
    },
    "sum_partials": {(80, 4): Tile({"BN": 8, "BP": 64}, 4, 1, _COMPILED)},
}


def tile(kernel: str, capability: tuple[int, int], itemsize: int) -> Tile:
    """Return the tile for the newest architecture up to `capability`, or for the oldest one if there is none.

    Args:
        kernel: Name of the kernel.
        capability: Compute capability of the GPU.
        itemsize: Bytes of an element of the kernel's input.
    """
    arch = 10 * capability[0] + capability[1]
    rows = {row[0]: chosen for row, chosen in TILES[kernel].items() if row[1] == itemsize}
    return rows[max((row for row in rows if row <= arch), default=min(rows))]


@dataclass(frozen=True)
class PairGrid:
    """How all pairs of positions of all pairs of samples are divided among programs.

    Attributes:
        samples: Samples in the rows of a tile.
        positions: Positions of each sample in the rows of a tile.
        blocks: Pairs of blocks of samples.
        pairs: Pairs of chunks of positions that one program takes.
        parts: Programs that share a pair of blocks, each with a partial sum.
    """

    samples: int
    positions: int
    blocks: int
    pairs: int
    parts: int


@lru_cache(maxsize=1024)
def pair_grid(n: int, positions: int, rows: int, programs: int) -> PairGrid:
    """Choose the samples and positions of a tile that waste fewest rows, and parts for so many programs."""

    def blocks(chunk: int) -> int:
        return lower_blocks(n, rows // chunk)

    # Of equally good chunks take the longest: more blocks are then independent, with fewer partial sums.
    chunks = (1 << bit for bit in range(rows.bit_length() - 1, 0, -1))
    chunk = min(chunks, key=lambda chunk: blocks(chunk) * ceil(positions / chunk) ** 2)
    return _divided(rows // chunk, chunk, blocks(chunk), ceil(positions / chunk) ** 2, programs)


class PositionBlock(NamedTuple):
    """Rows and columns of an image that make a block of positions."""

    rows: int
    columns: int


@lru_cache(maxsize=1024)
def position_block(height: int, width: int, positions: int) -> PositionBlock:
    """Choose the block of so many positions, a power of two, of which fewest cover an image."""

    def blocks(columns: int) -> tuple[int, int]:
        across = ceil(width / columns)
        return ceil(height / (positions // columns)) * across, across

    columns = min((1 << bit for bit in range(positions.bit_length())), key=blocks)
    return PositionBlock(positions // columns, columns)


def diagonal_grid(n: int, positions: int, rows: int, programs: int) -> PairGrid:
    """Return the grid for pairs of positions within each sample, of which symmetry leaves half."""
    # A matrix product needs 16 rows at least.
    chunk = min(rows, max(16, 1 << (positions - 1).bit_length()))
    return _divided(1, chunk, n, _pairs(ceil(positions / chunk)), programs)


def waves_cost(grid: PairGrid, layers: int, processors: int) -> int:
    """Return how many products of rows one processor forms after the other, for so many layers.

    The last wave of programs takes as long as a full one.
    """
    rows = grid.samples * grid.positions
    return ceil(grid.blocks * grid.parts * layers / processors) * grid.pairs * rows**2


def lower_blocks(n: int, block: int) -> int:
    """Return how many blocks the lower triangle of an (n,n) matrix has."""
    return _pairs(ceil(n / block))


def _pairs(count: int) -> int:
    return count * (count + 1) // 2


def _divided(samples: int, positions: int, blocks: int, chunk_pairs: int, programs: int) -> PairGrid:
    pairs = ceil(chunk_pairs / min(chunk_pairs, ceil(programs / blocks)))
    return PairGrid(samples, positions, blocks, pairs, ceil(chunk_pairs / pairs))
