"""From Gram matrices to the weight of every sample: one damped solve per layer."""

import torch
from torch import Tensor

from fngd_kernels import solve

DAMPING_MODES = ("trace", "mean_eig", "absolute")
NORMALIZATIONS = ("mean", "lambda", "raw", "graft")


def coefficients(k: Tensor, damping: float, damping_mode: str, normalize: str) -> tuple[Tensor, Tensor]:
    """Return the weights s of the samples in the natural gradient sum_n s_n C_n, one row per layer.

    With g_n = N C_n and F = (1/N) sum_n g_n g_n^T, (F + lam I)^-1 gbar = sum_n v_n C_n, (lam I + N K) v = 1.
    s is v up to scale: `mean` v / mean(v); `lambda` lam v; `raw` v; `graft` v of the plain gradient's length.

    k: (L, N, N) float32 or float64, K_ij = <C_i, C_j> of each layer
    damping: lam in the unit of damping_mode: `trace` tr(K') / N, `mean_eig` tr(K') / N^2, `absolute` 1,
        with K' = N^2 K the Gram matrix of the g_n
    normalize: one of NORMALIZATIONS

    Returns: s (L, N) in k's dtype, and solved (L,) bool. s is 1 where the solve failed: K not finite or not
        positive definite, or mean(v) <= 0. A zero gradient counts as solved, with s = 1.
    Source: Ou et al. 2024 (arXiv 2403.03473), Sherman-Morrison-Woodbury in push-through form.
    """
    samples = k.shape[-1]
    trace = k.diagonal(dim1=-2, dim2=-1).sum(-1)
    zero = trace == 0
    trace = torch.where(zero, 1, trace)
    # Solved for K / tr(K), so that neither the size of the gradient nor a loss scale reaches the Cholesky.
    relative = {
        "trace": torch.full_like(trace, damping),
        "mean_eig": torch.full_like(trace, damping / samples),
        "absolute": damping / (samples * trace),
    }[damping_mode]
    x, info = solve(k / trace[:, None, None], relative, return_info=True)
    mean = x.mean(-1)
    solved = (info == 0) & torch.isfinite(x).all(-1) & torch.isfinite(trace) & (mean > 0)
    if normalize == "mean":
        s = x / mean[:, None]
    elif normalize == "lambda":
        s = x * relative[:, None]
    elif normalize == "raw":
        s = x / (samples * trace[:, None])
    else:
        plain, natural = k.sum((-2, -1)), torch.einsum("li,lij,lj->l", x, k, x)
        s = x * (plain / natural).sqrt()[:, None]
    solved &= torch.isfinite(s).all(-1)
    return torch.where((solved & ~zero)[:, None], s, 1), solved | zero
