"""Damped normal equations without their matrix: conjugate gradients with a Nystroem preconditioner."""

from collections.abc import Callable

import torch
from torch import Tensor

from .direct import Solve
from .jacobian import Jacobian
from .ranks import Ranks

FEW_ITERATIONS = 10
"""A solve of no more is well preconditioned."""
FIRST_RANK, LARGEST_RANK = 16, 256
MAX_ITERATIONS = 500
SEED = 0
"""Of sketches, the same on all ranks."""

Product = Callable[[Tensor], Tensor]


class Preconditioner:
    """G ~ U diag(s) U^T of low rank, from sketches of positive semidefinite G (n, n), step by step.

    Its damped inverse preconditions G + lam I for every lam,
        x -> U diag((s_r + lam) / (s + lam)) U^T x + x - U U^T x,  s_r the smallest of s.

    A sketch costs as many products with G as it has directions. It is renewed, with twice as many, once
    solves have taken that many iterations more than a few; the last one's directions are among the new.

    Source: Frangella, Tropp, Udell, "Randomized Nystroem preconditioning" (arXiv 2110.02820).
    """

    def __init__(self) -> None:
        self._u = torch.empty((0, 0), dtype=torch.float64, device="cpu")
        self._s = torch.empty((0,), dtype=torch.float64, device="cpu")
        self._excess = 0
        self._generator = torch.Generator(device="cpu").manual_seed(SEED)

    def count(self, iterations: int) -> None:
        """Take note of how many iterations a solve took."""
        self._excess += max(0, iterations - FEW_ITERATIONS)

    def damped_inverse(self, lam: float, product: Product, like: Tensor, rounding: float) -> Product:
        """Return the preconditioner of G + lam I.

        Args:
            lam: The damping.
            product: Returns G x (n, K) for x (n, K).
            like: A vector (n,).
            rounding: The relative error of the products.
        """
        if len(self._u) != len(like) or self._u.device != like.device:
            self._u, self._s = like.new_empty((len(like), 0)), like.new_empty(0)
        rank = min(max(FIRST_RANK, 2 * len(self._s)), LARGEST_RANK, len(like))
        if self._excess >= rank:
            with torch.profiler.record_function("GaussNewton.precondition"):
                self._sketch(product, rank, rounding)
            self._excess = 0
        u, s = self._u, self._s
        shrunk = (s[-1:].sum() + lam) / (s + lam) - 1
        return lambda x: x + u @ (shrunk * (u.T @ x))

    def _sketch(self, product: Product, rank: int, rounding: float) -> None:
        n, known = self._u.shape
        gaussian = torch.randn(
            (n, rank - known), dtype=torch.float64, generator=self._generator, device="cpu"
        )
        directions = torch.linalg.qr(torch.cat([self._u, gaussian.to(self._u)], 1)).Q
        sketch = product(directions)
        core = directions.T @ sketch
        eigenvalues, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = eigenvalues > 100 * rounding * eigenvalues[-1]
        root = sketch @ (vectors[:, kept] * eigenvalues[kept].rsqrt())
        self._u, singular, _ = torch.linalg.svd(root, full_matrices=False)
        self._s = singular.square()


class IterativeSystem:
    """J^T J + lam I, or J J^T + lam I where that is smaller, by products with J and J^T.

    A solution x is good enough where its residual is at most `tolerance` lam |x|: it is then the exact
    solution for a damping that differs by no more than `tolerance`, relatively.
    """

    def __init__(
        self, jacobian: Jacobian, ranks: Ranks, tolerance: float, preconditioner: Preconditioner
    ) -> None:
        self._jacobian, self._ranks, self._tolerance = jacobian, ranks, tolerance
        rows, columns = jacobian.shape
        self._by_sample = ranks.alone and rows < columns
        self.squared_norm = float(ranks.sum(jacobian.squared_norm()))
        self._preconditioner = preconditioner
        self.iterations = 0

    def damped(self, lam: float) -> Solve:
        """Return the solve for lam > 0."""

        def solve(r: Tensor) -> Tensor:
            right = r if self._by_sample else self._transposed_times(r)
            inverse = self._preconditioner.damped_inverse(lam, self._product, right, self._jacobian.rounding)
            with torch.profiler.record_function("GaussNewton.solve"):
                x, iterations = self._conjugate_gradients(right, lam, inverse)
            self._preconditioner.count(iterations)
            self.iterations += iterations
            return self._transposed_times(x) if self._by_sample else x

        return solve

    def _product(self, x: Tensor) -> Tensor:
        if self._by_sample:
            return self._jacobian.times(self._jacobian.transposed_times(x))
        return self._transposed_times(self._jacobian.times(x))

    def _transposed_times(self, y: Tensor) -> Tensor:
        return self._ranks.sum(self._jacobian.transposed_times(y))

    def _conjugate_gradients(self, right: Tensor, lam: float, inverse: Product) -> tuple[Tensor, int]:
        """Return x of (G + lam I) x = right and the iterations: each of them lowers the quadratic model."""
        x, r = torch.zeros_like(right), right.clone()
        z = inverse(r)
        p, rz = z, float(r @ z)
        iterations = 0
        while rz > 0 and iterations < MAX_ITERATIONS:
            q = self._product(p) + lam * p
            alpha = rz / float(p @ q)
            x += alpha * p
            r -= alpha * q
            iterations += 1
            if float(r.norm()) <= self._tolerance * lam * float(x.norm()):
                break
            z = inverse(r)
            rz, last = float(r @ z), rz
            p = z + (rz / last) * p
        return x, iterations
