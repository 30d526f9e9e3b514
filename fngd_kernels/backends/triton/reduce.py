"""Sum of partial Gram matrices in fixed order."""

from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from .common import capability
from .tiles import tile


@triton.jit(do_not_specialize=["parts"])
def _sum_partials_kernel(
    PARTIAL,
    K,
    parts,
    n,
    stride_pp,
    stride_pl,
    stride_pn,
    stride_kl,
    stride_kn,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    pid_i, pid_j, pid_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if pid_j > pid_i:
        return
    offs_i = (pid_i * BN + tl.arange(0, BN)).to(tl.int64)
    offs_j = (pid_j * BN + tl.arange(0, BN)).to(tl.int64)
    # Above the diagonal, numbers are undefined or were rounded differently.
    lower = (offs_i[:, None] >= offs_j[None, :]) & (offs_i < n)[:, None]
    K += pid_layer * stride_kl
    block = PARTIAL + pid_layer * stride_pl + offs_i[:, None] * stride_pn + offs_j[None, :]
    acc = tl.zeros([BN, BN], dtype=tl.float32)
    for start in range(0, parts, BP):
        offs_p = (start + tl.arange(0, BP)).to(tl.int64)
        mask = (offs_p < parts)[:, None, None] & lower[None, :, :]
        some = tl.load(
            block[None, :, :] + offs_p[:, None, None] * stride_pp, mask=mask, other=0
        )  # [BP, BN, BN]
        acc += tl.sum(some, 0)
    tl.store(K + offs_i[:, None] * stride_kn + offs_j[None, :], acc, mask=lower)
    tl.store(K + offs_j[None, :] * stride_kn + offs_i[:, None], acc, mask=lower)


def sum_partials(partial: Tensor) -> Tensor:
    """Return the symmetric K = sum_p partial_p for the lower triangles of partial float32.

    Reads 4 P N^2 / 2 bytes of each layer. A single partial sum is made symmetric in place.

    Args:
        partial: (P,N,N), or (P,L,N,N) of L layers.

    Returns:
        K, (N,N) or (L,N,N).
    """
    if partial.ndim == 3:
        return sum_partials(partial.unsqueeze(1))[0]
    parts, layers, n, _ = partial.shape
    k = partial[0] if parts == 1 else partial.new_empty((layers, n, n))
    chosen = tile("sum_partials", capability(partial.device), partial.itemsize)
    grid = ceil(n / chosen.blocks["BN"])
    _sum_partials_kernel[(grid, grid, layers)](
        PARTIAL=partial,
        K=k,
        parts=parts,
        n=n,
        stride_pp=partial.stride(0),
        stride_pl=partial.stride(1),
        stride_pn=partial.stride(2),
        stride_kl=k.stride(0),
        stride_kn=k.stride(1),
        **chosen.launch,
    )
    return k
