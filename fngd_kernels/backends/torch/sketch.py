"""Random signs, and the sums of channels that they make."""

import torch
from torch import Tensor

from .costs import CHUNK_BYTES
from .products import accumulation_dtype

PRODUCT_SIZE = 64
"""Up to so many buckets a matrix product with the signs is as fast as reading the channels."""


def signs(channels: Tensor, key: int, dtype: torch.dtype) -> Tensor:
    """Return 1 or -1 for each number of a channel: the highest bit of MurmurHash3's last step."""
    x = channels.long() * 0x9E3779B1
    x = (x.add_(key)).bitwise_and_(0xFFFFFFFF)
    x = x.bitwise_xor_(x >> 16).mul_(0x85EBCA6B).bitwise_and_(0xFFFFFFFF)
    x = x.bitwise_xor_(x >> 13).mul_(0xC2B2AE35).bitwise_and_(0xFFFFFFFF)
    return (1 - 2 * (x >> 31)).to(dtype)


def sketch(x: Tensor, channel: int, groups: int, size: int, key: int) -> Tensor:
    """Return x with dimension `channel` compressed to groups * size, innermost in memory."""
    rows = x.movedim(channel, -1)
    inputs = rows.shape[-1] // groups
    dtype = accumulation_dtype(x.dtype)
    drawn = signs(torch.arange(rows.shape[-1], device=x.device), key, dtype).split(inputs)
    sums = _by_product if size <= PRODUCT_SIZE else _by_addition
    y = rows.new_empty((*rows.shape[:-1], groups * size))
    chunk = len(x) if x.dtype == dtype else max(1, CHUNK_BYTES * len(x) // (dtype.itemsize * x.numel() + 1))
    for some, into in zip(rows.split(chunk), y.split(chunk), strict=True):
        parts = zip(some.split(inputs, -1), into.split(size, -1), drawn, strict=True)
        for part, target, sign in parts:
            target.copy_(sums(part.to(dtype), sign, size))
    return y.movedim(-1, channel)


def _by_product(x: Tensor, sign: Tensor, size: int) -> Tensor:
    """Return x R, with R (C,size) the matrix of signs, for x (...,C)."""
    buckets = torch.arange(len(sign), device=x.device).remainder_(size).unsqueeze(1)
    return x @ sign.new_zeros((len(sign), size)).scatter_(1, buckets, sign.unsqueeze(1))


def _by_addition(x: Tensor, sign: Tensor, size: int) -> Tensor:
    """Return the sums of the slices of `size` channels of x (...,C), each with its signs."""
    total = x.new_zeros((*x.shape[:-1], size))
    for part, part_sign in zip(x.split(size, -1), sign.split(size), strict=True):
        total[..., : len(part_sign)].addcmul_(part, part_sign)
    return total
