"""From Gram matrices to coefficients with torch's operators."""

import torch
from torch import Tensor

from .solve import solve

RAISES = 3
"""How often the damping of a matrix that could not be solved is raised."""


def coefficients(k: Tensor, alpha: float, beta: float, normalize: str) -> tuple[Tensor, Tensor]:
    """Return s (L, N) and info (L,) for k (L, N, N), as the public function does."""
    samples = k.shape[-1]
    if k.numel() == 0:
        return k.new_empty(k.shape[:-1]), k.new_zeros(k.shape[:1], dtype=torch.int32)
    trace = k.diagonal(dim1=-2, dim2=-1).sum(-1)
    numbers = torch.finfo(k.dtype)
    small = (trace >= 0) & (trace < samples * (numbers.tiny / numbers.eps))
    usable = (trace > 0) & torch.isfinite(trace) & ~small
    trace = torch.where(usable, trace, 1)
    # K / tr(K) is solved for, so that neither the size of the gradient nor a loss scale influences the
    # Cholesky.
    k = k / trace[:, None, None]
    relative = alpha + beta / trace
    s, info = _attempt(k, relative, trace, normalize)
    for raises in range(1, RAISES + 1):
        failed = usable & (info > 0)
        # On a GPU, the host would have to wait for the answer.
        if k.device.type != "cpu" or not failed.any():
            break
        relative = torch.where(failed, 10 * relative.clamp(min=samples * numbers.eps), relative)
        again, code = _attempt(k, relative, trace, normalize)
        s = torch.where(failed[:, None], again, s)
        info = torch.where(failed, torch.where(code == 0, -raises, code), info)
    info = torch.where(usable, info, torch.where(small, samples + 2, samples + 1).int())
    return torch.where((info <= 0)[:, None], s, 1), info


def _attempt(k: Tensor, relative: Tensor, trace: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """Solve for k = K / tr(K) with the damping `relative`, and scale; info is 0 where that succeeded."""
    samples = k.shape[-1]
    x, info = solve(k, relative, None)
    mean = x.mean(-1)
    if normalize == "mean":
        s = x / mean[:, None]
    elif normalize == "lambda":
        s = x * relative[:, None]
    elif normalize == "raw":
        # In two steps, because the product of both divisors may overflow.
        s = x / samples / trace[:, None]
    else:
        full = k.tril() + k.tril(-1).mT
        plain, natural = full.sum((-2, -1)), torch.einsum("li,lij,lj->l", x, full, x)
        s = x * (plain / natural).sqrt()[:, None]
    accepted = (mean > 0) & torch.isfinite(mean) & torch.isfinite(s).all(-1)
    return s, torch.where((info > 0) | accepted, info, samples + 1)
