"""From Gram matrices to the weight of every sample, and the table in which samples keep their weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fngd_kernels import solve

DAMPING_MODES = ("trace", "mean_eig", "absolute")
NORMALIZATIONS = ("mean", "lambda", "raw", "graft")
SHARES = ("sample", "position", "mean", "none")


def coefficients(k: Tensor, damping: float, damping_mode: str, normalize: str) -> tuple[Tensor, Tensor]:
    """Return the weights s of the samples in the natural gradient sum_n s_n C_n, one row per layer.

    With g_n = N C_n and F = (1/N) sum_n g_n g_n^T, (F + lam I)^-1 gbar = sum_n v_n C_n where
    (lam I + N K) v = 1. s is v up to scale:
    `mean` v / mean(v); `lambda` lam v; `raw` v; `graft` v scaled to keep the plain gradient's length.

    k: (L, N, N), K_ij = <C_i, C_j> of each layer.
    damping: lam over its unit, which is tr(K') / N (`trace`), tr(K') / N^2 (`mean_eig`) or 1 (`absolute`)
        with K' = N^2 K the Gram matrix of the g_n.

    Returns:
        s (L, N) in k's dtype, 1 for every sample of a layer whose solve failed (not finite, not positive
        definite, or mean(v) <= 0), and solved (L,) bool. A layer whose gradient is zero has s = 1 and is
        solved.

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
        plain = k.sum((-2, -1))
        natural = torch.einsum("li,lij,lj->l", x, k, x)
        s = x * (plain / natural).sqrt()[:, None]
        solved &= torch.isfinite(s).all(-1)
    return torch.where((solved & ~zero)[:, None], s, 1), solved | zero


class Table:
    """The weight that each sample keeps in each layer: (layers, size) fp32, 1 until it was solved for.

    For share = "position" the columns are batch positions and for "mean" there is one; these hold means over
    the
    solving batches. `seen` lies on the CPU, so that choosing the phase of a batch needs no synchronisation.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.values = torch.ones(layers, 0, device=device)
        self.averaged = torch.zeros(layers, 0, device=device)  # how many batches each mean holds
        self.seen = torch.zeros(0, dtype=torch.bool)

    def __len__(self) -> int:
        return self.values.shape[1]

    def grow(self, size: int) -> None:
        """Make room for columns 0 to size - 1, unseen."""
        missing = size - len(self)
        if missing > 0:
            self.values = torch.nn.functional.pad(self.values, (0, missing), value=1.0)
            self.seen = torch.nn.functional.pad(self.seen, (0, missing), value=False)

    def forget(self) -> None:
        """Mark every column unseen; its weights stay until the next solve replaces them."""
        self.seen.zero_()
        self.averaged.zero_()

    def knows(self, ids: Tensor) -> bool:
        """Return whether every id (N,), on the CPU, was solved for."""
        return bool(self.seen[ids].all())

    def gather(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return the weights (N,) of the samples, one tensor per layer."""
        return self.values.index_select(1, ids.to(self.values.device, non_blocking=True)).unbind(0)

    def record(self, ids: Tensor, layers: Sequence[int], s: Tensor) -> None:
        """Keep s (len(layers), N) as the weights of the samples ids (N,) in these layers."""
        rows = torch.tensor(layers, device=self.values.device)
        self.values[rows[:, None], ids.to(self.values.device)] = s.to(self.values)
        self.seen[ids] = True

    def average(self, layers: Sequence[int], s: Tensor) -> None:
        """Take s (len(layers), N) into the means of columns 0 to N - 1 in these layers."""
        columns = s.shape[1]
        self.grow(columns)
        self.averaged = torch.nn.functional.pad(self.averaged, (0, len(self) - self.averaged.shape[1]))
        rows = torch.tensor(layers, device=self.values.device)
        self.averaged[rows, :columns] += 1
        means = self.values[rows, :columns]
        self.values[rows, :columns] = means + (s.to(means) - means) / self.averaged[rows, :columns]
