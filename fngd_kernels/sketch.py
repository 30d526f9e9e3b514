"""Sketches: how contributions are compressed before they are compared; standard library only."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from .arguments import LIMIT
from .geometry import ConvGeometry

INPUTS, OUTPUTS, ROWS = range(3)
"""The sides: A and gradients of an embedding, E, and contributions that are already formed."""

SIZE_LIMIT = 2**15
"""Sizes must be smaller than this: contributions that are already formed go into size^2 columns."""


@dataclass(frozen=True)
class Sketch:
    """A count sketch of both sides of the contributions C_n = E_n^T A_n.

    C_n' = (E_n R)^T (A_n Q), with R (O,r) and Q (I,r) of one random sign in each row, that of channel i in
    column i mod r. E[R R^T] = I and E[Q Q^T] = I, so <C_i', C_j'> is right in expectation. A side with at
    most r channels is left as it is. Contributions that are already formed, (N,D), go into r^2 columns.

    Source: the count sketch, Charikar, Chen and Farach-Colton 2002, its columns taken in turn.

    Attributes:
        size: r, 1 or more.
        seed: 0 or more; signs depend on it, the side and the number of the channel alone.
    """

    size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _integer("size", self.size, 1, SIZE_LIMIT))
        object.__setattr__(self, "seed", _integer("seed", self.seed, 0, LIMIT))

    def buckets(self, side: int) -> int:
        """Return how many channels are left of a side that has more."""
        return self.size**2 if side == ROWS else self.size

    def key(self, side: int) -> int:
        """Return the 31 bits that the signs of a side are computed from."""
        # The generator splitmix64, at a place for each seed and side.
        x = (3 * self.seed + side + 1) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x >> 33


def as_sketch(sketch: Any) -> Sketch | None:
    """Require a Sketch, its size alone, or None; return the sketch."""
    if sketch is None or isinstance(sketch, Sketch):
        return sketch
    return Sketch(_integer("sketch", sketch, 1, SIZE_LIMIT, "an int, a Sketch or None"))


def sketched_geometry(geometry: ConvGeometry, sketch: Sketch) -> ConvGeometry:
    """Return the convolution between the compressed channels, which are compressed within each group."""
    outputs, inputs, *kernel = geometry.weight_shape
    outputs = geometry.groups * min(outputs // geometry.groups, sketch.size)
    return geometry._replace(weight_shape=(outputs, min(inputs, sketch.size), *kernel))


def _integer(name: str, value: Any, least: int, limit: int, expected: str = "an int") -> int:
    """Require an integer from `least` to below `limit` that is not True or False; return it as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected {expected}, got {value!r:.80}")
    number = int(value)
    if not least <= number < limit:
        raise ValueError(f"{name}: expected an int, {least} or more and below {limit}, got {number}")
    return number
