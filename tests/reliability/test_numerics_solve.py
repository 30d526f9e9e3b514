"""Damped solves of hard Gram matrices: backward errors in float64, and when a factorisation must succeed.

The computed x solves a perturbed system (A + D) x = b exactly, |D_ij| <= c u sqrt(A_ii A_jj) with c = 3 n +
8 (Higham, Accuracy and Stability of Numerical Algorithms, theorems 10.4 to 10.7; the inverse of the
diagonal is rounded once more). Residuals are held against c u |A| |x| in maximum norms, which leaves out a
factor of up to n. A factorisation succeeds where the smallest eigenvalue of A, scaled to a unit diagonal,
exceeds n (n + 1) u, and fails where it is below minus that.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numeric_cases import DEVICES, KINDS, TINY, UNIT, Case, Worst, campaign, make

import fngd_kernels as fk
from fngd_kernels.ops import choose

DTYPES = (torch.float32, torch.float64)
ORDERS = st.sampled_from((1, 2, 3, 5, 8, 16, 31, 64, 65, 100))


def gram(kind, n, columns, exponent, seed):
    """Return K (n,n) in float64 from rows of n numbers, its mean diagonal a power of ten."""
    _, g = make(Case(kind, torch.float64, (0, 0), "contiguous", 0, seed), (n, 1), (n, columns))
    k = g @ g.T
    unit = k.diagonal().mean()
    return k / unit * 10.0**exponent if unit > 0 and unit.isfinite() else k


def smallest_scaled_eigenvalue(a):
    """Return the smallest eigenvalue of A (n,n) scaled to a unit diagonal, NaN where that is impossible."""
    diagonal = a.diagonal()
    if not a.isfinite().all() or not (diagonal > 0).all():
        return math.nan
    root = diagonal.sqrt()
    return torch.linalg.eigvalsh(a / root / root[:, None])[0].item()


def residual(a, x, b):
    """Return the largest element of |A x - b|."""
    return (a @ x - b).abs().max()


def allowed(a, x, dtype):
    """Return what theory allows of it: rounding, and what underflows."""
    n, size = len(x), a.abs().sum(1).max()
    rounding = (3 * n + 8) * UNIT[dtype] * size * x.abs().max()
    return rounding + n**2 * TINY[dtype] * (x.abs().max() + 1 + size.sqrt())


@pytest.mark.parametrize("device", DEVICES)
def test_solve(route, device, tally):
    worst = Worst()

    @campaign
    @given(
        st.sampled_from((*KINDS, "indefinite")),
        st.sampled_from(DTYPES),
        ORDERS,
        st.sampled_from((1, 10, 200)),
        st.integers(-20, 20),
        st.one_of(st.just(None), st.integers(-12, 6)),
        st.sampled_from((None, -10, 0, 10)),
        st.integers(0, 2**31),
    )
    def check(kind, dtype, n, columns, exponent, damping, rhs_exponent, seed):
        k = gram(kind, n, columns, exponent, seed)
        if kind == "indefinite":
            k = k - k.diagonal().mean()
        lam = 0.0 if damping is None else float(k.diagonal().abs().mean()) * 10.0**damping
        k, lam = k.to(dtype), torch.tensor(lam if math.isfinite(lam) else 1.0, dtype=dtype)
        rhs = None if rhs_exponent is None else k[:, 0].sign().add(0.3).mul(10.0**rhs_exponent).to(dtype)
        on_device = None if rhs is None else rhs.to(device)
        x, info = fk.solve(k.to(device), lam.to(device), on_device, return_info=True)
        x, info = x.cpu().double(), info.item()

        a = k.double() + lam.double() * torch.eye(n, dtype=torch.float64)
        b = torch.ones(n, dtype=torch.float64) if rhs is None else rhs.double()
        smallest, margin = smallest_scaled_eigenvalue(a), 2 * n * (n + 2) * UNIT[dtype]
        normal = bool(a.diagonal().abs().min() > TINY[dtype] / UNIT[dtype] ** 2)
        if smallest > margin and normal:
            assert info == 0
        if math.isnan(smallest) or smallest < -margin:
            assert info > 0
        if info:
            assert x.isnan().all()
            tally("fk.solve", kind, "info > 0, x is NaN")
            return
        largest = torch.finfo(dtype).max
        if not x.isfinite().all():
            # Only where b over the smallest pivot that rounding leaves is beyond the largest number.
            assert b.abs().max() / (a.diagonal().min() * UNIT[dtype] ** 2) > largest
            tally("fk.solve", kind, "x overflows")
            return
        error, bound = residual(a, x, b), allowed(a, x, dtype)
        worst.see(f"solve, {route}, {dtype}", error, (1 if device == "cpu" else 2) * bound)
        tally("fk.solve", kind, "residual within the bound")

    check()
    worst.report(tally)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_order_beyond_the_native_kernels(dtype, tally):
    n = choose.NATIVE_MAX_ORDER["cpu"] + 1
    k = gram("samples of size 1e-6 to 1e6", n, 300, 0, 0).to(dtype)
    lam = 1e-3 * k.diagonal().mean()
    x, info = fk.solve(k, lam, return_info=True)
    assert info.item() == 0
    a, x = k.double() + lam.double() * torch.eye(n).double(), x.double()
    assert residual(a, x, torch.ones_like(x)) <= allowed(a, x, dtype)
    tally("fk.solve", f"order {n}, torch.linalg", "residual within the bound")
