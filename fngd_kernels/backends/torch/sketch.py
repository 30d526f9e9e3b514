"""Random signs, and the sums of channels that they make."""

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


@lru_cache(maxsize=64)
def _signs_on_cpu(count: int, key: int) -> Tensor:
    return signs(torch.arange(count), key)


def sketch(x: Tensor, groups: int, size: int, key: int, y: Tensor) -> None:
    """Write x (N,P,C), its channels compressed within groups, to y (N,P,groups * size)."""
    samples, positions, channels = x.shape
    dtype = accumulation_dtype(x.dtype)
    on_cpu = x.device.type == "cpu"
    drawn = _signs_on_cpu(channels, key) if on_cpu else signs(torch.arange(channels, device=x.device), key)
    drawn = drawn.to(dtype).split(channels // groups)
    sums = _by_product if size <= PRODUCT_SIZE else _by_addition
    row = positions * channels * dtype.itemsize
    chunk = samples if x.dtype == dtype else max(1, CHUNK_BYTES // row)
    for x_some, y_some in zip(x.split(chunk), y.split(chunk), strict=True):
        parts = (x_some.split(channels // groups, 2), y_some.split(size, 2), drawn)
        for x_part, y_part, sign in zip(*parts, strict=True):
            y_part.copy_(sums(x_part.to(dtype), sign, size))


def _by_product(x: Tensor, sign: Tensor, size: int) -> Tensor:
    """Return x R, with R (C,size) the matrix of signs, for x (N,P,C); in memory channels lie as in x."""
    buckets = torch.arange(len(sign), device=x.device).remainder_(size).unsqueeze(1)
    r = sign.new_zeros((len(sign), size)).scatter_(1, buckets, sign.unsqueeze(1))
    return x @ r if x.stride(2) == 1 else (r.T @ x.mT).mT


def _by_addition(x: Tensor, sign: Tensor, size: int) -> Tensor:
    """Return the sum of the slices of `size` channels of x (...,C), each with its signs."""
    total = x.new_zeros((*x.shape[:-1], size))
    for part, part_sign in zip(x.split(size, -1), sign.split(size), strict=True):
        total[..., : len(part_sign)].addcmul_(part, part_sign)
    return total
