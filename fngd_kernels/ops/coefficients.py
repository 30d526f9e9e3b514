"""From Gram matrices to the weight of every sample: one damped solve per layer."""

import torch
from torch import Tensor

from ..arguments import choice, non_negative
from .checks import check_matrices
from .registration import LIBRARY, call, register
from .solve import solve, suits_native

DAMPING_MODES = ("trace", "mean_eig", "absolute")
NORMALIZATIONS = ("mean", "lambda", "raw", "graft")
RAISES = 3
"""How often the damping of a matrix that could not be solved is raised."""

LIBRARY.define(
    "coefficients(Tensor k, float damping, str damping_mode, str normalize) -> (Tensor s, Tensor info)"
)


def coefficients(
    k: Tensor, damping: float, damping_mode: str = "trace", normalize: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Return the weights s of the samples in the natural gradient sum_n s_n C_n, one row per layer.

    With g_n = N C_n and F = (1/N) sum_n g_n g_n^T, (F + lam I)^-1 gbar = sum_n v_n C_n, (lam I + N K) v = 1.
    s is v up to scale: `mean` v / mean(v); `lambda` lam v; `raw` v; `graft` v of the plain gradient's length.

    k: (L, N, N) float32 or float64, K_ij = <C_i, C_j> of each layer; the upper triangle has no influence
    damping: lam in the unit of damping_mode: `trace` tr(K') / N, `mean_eig` tr(K') / N^2, `absolute` 1,
        with K' = N^2 K the Gram matrix of the g_n; a finite number >= 0
    normalize: one of NORMALIZATIONS

    Returns: s (L, N) in k's dtype, not differentiable, and info (L,) int32:
        0: solved
        -r: solved after the damping was raised r times, tenfold each time and first to 10 N eps tr(K) or
            more: what rounding made indefinite; orders that go to torch.linalg on a GPU are tried once
        Elsewhere s is 1, and info is
        j <= N: the leading minor of order j of the damped matrix is not positive definite or not finite
        N + 1: tr(K) is not positive and finite, mean(v) <= 0, or s is not finite
        N + 2: tr(K) is zero, or below N tiny / eps, where K's elements underflow
    Raises: ValueError, TypeError when shape or dtype do not fit, or an argument is not one of those named.
    Source: Ou et al. 2024 (arXiv 2403.03473), Sherman-Morrison-Woodbury in push-through form.
    """
    damping = check_arguments(k, damping, damping_mode, normalize, "(L, N, N)")
    run = torch.ops.fngd.coefficients.default if suits_native(k) else _coefficients_library
    return call(run, k, damping, damping_mode, normalize)


def check_arguments(
    k: Tensor, damping: float, damping_mode: str, normalize: str, shape: str = "(..., N, N)"
) -> float:
    """Require Gram matrices k of the shape named and what is done with them; return the damping."""
    check_matrices(k, shape)
    choice("damping_mode", damping_mode, DAMPING_MODES)
    choice("normalize", normalize, NORMALIZATIONS)
    return non_negative("damping", damping, torch.finfo(k.dtype).max)


def _coefficients_library(
    k: Tensor, damping: float, damping_mode: str, normalize: str
) -> tuple[Tensor, Tensor]:
    """Compute with torch's operators; native kernels registered for a device take precedence over this."""
    samples = k.shape[-1]
    if k.numel() == 0:
        return k.new_empty(k.shape[:-1]), k.new_zeros(k.shape[:1], dtype=torch.int32)
    trace = k.diagonal(dim1=-2, dim2=-1).sum(-1)
    numbers = torch.finfo(k.dtype)
    small = (trace >= 0) & (trace < samples * (numbers.tiny / numbers.eps))
    usable = (trace > 0) & torch.isfinite(trace) & ~small
    trace = torch.where(usable, trace, 1)
    # Solved for K / tr(K), so that neither the size of the gradient nor a loss scale reaches the Cholesky.
    k = k / trace[:, None, None]
    relative = {
        "trace": torch.full_like(trace, damping),
        "mean_eig": torch.full_like(trace, damping / samples),
        "absolute": damping / (samples * trace),
    }[damping_mode]
    s, info = _attempt(k, relative, trace, normalize)
    for raises in range(1, RAISES + 1):
        failed = usable & (info > 0)
        # Looking would make the host wait for a GPU, and break a compiled graph.
        if k.device.type != "cpu" or torch.compiler.is_compiling() or not failed.any():
            break
        relative = torch.where(failed, 10 * relative.clamp(min=samples * numbers.eps), relative)
        again, code = _attempt(k, relative, trace, normalize)
        s = torch.where(failed[:, None], again, s)
        info = torch.where(failed, torch.where(code == 0, -raises, code), info)
    info = torch.where(usable, info, torch.where(small, samples + 2, samples + 1).int())
    return torch.where((info <= 0)[:, None], s, 1), info


def _attempt(k: Tensor, relative: Tensor, trace: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """Solve for K / tr(K) with the damping `relative` to tr(K), and scale; info is 0 where that succeeded."""
    samples = k.shape[-1]
    x, info = solve(k, relative, return_info=True)
    mean = x.mean(-1)
    if normalize == "mean":
        s = x / mean[:, None]
    elif normalize == "lambda":
        s = x * relative[:, None]
    elif normalize == "raw":
        s = x / samples / trace[:, None]  # their product may overflow
    else:
        full = k.tril() + k.tril(-1).mT
        plain, natural = full.sum((-2, -1)), torch.einsum("li,lij,lj->l", x, full, x)
        s = x * (plain / natural).sqrt()[:, None]
    accepted = (mean > 0) & torch.isfinite(mean) & torch.isfinite(s).all(-1)
    return s, torch.where((info > 0) | accepted, info, samples + 1)


def _coefficients_fake(k: Tensor, damping: float, damping_mode: str, normalize: str) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape[:-1]), k.new_empty(k.shape[:1], dtype=torch.int32)


register("coefficients", _coefficients_library, _coefficients_fake)
