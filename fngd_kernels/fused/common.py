"""What every fused kernel shares."""

import torch
import triton
import triton.language as tl

INTERPRET = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 when Triton was first imported."""

_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """Return acc + x y in float32; PRECISION "ieee", "tf32" or "tf32x3" counts for float32 tiles only."""
    if _INTERPRET:
        # The interpreter multiplies the bit patterns of bfloat16.
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision=PRECISION)


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device, (0, 0) of the interpreter's CPU."""
    return (0, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)


def multiprocessors(device: torch.device) -> int:
    """Return how many programs a device runs at a time at least, 4 of the interpreter's CPU."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
