"""Sum of partial Gram matrices in fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from .common import capability
from .tiles import tile


@triton.jit(do_not_specialize=["parts"])
def _sum_partials_kernel(
    PARTIAL, K, parts, n, stride_pp, stride_pn, stride_kn, BN: tl.constexpr, BP: tl.constexpr
):
    pid_i, pid_j = tl.program_id(0), tl.program_id(1)
    if pid_j > pid_i:
        return
    offs_i = (pid_i * BN + tl.arange(0, BN)).to(tl.int64)
    offs_j = (pid_j * BN + tl.arange(0, BN)).to(tl.int64)
    # Above the diagonal, numbers are undefined or were rounded differently.
    lower = (offs_i[:, None] >= offs_j[None, :]) & (offs_i < n)[:, None]
    block = PARTIAL + offs_i[:, None] * stride_pn + offs_j[None, :]
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
    """Return the symmetric K (N,N) = sum_p partial_p for the lower triangles of partial (P,N,N) float32.

    Reads 4 P N^2 / 2 bytes. A single partial sum is made symmetric in place.
    """
    parts, n = partial.shape[:2]
    k = partial[0] if parts == 1 else partial.new_empty((n, n))
    chosen = tile("sum_partials", capability(partial.device), partial.itemsize)
    grid = triton.cdiv(n, chosen.blocks["BN"])
    _sum_partials_kernel[(grid, grid)](
        PARTIAL=partial,
        K=k,
        parts=parts,
        n=n,
        stride_pp=partial.stride(0),
        stride_pn=partial.stride(1),
        stride_kn=k.stride(0),
        **chosen.launch,
    )
    return k
