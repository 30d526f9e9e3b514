"""Damped solve of symmetric positive definite systems by torch.linalg."""

import math

import torch
from torch import Tensor


def solve(k: Tensor, damping: Tensor, rhs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x = (k + damping I)^-1 rhs for k (..., N, N), and info (...) as the public function does."""
    n = k.shape[-1]
    if k.numel() == 0:
        return k.new_empty(k.shape[:-1]), k.new_zeros(k.shape[:-2], dtype=torch.int32)
    shifted = k.tril()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
    lower, info = torch.linalg.cholesky_ex(shifted)
    # LAPACK does not promise to notice infinities, so the first row that is not finite counts as a failure.
    minors = torch.arange(1, n + 1, dtype=torch.int32, device=k.device)
    first_not_finite = minors.where(~shifted.isfinite().all(-1), n + 1).amin(-1)
    info = torch.minimum(info.where(info > 0, n + 1), first_not_finite)
    solved = info > n
    if rhs is None:
        rhs = torch.ones_like(k[..., 0])
    x = torch.cholesky_solve(rhs[..., None], lower)[..., 0]
    return x.where(solved[..., None], math.nan), info.where(~solved, 0)
