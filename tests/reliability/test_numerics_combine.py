"""Weighted sums of hard inputs, against float64 contributions formed one sample at a time.

|G - sum_n s_n C_n| <= (2 u + L u') sum_n |s_n| |C|_n with |C|_n the sum over positions of |e_nt| |a_nt|,
element by element: s_n e_n and the result are rounded to the inputs' dtype, of roundoff u, and L terms are
summed at roundoff u'.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numeric_cases import (
    DEVICES,
    KINDS,
    TINY,
    UNIT,
    Case,
    Worst,
    accumulated,
    campaign,
    cases,
    given_name,
    make,
)
from torch.nn import functional as F

import fngd_kernels as fk
import oracles

SAMPLES = st.sampled_from((1, 2, 5, 17, 33))
SIZES = st.sampled_from((1, 3, 16, 63))
POSITIONS = st.sampled_from((None, 1, 3, 16))
WEIGHTS = st.sampled_from(("ones", "random", "1e-6 to 1e6"))


def weights(kind, n, seed):
    """Return s (n,) in float32."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "ones":
        return torch.ones(n)
    s = torch.randn(n, generator=generator)
    return s if kind == "random" else s * 10 ** torch.empty(n).uniform_(-6, 6, generator=generator)


class Judge:
    """Holds weighted sums against the contributions they belong to, and counts what happened."""

    def __init__(self, name, device, tally):
        self.name, self.tally, self.worst = name, tally, Worst()
        self.roundings = 1 if device == "cpu" else 2

    def __call__(self, case, combined, inputs, rows, absolute, s, terms):
        """Judge a sum, or a pair of sums.

        rows: (N,D) C in float64. absolute: (N,D) |C|, of the inputs' absolute values. terms: L.
        """
        parts = combined if isinstance(combined, tuple) else (combined,)
        dtype = case.dtype
        assert all(part.dtype == dtype for part in parts)
        actual = torch.cat([part.flatten() for part in parts]).cpu().double()
        s, s_largest = s.double(), float(s.abs().max())
        size = s.abs() @ absolute
        a_largest, e_largest = (max(1.0, float(t.double().abs().max())) for t in inputs)
        numbers = torch.finfo(dtype)
        if not all(t.isfinite().all() for t in inputs):
            # It must show in the gradient, so that the step is left out.
            assert inputs[-1].isfinite().all() or not actual.isfinite().all()
            outcome = "not finite where the input is not"
        elif max(float(size.max()), s_largest * e_largest) * (terms + 1) < numbers.max:
            assert actual.isfinite().all()
            outcome = "within the bound"
        elif actual.isfinite().all():
            outcome = "within the bound"
        else:
            outcome = "not finite, beyond the dtype's range"
        seen = actual.isfinite() & size.isfinite()
        # The oracle rounds as well.
        summed = self.roundings * UNIT[accumulated(dtype)] + UNIT[torch.float64]
        unit = 2 * UNIT[dtype] + (terms + 1) * summed
        lost = terms * (1 + a_largest) * TINY[dtype]
        self.worst.see(f"{self.name}, {dtype}", (actual - s @ rows).abs()[seen], (unit * size + lost)[seen])
        self.tally(f"fk.{self.name}", given_name(case, *inputs), outcome)


@pytest.mark.parametrize("device", DEVICES)
def test_linear(device, tally):
    judge = Judge("combine", device, tally)

    @campaign
    @given(cases(), SAMPLES, POSITIONS, SIZES, SIZES, st.booleans(), WEIGHTS)
    @example(Case(KINDS[0], torch.bfloat16, (-14, -20), "contiguous", 0, 1), 2, None, 63, 63, False, "random")
    def check(case, n, t, inputs, outputs, bias, kind):
        positions = () if t is None else (t,)
        a, e = make(case, (n, *positions, inputs), (n, *positions, outputs))
        s = weights(kind, n, case.seed)
        combined = fk.combine(a.to(device), e.to(device), s.to(device), bias=bias)
        rows, absolute = (oracles.linear_rows(*pair, bias) for pair in ((a, e), (a.abs(), e.abs())))
        judge(case, combined, (a, e), rows, absolute, s, n * (t or 1))

    check()
    judge.worst.report(tally)


CONVOLUTIONS = (  # input, weight, geometry
    ((4, 12), (6, 2, 4), {"stride": 3, "padding": 2, "dilation": 2, "groups": 2}),
    ((3, 7, 6), (5, 3, 3, 3), {"padding": 1}),
    ((1, 1, 1), (1, 1, 1, 1), {}),
    ((4, 4, 5, 3), (6, 2, 3, 2, 1), {"stride": (1, 2, 1), "padding": (1, 1, 0), "groups": 2}),
)


NEAR_PARALLEL = Case("near-parallel samples", torch.float16, (0, 0), "contiguous", 64 << 20, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_convolution(device, tally):
    judge = Judge("combine_conv", device, tally)

    @campaign
    @given(cases(), st.sampled_from((1, 2, 5, 9)), st.sampled_from(CONVOLUTIONS), st.booleans(), WEIGHTS)
    # Where torch itself adds up samples in float16.
    @example(NEAR_PARALLEL, 9, CONVOLUTIONS[0], False, "ones")
    def check(case, n, convolution, bias, kind):
        shape, weight, geometry = convolution
        apply = (F.conv1d, F.conv2d, F.conv3d)[len(weight) - 3]
        output = apply(torch.zeros(1, *shape), torch.zeros(weight), **geometry).shape[1:]
        x, e = make(case, (n, *shape), (n, *output))
        s = weights(kind, n, case.seed)
        combined = fk.combine_conv(x.to(device), e.to(device), s.to(device), weight, **geometry, bias=bias)
        rows, absolute = (
            oracles.conv_rows(*pair, weight, bias, **geometry) for pair in ((x, e), (x.abs(), e.abs()))
        )
        judge(case, combined, (x, e), rows, absolute, s, n * output[1:].numel())

    check()
    judge.worst.report(tally)


@pytest.mark.parametrize("device", DEVICES)
def test_embedding(device, tally):
    judge = Judge("combine_embedding", device, tally)

    @campaign
    @given(cases(), SAMPLES, POSITIONS, st.sampled_from((1, 3, 50)), SIZES, WEIGHTS)
    def check(case, n, t, vocabulary, dim, kind):
        shape = (n,) if t is None else (n, t)
        _, e = make(case, (n, 1), (*shape, dim))
        ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(case.seed))
        s = weights(kind, n, case.seed)
        combined = fk.combine_embedding(ids.to(device), e.to(device), s.to(device), vocabulary)
        rows, absolute = (oracles.embedding_rows(ids, x, vocabulary, None) for x in (e, e.abs()))
        judge(case, combined, (e[:0].sum().view(1), e), rows, absolute, s, n * (t or 1))

    check()
    judge.worst.report(tally)


@pytest.mark.parametrize("device", DEVICES)
def test_rows(device, tally):
    judge = Judge("combine_rows", device, tally)

    @campaign
    @given(cases(), SAMPLES, st.sampled_from(((), (1,), (7,), (3, 5), (2000,))), WEIGHTS)
    def check(case, n, shape, kind):
        _, g = make(case, (n, 1), (n, *shape))
        s = weights(kind, n, case.seed)
        rows = g.double().reshape(n, -1)
        combined = fk.combine_rows(g.to(device), s.to(device))
        judge(case, combined, (g[:0].sum().view(1), g), rows, rows.abs(), s, n)

    check()
    judge.worst.report(tally)
