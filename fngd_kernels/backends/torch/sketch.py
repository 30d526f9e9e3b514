"""Random signs, and the sums of channels that they make."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .costs import CHUNK_BYTES
from .products import accumulation_dtype

PRODUCT_SIZE = 64
"""Up to so many buckets a matrix product with the signs takes hardly longer than reading the channels."""


def signs(channels: Tensor, key: int) -> Tensor:
    """Return 1 or -1 as int8 for each number of a channel: a bit of it after MurmurHash3's last steps."""
    x = (channels.long() * 0x9E3779B1).add_(key).bitwise_and_(0xFFFFFFFF)
    x = x.bitwise_xor_(x >> 16).mul_(0x85EBCA6B).bitwise_and_(0xFFFFFFFF)
    x = x.bitwise_xor_(x >> 13).mul_(0xC2B2AE35).bitwise_and_(0xFFFFFFFF)
    return 1 - 2 * (x >> 31).to(torch.int8)


def sketch(x: Tensor, groups: int, size: int, key: int, y: Tensor) -> None:
    """Write x (N,P,C), its channels compressed within groups, to y (N,P,groups * size)."""
    dtype = accumulation_dtype(x.dtype)
    sums: Callable[[Tensor, Tensor, int], Tensor]
    if size <= PRODUCT_SIZE:
        # Not kept for other devices: a CUDA graph that is captured must hold what makes it.
        draw = _kept_matrices if x.device.type == "cpu" else _matrices
        sums, drawn = _by_product, draw(x.shape[2], groups, size, key, dtype, x.device)
    else:
        sums, drawn = _by_addition, _signs_of(x.shape[2], key, dtype, x.device).chunk(groups)
    row = x.shape[1] * x.shape[2] * dtype.itemsize
    chunk = len(x) if x.dtype == dtype else max(1, CHUNK_BYTES // row)
    for x_group, y_group, signs_group in zip(x.chunk(groups, 2), y.chunk(groups, 2), drawn, strict=True):
        for x_part, y_part in zip(x_group.split(chunk), y_group.split(chunk), strict=True):
            y_part.copy_(sums(x_part.to(dtype), signs_group, size))


def _signs_of(channels: int, key: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return signs(torch.arange(channels, dtype=torch.int64, device=device), key).to(dtype)


def _matrices(
    channels: int, groups: int, size: int, key: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Return R (C/groups,size) for each group."""
    numbers = torch.arange(channels, dtype=torch.int64, device=device)
    buckets = numbers.remainder_(channels // groups).remainder_(size)
    r = torch.zeros((channels, size), dtype=dtype, device=device)
    r.scatter_(1, buckets.unsqueeze(1), _signs_of(channels, key, dtype, device).unsqueeze(1))
    return r.chunk(groups)


_kept_matrices = lru_cache(maxsize=32)(_matrices)


def _by_product(x: Tensor, r: Tensor, size: int) -> Tensor:
    """Return x R for x (N,P,C); in memory channels lie as in x."""
    return x @ r if x.stride(2) == 1 else (r.T @ x.mT).mT


def _by_addition(x: Tensor, sign: Tensor, size: int) -> Tensor:
    """Return the sum of the slices of `size` channels of x (N,P,C), each with its signs."""
    total = x.new_zeros((*x.shape[:-1], size))
    for part, part_sign in zip(x.split(size, 2), sign.split(size), strict=True):
        total[..., : len(part_sign)].addcmul_(part, part_sign)
    return total
