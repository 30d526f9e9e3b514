"""Costs and chunk sizes of the algorithms on torch's matrix products; standard library only.

Costs are in multiply-adds (MACs) of a large matrix product.
"""

from itertools import product
from math import ceil, prod

from ...geometry import PixelGrid
from ...plans import LayerSizes, Plan

CHUNK_BYTES = 3 << 20
"""Scratch memory of one step of an algorithm: about the size of the outer cache of one core."""

NARROW_MAC = 2.0
"""Cost of a MAC in the small products that form per-sample contributions, in MACs of a large product."""

ELEMENT_PASS = 16.0
"""Cost of reading, combining and writing one element of a scratch tensor, in MACs."""


def hadamard(layer: LayerSizes) -> Plan:
    """Plan the elementwise product of two Gram matrices, for one position per sample."""
    n = layer.samples
    products = 2 * n * n * layer.size
    macs, moved = n * n * (layer.inputs + layer.outputs), layer.input_bytes + products
    casts = layer.input_bytes if layer.copies else 0
    return Plan("hadamard", n, 1, layer.outputs, layer.inputs, macs, moved, products + casts)


def pairs(layer: LayerSizes, grids: list[tuple[PixelGrid, ...]] | None, workspace: int) -> tuple[Plan, float]:
    """Plan blocks of samples, whose pairs of positions are formed at a time; return the cost, too."""
    n, p = layer.samples, layer.positions
    if grids is None:
        pixels, taps = [p], 0
    else:
        pixels = [prod(axis.size for axis in grid) for grid in grids]
        taps = sum(
            prod((tap.outputs.stop - tap.outputs.start) ** 2 for tap in taps)
            for grid in grids
            for taps in product(*(axis.taps for axis in grid))
        )
    # For one pair of samples: pairs of positions of a and of e; of a convolution also the largest Gram matrix
    # of pixels.
    scratch = (2 * p * p + (max(pixels, default=0) ** 2 if grids is not None else 0)) * layer.size
    # For one sample: its rows, if they are cast or gathered.
    rows = (sum(pixels) * layer.inputs + p * layer.outputs) * layer.size if layer.copies else 0
    block = max(1, min(n, int((CHUNK_BYTES / scratch) ** 0.5)))
    while True:
        block = ceil(n / ceil(n / block))
        kept = n if grids is not None else 2 * block
        needed = block * block * scratch + kept * rows
        if needed <= workspace or block == 1:
            break
        block = ceil(block / 2)
    sample_pairs = _upper_blocks(n, block)
    macs = layer.groups * sample_pairs * (sum(q * q for q in pixels) * layer.inputs + p * p * layer.outputs)
    elements = layer.groups * sample_pairs * (taps + 2 * p * p)
    chosen = Plan(
        "pairs",
        block,
        1,
        layer.outputs,
        layer.inputs,
        macs,
        layer.input_bytes + 2 * elements * layer.size,
        needed,
    )
    return chosen, macs + ELEMENT_PASS * elements


def explicit(layer: LayerSizes, bias: bool, workspace: int) -> tuple[Plan, float]:
    """Plan chunks of the weight, for which the C_n of all samples are formed; return the cost, too."""
    n, kernel = layer.samples, layer.kernel
    columns = min(CHUNK_BYTES, workspace // 2) // (n * layer.size)
    while True:
        g, o, i = _weight_chunk(layer, columns)
        chunk = n * g * o * i * kernel * layer.size
        # For one sample: a slice of each input, and C_n; each twice, because the library makes copies in a
        # layout of its own.
        one = 2 * g * (layer.pixels * i + layer.positions * o + i * o * kernel) * layer.size
        one = one if layer.copies else 0
        samples = max(1, min(n, (workspace - chunk) // max(one, 1)))
        samples = ceil(n / ceil(n / samples))
        # A convolution's chunk is formed in parts, which are then concatenated.
        joined = chunk if layer.copies and samples < n else 0
        needed = chunk + max(joined, samples * one)
        if needed <= workspace or g * o * i == 1:
            break
        columns = g * o * i * kernel // 2

    weights = layer.weights
    formed = n * layer.positions * weights
    summed = _upper_blocks(n, row_block(n)) * (weights + bias * layer.groups * layer.outputs)
    chosen = Plan(
        "explicit",
        samples,
        g,
        o,
        i,
        formed + summed,
        layer.input_bytes + 2 * n * weights * layer.size,
        needed,
    )
    return chosen, NARROW_MAC * formed + summed + ELEMENT_PASS * n * weights


def _weight_chunk(layer: LayerSizes, columns: int) -> tuple[int, int, int]:
    """Halve groups, then outputs or inputs, until a chunk has at most `columns` weights."""
    g, o, i = layer.groups, layer.outputs, layer.inputs
    while g * o * i * layer.kernel > columns and g * o * i > 1:
        if g > 1:
            g = ceil(g / 2)
        elif o > layer.aspect * i or i == 1:
            o = ceil(o / 2)
        else:
            i = ceil(i / 2)
    return g, o, i


def row_block(n: int) -> int:
    """Return how many rows of the upper triangle of a symmetric (n,n) product are formed at a time."""
    # With fewer blocks more of the lower triangle is computed in vain, with more the products get too narrow.
    return max(32, min(256, ceil(n / 4)))


def _upper_blocks(n: int, block: int) -> int:
    """Return how many elements of an (n,n) matrix lie in the blocks on and above the diagonal."""
    return sum(min(block, n - i) * (n - i) for i in range(0, n, block))


def embedding_chunk(positions: int, dim: int, itemsize: int, workspace: int) -> int:
    """Return how many of the `dim` columns of an embedding's gradients are summed at a time."""
    # Scratch memory holds the sums per id, two gathered copies of them, and their products.
    return max(1, min(dim, workspace // max(1, 4 * positions * max(4, itemsize))))


def column_chunk(rows: int, size: int, workspace: int) -> int:
    """Return how many columns of a matrix of `size`-byte elements are copied at a time."""
    return max(1, min(CHUNK_BYTES, workspace) // (rows * size))
