"""Coefficients of hard Gram matrices: always finite, and right in float64 or plain.

With M = K / tr(K) + rho I the weights are s = f x, M x = 1. As for `solve`, and with a few roundings of f,
M s is constant to c u |M| |s| in maximum norms, c = 3 n + 16.
"""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numeric_cases import DEVICES, KINDS, TINY, UNIT, Case, Worst, campaign, make

import fngd_kernels as fk
from fngd_kernels.backends.torch.coefficients import RAISES
from fngd_kernels.ops.coefficients import DAMPING_MODES, NORMALIZATIONS, coefficients

DTYPES = (torch.float32, torch.float64)
DAMPINGS = (0.0, 1e-12, 1e-8, 1e-6, 1e-3, 0.1, 1.0, 1e3, 1e6)


def relative_damping(n, trace, damping, damping_mode, raises, dtype):
    """Return rho, after so many raises of the damping."""
    rho = damping / {"trace": 1, "mean_eig": n, "absolute": n * trace}[damping_mode]
    for _ in range(raises):
        rho = 10 * max(rho, n * torch.finfo(dtype).eps)
    return rho


def check_coefficients(worst, name, k, s, rho, normalize, roundings):
    """Require the weights that a damping rho means, in float64."""
    n, unit, tiny = len(s), UNIT[k.dtype] * roundings, TINY[k.dtype]
    k, s = k.double(), s.double()
    trace = k.trace()
    m = k / trace + rho * torch.eye(n, dtype=torch.float64)
    size, largest = m.abs().sum(1).max(), s.abs().max()
    constant = m @ s
    value = {"lambda": rho, "raw": 1 / (n * trace)}.get(normalize, constant.mean())
    bound = (3 * n + 16) * unit * size * largest + n * tiny * (1 + size + 1 / trace)
    worst.see(name, (constant - value).abs().max(), bound)
    if normalize == "mean":
        assert abs(s.mean() - 1) <= 2 * n * unit * s.abs().mean()
    if normalize == "graft":
        plain, natural = k.sum(), s @ k @ s
        rounding = (2 * n + 16) * unit * (k.abs().sum() + s.abs() @ k.abs() @ s.abs())
        assert abs(plain - natural) <= rounding


def must_be_solved(k, rho, normalize):
    """Return whether theory says that a matrix is solved for, if need be after raising its damping."""
    n, unit, trace = len(k), UNIT[k.dtype], k.double().trace().item()
    if normalize == "raw":
        return rho < 1e30 and 1 / (n * trace * max(rho, n * unit)) < 1e30
    if normalize == "graft":
        # Lengths of sums that cancel, or of weights that do, are lost in rounding.
        return 1e-3 < rho < 1e12 and k.double().sum() > 100 * n * unit * k.double().abs().sum()
    return rho < 1e30


@pytest.mark.parametrize("device", DEVICES)
def test_coefficients(route, device, tally):
    worst = Worst()

    @campaign
    @given(
        st.sampled_from(KINDS),
        st.sampled_from(DTYPES),
        st.sampled_from((1, 2, 3, 5, 8, 16, 31, 64, 65, 100)),
        st.sampled_from((1, 10, 200)),
        st.one_of(st.just(0), st.integers(-20, 20)),
        st.sampled_from(DAMPINGS),
        st.sampled_from(DAMPING_MODES),
        st.sampled_from(NORMALIZATIONS),
        st.integers(0, 2**31),
    )
    # N tr(K) overflows, tr(K) does not.
    @example("random samples", torch.float32, 8, 1, 19, 0.0, "trace", "raw", 1)
    def check(kind, dtype, n, columns, exponent, damping, damping_mode, normalize, seed):
        case = Case(kind, torch.float64, (0, exponent), "contiguous", 0, seed)
        _, g = make(case, (n, 1), (n, columns))
        k = (g @ g.T).to(dtype)
        s, info = coefficients(k[None].to(device), damping, damping_mode, normalize)
        s, info = s[0].cpu(), info.item()
        assert s.isfinite().all()
        assert s.dtype == dtype

        trace, numbers = k.double().trace().item(), torch.finfo(dtype)
        least = n * numbers.tiny / numbers.eps
        if info > 0:
            assert torch.equal(s, torch.ones_like(s))
        if not k.isfinite().all() or trace > numbers.max:
            assert 0 < info <= n + 1
            outcome = "plain gradient, info > 0"
        elif abs(trace / least - 1) < 1e-4 or trace > 0.999 * numbers.max:
            outcome = "finite, at the end of the dtype's range"
        elif trace < least:
            assert info == n + 2
            outcome = "plain gradient, info N + 2"
        else:
            rho = relative_damping(n, trace, damping, damping_mode, max(0, -info), dtype)
            # torch.linalg on a GPU solves once: looking whether it failed would make the host wait.
            raised = route == "native" or device == "cpu" or rho > 100 * n * numbers.eps
            assert info <= 0 or not (raised and must_be_solved(k, rho, normalize))
            outcome = "plain gradient, info > 0"
            if info <= 0:
                assert info >= -RAISES
                roundings = 1 if device == "cpu" else 2
                check_coefficients(worst, f"coefficients, {route}, {dtype}", k, s, rho, normalize, roundings)
                outcome = "residual within the bound" + ", damping raised" * (info < 0)
        tally("Coefficients", kind, outcome)

    check()
    worst.report(tally)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 4, 50])
def test_the_range_of_gradient_norms(route, n, dtype, tally):
    """Weights are solved for while the root mean square of |C_n| lies between two ends."""
    numbers = torch.finfo(dtype)
    least, most = math.sqrt(numbers.tiny / numbers.eps), math.sqrt(numbers.max / n)
    c = torch.randn(n, 2 * n, dtype=torch.float64) + 0.2
    c /= c.square().sum(1).mean().sqrt()
    k = c @ c.T
    x = torch.linalg.solve(k / k.trace() + 0.1 * torch.eye(n).double(), torch.ones(n).double())
    expected = x / x.mean()
    for norm, code in ((0.999 * least, n + 2), (1.001 * least, 0), (0.999 * most, 0), (1.001 * most, n + 1)):
        s, info = coefficients(fk.gram_rows((norm * c).to(dtype))[None], 0.1)
        assert info.item() == code
        if code == 0:
            # The condition number, times the roundings of K and of the solve.
            error = (s[0] - expected).abs().max()
            assert error <= 11 * (5 * n + 16) * UNIT[dtype] * expected.abs().max()
        else:
            assert torch.equal(s, torch.ones_like(s))
            end = f"below {least:.2g}" if norm < 1 else f"above {math.sqrt(numbers.max):.2g} / sqrt(N)"
            tally("Coefficients", f"|C_n| {end}, {dtype}".replace("torch.", ""), "plain gradient, counted")
