"""What all kernels share."""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 when Triton was first imported."""

_INTERPRET = tl.constexpr(INTERPRET)


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device, (0, 0) for the interpreter's CPU."""
    return (0, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device, 4 for the interpreter's CPU."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def aligned(*tensors: Tensor) -> bool:
    """Return whether Triton sees that every row starts at a multiple of 16 elements, for wide loads."""
    return all(
        t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in t.stride()[:-1])
        for t in tensors
    )


def alignment(*tensors: Tensor) -> str:
    """Return what the name of a tile for these tensors ends with, where loads are wide and where not."""
    return "" if aligned(*tensors) else "_unaligned"


MOST_LAYERS = 16
"""Layers of one launch: their tensors are arguments, because a table on the device would need a copy."""

Launch = tuple[int, tuple[Tensor, ...], tuple[Tensor, ...], int]
"""The first layer's number, the layers' a and e for `chosen_layer`, and how many layers they are."""


def launches(a: Sequence[Tensor], e: Sequence[Tensor]) -> Iterator[Launch]:
    """Yield the layers of each launch; kernels are compiled for one layer and for MOST_LAYERS."""
    for first in range(0, len(a), MOST_LAYERS):
        some_a, some_e = tuple(a[first : first + MOST_LAYERS]), tuple(e[first : first + MOST_LAYERS])
        missing = MOST_LAYERS - len(some_a) if len(a) > 1 else 0
        yield first, some_a + some_a[:1] * missing, some_e + some_e[:1] * missing, len(some_a)


@triton.jit
def chosen_layer(pointers, pid_layer):
    """Return one of a tuple of pointers."""
    pointer = pointers[0]
    for layer in tl.static_range(1, len(pointers)):
        pointer = tl.where(pid_layer == layer, pointers[layer], pointer)
    return pointer


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """Return acc + x y in float32; PRECISION "ieee", "tf32" or "tf32x3" counts for float32 tiles only."""
    if _INTERPRET:
        # The interpreter multiplies the bit patterns of bfloat16.
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def rows_product(
    X,
    offs_i,  # [ROWS_I]
    offs_j,  # [ROWS_J]
    mask_i,  # [ROWS_I]
    mask_j,  # [ROWS_J]
    size,
    stride_x,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """Return the products of rows at X + offs_i with rows at X + offs_j, of `size` elements each."""
    acc = tl.zeros([offs_i.shape[0], offs_j.shape[0]], dtype=tl.float32)  # [ROWS_I, ROWS_J]
    for k in range(0, size, BK):
        offs_k = k + tl.arange(0, BK)  # [BK]
        mask_k = offs_k < size
        columns = offs_k.to(tl.int64) * stride_x
        x_i = tl.load(
            X + offs_i[:, None] + columns[None, :], mask=mask_i[:, None] & mask_k[None, :], other=0.0
        )  # [ROWS_I, BK]
        x_j = tl.load(
            X + offs_j[None, :] + columns[:, None], mask=mask_j[None, :] & mask_k[:, None], other=0.0
        )  # [BK, ROWS_J]
        acc = dot(x_i, x_j, acc, PRECISION)
    return acc


@triton.jit
def lower_block(pid, num_blocks):
    """Return row and column of block number `pid` in the lower triangle of num_blocks x num_blocks."""
    # The triangle is folded to a rectangle: a row of the rectangle is a long row of blocks and a short one.
    odd = num_blocks % 2
    width = num_blocks + 1 - odd
    fold = pid // width
    column = pid % width
    long = column < num_blocks - fold
    return (
        tl.where(long, num_blocks - 1 - fold, fold - odd),
        tl.where(long, column, column - (num_blocks - fold)),
    )


@triton.jit
def sample_sums(x, SAMPLES: tl.constexpr, POSITIONS: tl.constexpr):
    """Return the sums [SAMPLES, SAMPLES] of x [SAMPLES * POSITIONS, SAMPLES * POSITIONS] over positions."""
    x = tl.reshape(x, [SAMPLES, POSITIONS, SAMPLES, POSITIONS])
    return tl.sum(tl.sum(x, axis=3), axis=1)


@triton.jit
def store_symmetric(K, k, offs_i, offs_j, n, stride_ki, stride_kj):
    """Store the lower triangle of K (n,n) in block k, at rows offs_i and columns offs_j, and its mirror."""
    # In a block on the diagonal the two triangles may be summed in different orders, so only one is used.
    mask = (offs_j[None, :] <= offs_i[:, None]) & (offs_i[:, None] < n)
    offs_i = offs_i.to(tl.int64)[:, None]
    offs_j = offs_j.to(tl.int64)[None, :]
    tl.store(K + offs_i * stride_ki + offs_j * stride_kj, k, mask=mask)
    tl.store(K + offs_j * stride_ki + offs_i * stride_kj, k, mask=mask)
