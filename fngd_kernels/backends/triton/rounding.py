"""Rounding of float32 tiles, the same on a GPU and in the interpreter."""

import triton
import triton.language as tl

from .common import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def rounded(x, TO: tl.constexpr):
    """Return the float32 tile x in TO, rounded to nearest."""
    if _INTERPRET and tl.bfloat16 == TO:
        # The interpreter truncates, so the number is rounded to even before.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(TO)
