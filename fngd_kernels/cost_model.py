"""The cost model: which Gram algorithm a layer takes, in which chunks; standard library only.

Costs are in multiply-adds (MACs) of a large matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Any

from .arguments import convolution, flag, integer, integers, linear_shapes, sizes
from .backends.triton.tiles import Tile, tile
from .geometry import PixelGrid, pixel_grids

WORKSPACE = 64 << 20
"""Default upper bound of scratch memory, in bytes."""

CHUNK_BYTES = 3 << 20
"""Scratch of one step of an algorithm: about what the outer cache of one core holds."""

NARROW_MAC = 2.0
"""Price of a MAC in the small products that form per-sample contributions, in MACs of a large product."""

ELEMENT_PASS = 16.0
"""Price of reading, combining and writing one element of a scratch tensor, in MACs."""

FUSED_ELEMENT_PASS = 200.0
"""Price of storing and loading a contribution in a GPU's L2 cache, in MACs of bfloat16; from data sheets."""

FUSED_TF32_MAC = 2.0
"""Price of a MAC of contributions in tf32, in MACs of bfloat16; from data sheets."""


@dataclass(frozen=True)
class Plan:
    """How one Gram matrix is formed.

    algorithm: "hadamard" (one position per sample), "pairs" (of positions) or "explicit" (contributions C_n)
    sample_chunk: samples per block (pairs), samples whose C_n are formed at a time (explicit)
    group_chunk, out_chunk, in_chunk: groups, outputs and inputs per group in a chunk of the weight (explicit)
    macs: multiply-adds done
    bytes_moved: bytes of inputs and scratch read and written
    workspace: bytes of scratch needed, copies that the library makes of a convolution's inputs included
    tiles: the tile of each fused kernel launched, none on library products
    """

    algorithm: str
    sample_chunk: int
    group_chunk: int
    out_chunk: int
    in_chunk: int
    macs: int
    bytes_moved: int
    workspace: int
    tiles: tuple[Tile, ...] = ()


@dataclass(frozen=True)
class _Layer:
    """Sizes of a layer; a linear layer is a convolution with one group whose pixels are its positions.

    pixels, positions: of one sample's input and output
    inputs, outputs: channels per group
    kernel: weights of one input and one output
    aspect: outputs over inputs in a chunk of the weight that runs fastest (rows of a product, or channels)
    copies: whether the inputs are copied, to cast or to gather them
    size: bytes of an element in the accumulation dtype
    """

    samples: int
    pixels: int
    positions: int
    inputs: int
    outputs: int
    groups: int
    kernel: int
    aspect: float
    copies: bool
    size: int

    @property
    def input_bytes(self) -> int:
        pixels = self.pixels * self.inputs + self.positions * self.outputs
        return self.samples * self.groups * pixels * self.size


def plan(
    a_shape: Sequence[int],
    e_shape: Sequence[int],
    *,
    weight_shape: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
    itemsize: int = 4,
    workspace: int = WORKSPACE,
    capability: tuple[int, int] | None = None,
) -> Plan:
    """Choose the cheapest Gram algorithm whose scratch memory fits, and its chunks.

    `pairs` costs N^2 T^2 (I + O) / 2 MACs, `explicit` N T I O + N^2 I O / 2; pairs of pixels of a convolution
    never form patches and cost N^2 (pixels^2 C + positions^2 O) / 2. Passes over scratch are priced too.

    a_shape: (N,I), (N,T,I), or (N,C,*space) with weight_shape
    e_shape: (N,O), (N,T,O), or (N,O,*space_out) with weight_shape
    weight_shape: (O,C/groups,*kernel) of a convolution, None for a linear layer
    stride, padding, dilation, groups: of the convolution
    bias: whether the bias belongs to the block
    itemsize: bytes of an element of the inputs
    workspace: upper bound of scratch memory in bytes, met wherever the chunk of one input and one output fits
    capability: compute capability of the GPU whose fused kernels run, None for library matrix products

    Returns: Plan
    Raises: ValueError, TypeError when the shapes are not those of one layer.
    """
    a_shape, e_shape = sizes("a_shape", a_shape, 1), sizes("e_shape", e_shape, 1)
    geometry: tuple[Any, ...] = (None, (), (), (), 1)
    if weight_shape is None:
        linear_shapes(("a_shape", "e_shape"), a_shape, e_shape)
    else:
        names = ("a_shape", "e_shape")
        geometry = convolution(names, a_shape, e_shape, weight_shape, stride, padding, dilation, groups)
    flag("bias", bias)
    itemsize, workspace = integer("itemsize", itemsize, 1), integer("workspace", workspace, 0)
    if capability is not None:
        major, minor = integers("capability", capability, 2, 0)
        capability = (major, minor)
        if itemsize not in (2, 4):
            raise ValueError(f"itemsize: expected 2 or 4 bytes where fused kernels run, got {itemsize}")
    return _plan(a_shape, e_shape, *geometry, bias, itemsize, workspace, capability)


@lru_cache(maxsize=4096)
def _plan(
    a_shape: tuple[int, ...],
    e_shape: tuple[int, ...],
    weight_shape: tuple[int, ...] | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    bias: bool,
    itemsize: int,
    workspace: int,
    capability: tuple[int, int] | None,
) -> Plan:
    size = max(4, itemsize)
    n = a_shape[0]
    if weight_shape is None:
        positions = a_shape[1] if len(a_shape) == 3 else 1
        layer = _Layer(
            samples=n,
            pixels=positions,
            positions=positions,
            inputs=a_shape[-1],
            outputs=e_shape[-1],
            groups=1,
            kernel=1,
            aspect=0.5,
            copies=itemsize < size,
            size=size,
        )
        if capability is not None:
            return _fused(layer, itemsize, workspace, capability)
        if positions == 1:
            return _hadamard(layer)
        grids = None
    else:
        axes = map(pixel_grids, a_shape[2:], weight_shape[2:], stride, padding, dilation)
        grids = list(product(*axes))
        layer = _Layer(
            samples=n,
            pixels=prod(a_shape[2:]),
            positions=prod(e_shape[2:]),
            inputs=weight_shape[1],
            outputs=weight_shape[0] // groups,
            groups=groups,
            kernel=prod(weight_shape[2:]),
            aspect=4.0,
            copies=True,
            size=size,
        )
    if capability is not None:
        return _fused_explicit(layer, ("contributions_conv", "add_gram"), itemsize, workspace, capability)[0]
    pairs, pairs_cost = _pairs(layer, grids, workspace)
    explicit, explicit_cost = _explicit(layer, bias, workspace)
    return pairs if pairs.workspace <= workspace and pairs_cost < explicit_cost else explicit


def _fused(layer: _Layer, itemsize: int, workspace: int, capability: tuple[int, int]) -> Plan:
    """Plan the fused kernels of a linear layer: pairs of positions stay in registers, C_n goes through L2."""
    n, t = layer.samples, layer.positions
    macs = n * (n + 1) // 2 * t * t * (layer.inputs + layer.outputs)
    chosen = tile("gram_hadamard" if t == 1 else "gram_pairs", capability, itemsize)
    # Every block of rows meets every other; 64 samples share one where there are few positions.
    bytes_moved = layer.samples * t * (layer.inputs + layer.outputs) * itemsize * ceil(n * t / 64)
    pairs = Plan(
        "hadamard" if t == 1 else "pairs",
        n,
        1,
        layer.outputs,
        layer.inputs,
        macs,
        bytes_moved,
        0,
        (chosen,),
    )
    explicit, cost = _fused_explicit(layer, ("contributions", "add_gram"), itemsize, workspace, capability)
    return pairs if t == 1 or macs < cost else explicit


def _fused_explicit(
    layer: _Layer,
    kernels: tuple[str, str],
    itemsize: int,
    workspace: int,
    capability: tuple[int, int],
) -> tuple[Plan, float]:
    n, weights = layer.samples, layer.groups * layer.outputs * layer.inputs * layer.kernel
    formed, summed = n * layer.positions * weights, n * (n + 1) // 2 * weights
    form, contract = kernels
    plan = Plan(
        "explicit",
        n,
        layer.groups,
        layer.outputs,
        layer.inputs,
        formed + summed,
        layer.input_bytes * itemsize // layer.size + 2 * n * weights * 4,
        min(workspace, 4 * n * weights),
        (tile(form, capability, itemsize), tile(contract, capability, 4)),
    )
    tf32 = FUSED_TF32_MAC if itemsize == 2 else 1.0
    return plan, formed + tf32 * summed + FUSED_ELEMENT_PASS * n * weights


def _hadamard(layer: _Layer) -> Plan:
    n = layer.samples
    products = 2 * n * n * layer.size
    macs, moved = n * n * (layer.inputs + layer.outputs), layer.input_bytes + products
    casts = layer.input_bytes if layer.copies else 0
    return Plan("hadamard", n, 1, layer.outputs, layer.inputs, macs, moved, products + casts)


def _pairs(layer: _Layer, grids: list[tuple[PixelGrid, ...]] | None, workspace: int) -> tuple[Plan, float]:
    """Plan blocks of samples, all pairs of whose positions are formed at a time."""
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
    # Of one pair of samples: position pairs of a and of e, and (convolution) the largest pixel Gram matrix.
    scratch = (2 * p * p + (max(pixels, default=0) ** 2 if grids is not None else 0)) * layer.size
    # Of one sample: its rows, copied where they are cast or gathered.
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
    plan = Plan(
        "pairs",
        block,
        1,
        layer.outputs,
        layer.inputs,
        macs,
        layer.input_bytes + 2 * elements * layer.size,
        needed,
    )
    return plan, macs + ELEMENT_PASS * elements


def _explicit(layer: _Layer, bias: bool, workspace: int) -> tuple[Plan, float]:
    """Plan chunks of the weight, whose C_n are formed for all samples, some samples at a time."""
    n, kernel = layer.samples, layer.kernel
    columns = min(CHUNK_BYTES, workspace // 2) // (n * layer.size)
    while True:
        g, o, i = _weight_chunk(layer, columns)
        chunk = n * g * o * i * kernel * layer.size
        # A slice of each input and C_n, each twice where the library keeps a copy in a layout of its own.
        one = 2 * g * (layer.pixels * i + layer.positions * o + i * o * kernel) * layer.size
        one = one if layer.copies else 0
        samples = max(1, min(n, (workspace - chunk) // max(one, 1)))
        samples = ceil(n / ceil(n / samples))
        # The parts of a convolution's chunk are formed one by one, then joined.
        joined = chunk if layer.copies and samples < n else 0
        needed = chunk + max(joined, samples * one)
        if needed <= workspace or g * o * i == 1:
            break
        columns = g * o * i * kernel // 2

    weights = layer.groups * layer.outputs * layer.inputs * kernel
    formed = n * layer.positions * weights
    summed = _upper_blocks(n, row_block(n)) * (weights + bias * layer.groups * layer.outputs)
    plan = Plan(
        "explicit",
        samples,
        g,
        o,
        i,
        formed + summed,
        layer.input_bytes + 2 * n * weights * layer.size,
        needed,
    )
    return plan, NARROW_MAC * formed + summed + ELEMENT_PASS * n * weights


def _weight_chunk(layer: _Layer, columns: int) -> tuple[int, int, int]:
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
    """Return how many rows of a symmetric (n,n) product are formed at a time, from the diagonal on."""
    # Fewer blocks leave the lower triangle's work in, more make the products too narrow.
    return max(32, ceil(n / 4))


def _upper_blocks(n: int, block: int) -> int:
    """Return how many elements of an (n,n) matrix lie in the blocks on and above the diagonal."""
    return sum(min(block, n - i) * (n - i) for i in range(0, n, block))


def embedding_chunk(positions: int, dim: int, itemsize: int, workspace: int) -> int:
    """Return how many of the `dim` columns of an embedding's gradients are summed at a time."""
    # Sums per id, two gathered copies of them, and their products.
    return max(1, min(dim, workspace // max(1, 4 * positions * max(4, itemsize))))


def column_chunk(rows: int, size: int, workspace: int) -> int:
    """Return how many columns of a matrix of `size`-byte elements are copied at a time."""
    return max(1, min(CHUNK_BYTES, workspace) // (rows * size))
