"""Damped normal equations without their matrix: conjugate gradients with a Nystroem preconditioner."""

from collections.abc import Callable

import torch
from torch import Tensor

from .direct import Solve
from .jacobian import Jacobian
from .ranks import Ranks

RANK = 100
"""Of the approximation, which takes as many products with J and J^T."""
MAX_ITERATIONS = 500
SEED = 0
"""Of the sketch, the same on all ranks."""

Product = Callable[[Tensor], Tensor]


class Nystroem:
    """G ~ U diag(s) U^T of low rank, from a random sketch of a positive semidefinite G (n, n).

    Its damped inverse preconditions G + lam I for every lam:
        x -> U diag((s_r + lam) / (s + lam)) U^T x + x - U U^T x,  s_r the smallest of s

    Source: Frangella, Tropp, Udell, "Randomized Nystroem preconditioning" (arXiv 2110.02820).
    """

    def __init__(self, product: Product, n: int, device: torch.device, rounding: float) -> None:
        """Sketch G by its products with (n, K); `rounding` is the relative error of these."""
        generator = torch.Generator(device="cpu").manual_seed(SEED)
        gaussian = torch.randn((n, min(RANK, n)), dtype=torch.float64, device="cpu", generator=generator)
        directions = torch.linalg.qr(gaussian.to(device)).Q
        sketch = product(directions)
        core = directions.T @ sketch
        eigenvalues, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = eigenvalues > 100 * rounding * eigenvalues[-1]
        root = sketch @ (vectors[:, kept] * eigenvalues[kept].rsqrt())
        self._u, singular, _ = torch.linalg.svd(root, full_matrices=False)
        self._s = singular.square()

    def damped_inverse(self, lam: float) -> Product:
        """Return the preconditioner of G + lam I."""
        shrunk = (self._s[-1:].sum() + lam) / (self._s + lam) - 1
        return lambda x: x + self._u @ (shrunk * (self._u.T @ x))


class IterativeSystem:
    """J^T J + lam I, or J J^T + lam I where that is smaller, by products with J and J^T.

    A solution x is good enough where its residual is at most `tolerance` lam |x|: it is then the exact
    solution for a damping that differs by no more than `tolerance`, relatively.
    """

    def __init__(self, jacobian: Jacobian, ranks: Ranks, tolerance: float) -> None:
        self._jacobian, self._ranks, self._tolerance = jacobian, ranks, tolerance
        rows, columns = jacobian.shape
        self._by_sample = ranks.alone and rows < columns
        self._n = rows if self._by_sample else columns
        self.squared_norm = float(ranks.sum(jacobian.squared_norm()))
        self._preconditioner: Nystroem | None = None
        self.iterations = 0

    def damped(self, lam: float) -> Solve:
        """Return the solve for lam > 0."""
        if self._preconditioner is None:
            with torch.profiler.record_function("GaussNewton.precondition"):
                device = self._jacobian.residuals.device
                self._preconditioner = Nystroem(self._product, self._n, device, self._jacobian.rounding)
        inverse = self._preconditioner.damped_inverse(lam)

        def solve(r: Tensor) -> Tensor:
            with torch.profiler.record_function("GaussNewton.solve"):
                right = r if self._by_sample else self._transposed_times(r)
                x = self._conjugate_gradients(right, lam, inverse)
                return self._transposed_times(x) if self._by_sample else x

        return solve

    def _product(self, x: Tensor) -> Tensor:
        if self._by_sample:
            return self._jacobian.times(self._jacobian.transposed_times(x))
        return self._transposed_times(self._jacobian.times(x))

    def _transposed_times(self, y: Tensor) -> Tensor:
        return self._ranks.sum(self._jacobian.transposed_times(y))

    def _conjugate_gradients(self, right: Tensor, lam: float, inverse: Product) -> Tensor:
        """Return x of (G + lam I) x = right, from 0 on: each iterate lowers the quadratic model."""
        x, r = torch.zeros_like(right), right.clone()
        z = inverse(r)
        p, rz = z, float(r @ z)
        for _ in range(MAX_ITERATIONS):
            if not rz > 0:
                break
            q = self._product(p) + lam * p
            alpha = rz / float(p @ q)
            x += alpha * p
            r -= alpha * q
            self.iterations += 1
            if float(r.norm()) <= self._tolerance * lam * float(x.norm()):
                break
            z = inverse(r)
            rz, last = float(r @ z), rz
            p = z + (rz / last) * p
        return x
