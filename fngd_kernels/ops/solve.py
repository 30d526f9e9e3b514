"""Damped solve of symmetric positive definite systems, batched."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from .. import native
from ..arguments import flag
from .checks import check_solve
from .registration import LIBRARY, call, register

NATIVE_MAX_ORDER = {"cpu": 2048, "cuda": 1024}
"""Larger matrices go to torch.linalg, which puts the whole device on one matrix; the native kernels put one
core or one thread block."""

LIBRARY.define("solve(Tensor k, Tensor damping, Tensor? rhs, bool refine=False) -> (Tensor x, Tensor info)")


@overload
def solve(
    k: Tensor,
    damping: float | Tensor,
    rhs: Tensor | None = ...,
    *,
    refine: bool = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...
@overload
def solve(
    k: Tensor,
    damping: float | Tensor,
    rhs: Tensor | None = ...,
    *,
    refine: bool = ...,
    return_info: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def solve(
    k: Tensor,
    damping: float | Tensor,
    rhs: Tensor | None = None,
    *,
    refine: bool = False,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Solve damped symmetric positive definite systems.

    x = (k + damping I)^-1 rhs

    k: (..., N, N) float32 or float64, symmetric, any strides; the upper triangle has no influence
    damping: a finite number >= 0, or (...) of k's dtype, one per matrix
    rhs: (..., N) of k's dtype, ones by default
    refine: whether to correct x once by its residual, summed in float64; for float32 and small damping
    return_info: whether to return info beside x

    Returns: (..., N), x; with return_info also info (...) int32: 0 where solved, j > 0 where the leading
        minor of order j is not positive definite or not finite. There x is NaN; nothing is raised, and the
        other matrices are not affected. x is not differentiable: `fngd_kernels.reference` is.
    Raises: ValueError, TypeError when shapes, devices or dtypes do not fit, or the damping is negative.
    Source: the Woodbury form of the damped empirical Fisher, Ou et al. 2024 (arXiv 2403.03473).
    """
    damping = check_solve(k, damping, rhs)
    flag("refine", refine)
    flag("return_info", return_info)
    run = torch.ops.fngd.solve.default if suits_native(k) else _solve_library
    x, info = call(run, k, damping, rhs, refine)
    return (x, info) if return_info else x


def suits_native(k: Tensor) -> bool:
    """Return whether matrices of this order are left to the native kernel, where their device has one."""
    return k.shape[-1] <= NATIVE_MAX_ORDER.get(k.device.type, 0)


def _solve_library(
    k: Tensor, damping: Tensor, rhs: Tensor | None, refine: bool = False
) -> tuple[Tensor, Tensor]:
    """Solve with torch.linalg; native kernels registered for a device take precedence over this."""
    n = k.shape[-1]
    if k.is_cuda and suits_native(k):
        native.warn_of_missing_cuda()
    if k.numel() == 0:
        return k.new_empty(k.shape[:-1]), k.new_zeros(k.shape[:-2], dtype=torch.int32)
    shifted = k.tril()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
    lower, info = torch.linalg.cholesky_ex(shifted)
    # LAPACK does not promise to notice infinities: the first row that is not finite fails as well.
    minors = torch.arange(1, n + 1, dtype=torch.int32, device=k.device)
    first_not_finite = minors.where(~shifted.isfinite().all(-1), n + 1).amin(-1)
    info = torch.minimum(info.where(info > 0, n + 1), first_not_finite)
    solved = info > n
    if rhs is None:
        rhs = torch.ones_like(k[..., 0])
    x = torch.cholesky_solve(rhs[..., None], lower)[..., 0]
    if refine:
        full, wide = k.tril().double() + k.tril(-1).mT, x.double()
        residual = rhs - (full @ wide[..., None])[..., 0] - damping[..., None].double() * wide
        x = x + torch.cholesky_solve(residual.to(k.dtype)[..., None], lower)[..., 0]
    return x.where(solved[..., None], math.nan), info.where(~solved, 0)


def _solve_fake(
    k: Tensor, damping: Tensor, rhs: Tensor | None, refine: bool = False
) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape[:-1]), k.new_empty(k.shape[:-2], dtype=torch.int32)


register("solve", _solve_library, _solve_fake)
