"""Checks of numbers and shapes among a function's arguments; standard library only.

Each message names the argument, what was expected and what came.
"""

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from .geometry import ConvGeometry, output_size

WHOLE = (int, Integral)
"""Types of integers. Here and below the usual type is asked first: abstract classes take longer."""

LIMIT = 2**63
"""The operators' arguments have 64 bits: integers must be smaller than this."""


def integer(name: str, value: Any, least: int) -> int:
    """Require an integer of at least `least`; return it as an int."""
    if not isinstance(value, WHOLE):
        raise TypeError(f"{name}: expected an int, got {value!r:.80}")
    number = int(value)
    if not least <= number < LIMIT:
        raise ValueError(f"{name}: expected an int, {least} or more and below 2**63, got {number}")
    return number


def integers(name: str, value: Any, count: int, least: int) -> tuple[int, ...]:
    """Require one or `count` integers, each at least `least` and below 2**31; return `count` of them."""
    expected = f"{name}: expected an int or {count} ints, {least} or more"
    numbers = value if isinstance(value, tuple) or not isinstance(value, WHOLE) else (value,) * count
    if not _is_sequence(numbers) or not all(isinstance(number, WHOLE) for number in numbers):
        raise TypeError(f"{expected}, got {value!r:.80}")
    if len(numbers) != count or not all(least <= int(number) for number in numbers):
        raise ValueError(f"{expected}, got {tuple(numbers)!r:.80}")
    if not all(int(number) < 2**31 for number in numbers):
        raise ValueError(f"{expected} and below 2**31, got {value!r:.80}")
    return tuple(map(int, numbers))


def sizes(name: str, value: Any, least: int) -> tuple[int, ...]:
    """Require a shape whose sizes are at least `least`; return it."""
    if not _is_sequence(value):
        raise TypeError(f"{name}: expected a sequence of ints, got {value!r:.80}")
    return integers(name, value, len(value), least)


def _is_sequence(value: Any) -> bool:
    """Return whether the value is a sequence of separate things, unlike a string."""
    return isinstance(value, tuple) or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def flag(name: str, value: Any) -> None:
    """Require True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r:.80}")


def non_negative(name: str, value: Any, largest: float = sys.float_info.max) -> float:
    """Require a finite number >= 0, and not above `largest`, the largest of a dtype; return it as a float."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r:.80}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {number}")
    if number > largest:
        raise ValueError(f"{name}: expected a number up to {largest:.3g}, got {number}")
    return number


def choice(name: str, value: Any, names: Sequence[str]) -> None:
    """Require one of the names."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(names)}, got {value!r:.80}")
    if value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(names)}, got {value!r:.80}")


def linear_shapes(names: tuple[str, str], a_shape: Sequence[int], e_shape: Sequence[int]) -> None:
    """Require (N,I) and (N,O), or (N,T,I) and (N,T,O)."""
    a_shape, e_shape = tuple(a_shape), tuple(e_shape)
    if len(a_shape) not in (2, 3):
        raise ValueError(f"{names[0]}: expected shape (N,I) or (N,T,I), got {a_shape}")
    if len(e_shape) != len(a_shape) or e_shape[:-1] != a_shape[:-1]:
        leading = ",".join(map(str, a_shape[:-1]))
        raise ValueError(
            f"{names[1]}: expected shape ({leading},O) as {names[0]} has {a_shape}, got {e_shape}"
        )


def convolution(
    names: tuple[str, str],
    x_shape: Sequence[int],
    e_shape: Sequence[int],
    weight_shape: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
) -> ConvGeometry:
    """Require the shapes of input (N,C,*space) and output (N,O,*space_out) of a 1- to 3-d convolution.

    Returns:
        The geometry, with one number for each dimension where one was given for all.
    """
    weight_shape = sizes("weight_shape", weight_shape, 1)
    dims = len(weight_shape) - 2
    if dims not in (1, 2, 3):
        raise ValueError(
            f"weight_shape: expected (O,C/groups,*kernel) with 1 to 3 kernel sizes, got {weight_shape}"
        )
    stride = integers("stride", stride, dims, 1)
    padding = integers("padding", padding, dims, 0)
    dilation = integers("dilation", dilation, dims, 1)
    groups = integer("groups", groups, 1)
    outputs, inputs, *kernel = weight_shape
    x_shape, e_shape = tuple(x_shape), tuple(e_shape)
    if outputs % groups:
        raise ValueError(f"groups: expected a divisor of weight_shape[0] = {outputs}, got {groups}")
    if len(x_shape) != dims + 2 or x_shape[1] != inputs * groups:
        expected = f"(N,{inputs * groups}" + ",size" * dims + ")"
        raise ValueError(
            f"{names[0]}: expected shape {expected} for that weight_shape and groups, got {x_shape}"
        )
    space = tuple(map(output_size, x_shape[2:], kernel, stride, padding, dilation))
    if min(space) < 1:
        raise ValueError(f"{names[0]}: expected space that the kernel fits into, got {x_shape}")
    if e_shape != (x_shape[0], outputs, *space):
        raise ValueError(f"{names[1]}: expected shape {(x_shape[0], outputs, *space)}, got {e_shape}")
    return ConvGeometry(weight_shape, stride, padding, dilation, groups)
