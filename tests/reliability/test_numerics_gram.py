"""Gram matrices of hard inputs, against float64 contributions formed one sample at a time.

|K_ij - <C_i, C_j>| <= L u B_i B_j with B_n the sum of |e_nt| |a_nt| over the positions of sample n, u the
unit roundoff of the dtype that sums are kept in, and L the roundings that an entry collects. B_n is |C_n|
where a sample has one position, and larger where positions cancel.
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
from fngd_kernels.ops.coefficients import coefficients

SAMPLES = st.sampled_from((1, 2, 3, 5, 8, 17, 33))
SIZES = st.sampled_from((1, 2, 3, 5, 16, 33, 63))
# Among them the sizes that take pairs of positions.
LARGE = st.sampled_from(((1, 2000), (2000, 1), (3, 700), (33, 63), (63, 63)))
POSITIONS = st.sampled_from((None, 1, 2, 3, 7, 16))


PLAIN = Case(KINDS[0], torch.float32, (0, 0), "contiguous", 64 << 20, 0)


class Judge:
    """Holds Gram matrices against the contributions they belong to, and counts what happened."""

    def __init__(self, name, device, tally):
        self.name, self.tally, self.worst = name, tally, Worst()
        # Tensor cores cut off where a CPU rounds.
        self.roundings = 1 if device == "cpu" else 2

    def __call__(self, case, form, inputs, rows, size, lengths, factors=()):
        """Judge form(diag=False) and form(diag=True).

        rows: (N,D) C in float64. size: (N,) B. lengths: L of K and of its diagonal. factors: (N,) norms that
        are squared on the way and may overflow or underflow where K does not.
        """
        k, diagonal = form(diag=False), form(diag=True)
        s, info = coefficients(k[None], 0.1)
        k, diagonal, s = k.cpu(), diagonal.cpu(), s.cpu()
        dtype = k.dtype
        assert dtype == diagonal.dtype == accumulated(case.dtype)
        assert torch.equal(k.nan_to_num(), k.T.nan_to_num())
        good = rows.isfinite().all(1)
        # What is not finite must show on the diagonal, where the coefficients look for it.
        assert not k.diagonal()[~good].isfinite().any()
        assert not diagonal[~good].isfinite().any()
        assert s.isfinite().all()
        if not k.isfinite().all():
            assert info.item() > 0
            assert torch.equal(s, torch.ones_like(s))

        rows, size = rows[good], size[good]
        norms = [f[good] for f in factors] + [size]
        k, diagonal = k[good][:, good].double(), diagonal[good].double()
        square = torch.outer(size, size)
        # What a product that underflows is multiplied by.
        lost = 1 + size + size[:, None] + sum(torch.outer(f, f) for f in norms)
        # The oracle rounds as well, in sums over all of C.
        oracle = (rows.shape[1] + max(lengths)) * UNIT[torch.float64] * square
        rounding = self.roundings * UNIT[dtype] * square + TINY[dtype] * lost
        bounds = [length * rounding + oracle for length in lengths]
        largest = max((float(f.max()) for f in norms if len(f)), default=0.0)
        inside = max(lengths) * largest**2 < torch.finfo(dtype).max
        for name, actual, exact, allowed in (
            ("", k, rows @ rows.T, bounds[0]),
            (", diag=True", diagonal, rows.square().sum(1), bounds[1].diagonal()),
        ):
            finite = actual.isfinite()
            assert finite.all() or not inside
            self.worst.see(f"{self.name}, {dtype}{name}", (actual - exact).abs()[finite], allowed[finite])
        if not k.isfinite().all():
            outcome = "not finite, beyond the dtype's range: plain gradient"
        elif good.all():
            outcome = "within the bound"
        else:
            outcome = "the others' within the bound; plain gradient"
        self.tally(f"fk.{self.name}", given_name(case, *inputs), outcome)


def taken(plan, pairs, explicit, device):
    """Return the L of the algorithm that a layer takes; on a GPU it may take another."""
    if device != "cpu":
        return max(pairs, explicit)
    return explicit if plan.algorithm == "explicit" else pairs


@pytest.mark.parametrize("device", DEVICES)
def test_linear(device, tally):
    judge = Judge("gram", device, tally)

    @campaign
    @given(cases(), SAMPLES, POSITIONS, st.one_of(st.tuples(SIZES, SIZES), LARGE), st.booleans())
    @example(PLAIN, 5, 2, (33, 63), True)
    @example(
        PLAIN._replace(kind="constant input and gradient", dtype=torch.float64), 5, None, (63, 63), False
    )
    def check(case, n, t, sizes, bias):
        (inputs, outputs), positions = sizes, () if t is None else (t,)
        a, e = make(case, (n, *positions, inputs), (n, *positions, outputs))
        t = t or 1
        wide_a, wide_e = (x.double().view(n, t, -1) for x in (a, e))
        a_norm, e_norm = (wide_a.square().sum(2) + bias).sqrt(), wide_e.norm(dim=2)
        pairs, explicit = inputs + outputs + t**2 + 3, 2 * t + (inputs + bias) * outputs + 3
        plan = fk.plan(a.shape, e.shape, bias=bias, itemsize=a.itemsize, workspace=case.workspace)
        length = taken(plan, pairs, explicit, device)
        judge(
            case,
            lambda diag: fk.gram(
                a.to(device), e.to(device), bias=bias, diag=diag, workspace=case.workspace, precision="ieee"
            ),
            (a, e),
            oracles.linear_rows(a, e, bias),
            (a_norm * e_norm).sum(1),
            (length, max(pairs, explicit)),
            (a_norm.sum(1), e_norm.sum(1)),
        )

    check()
    judge.worst.report(tally)


CONVOLUTIONS = (  # input, weight, geometry
    ((4, 11), (6, 4, 3), {}),
    ((4, 12), (6, 2, 4), {"stride": 3, "padding": 2, "dilation": 2, "groups": 2}),
    ((3, 7, 6), (5, 3, 3, 3), {"padding": 1}),
    ((1, 1, 1), (1, 1, 1, 1), {}),
    ((4, 5, 7), (6, 2, 3, 2), {"stride": (2, 1), "padding": (1, 0), "groups": 2}),
    ((3, 2, 2), (40, 3, 1, 1), {"stride": 2, "padding": 3}),
    ((4, 4, 5, 3), (6, 2, 3, 2, 1), {"stride": (1, 2, 1), "padding": (1, 1, 0), "groups": 2}),
    # The rest takes pairs of pixels.
    ((24, 3, 3), (32, 24, 3, 3), {"padding": 1, "stride": 2}),
    ((32, 4), (32, 16, 3), {"groups": 2}),
    ((16, 5), (24, 16, 4), {"padding": 1, "stride": 2}),
)


@pytest.mark.parametrize("device", DEVICES)
def test_convolution(device, tally):
    judge = Judge("gram_conv", device, tally)

    @campaign
    @given(cases(), st.sampled_from((1, 2, 5, 9)), st.sampled_from(CONVOLUTIONS), st.booleans())
    @example(PLAIN, 1, CONVOLUTIONS[-3], True)
    def check(case, n, convolution, bias):
        shape, weight, geometry = convolution
        apply, groups = (F.conv1d, F.conv2d, F.conv3d)[len(weight) - 3], geometry.get("groups", 1)
        output = apply(torch.zeros(1, *shape), torch.zeros(weight), **geometry).shape[1:]
        x, e = make(case, (n, *shape), (n, *output))
        # |patch| of each position and group, from a convolution of the squares with ones.
        ones = torch.ones(groups, *weight[1:], dtype=torch.float64)
        patch = (apply(x.double().square(), ones, **geometry).flatten(2) + bias).sqrt()
        norm = e.double().flatten(2).unflatten(1, (groups, -1)).norm(dim=2)
        positions, taps = patch.shape[2], torch.Size(weight[1:]).numel()
        pairs = taps + weight[0] + positions**2 + 3
        explicit = 2 * positions + (taps + bias) * weight[0] + 3
        sizes = {"bias": bias, "itemsize": x.itemsize, "workspace": case.workspace}
        plan = fk.plan(x.shape, e.shape, weight_shape=weight, **geometry, **sizes)
        length = taken(plan, pairs, explicit, device)
        judge(
            case,
            lambda diag: fk.gram_conv(
                x.to(device),
                e.to(device),
                weight,
                **geometry,
                bias=bias,
                diag=diag,
                workspace=case.workspace,
                precision="ieee",
            ),
            (x, e),
            oracles.conv_rows(x, e, weight, bias, **geometry),
            (patch * norm).sum(2).norm(dim=1),
            (length, max(pairs, explicit)),
            (patch.sum((1, 2)), norm.sum((1, 2))),
        )

    check()
    judge.worst.report(tally)


@pytest.mark.parametrize("device", DEVICES)
def test_embedding(device, tally):
    judge = Judge("gram_embedding", device, tally)

    @campaign
    @given(cases(), SAMPLES, POSITIONS, st.sampled_from((1, 3, 200)), SIZES, st.sampled_from((None, 0)))
    def check(case, n, t, vocabulary, dim, padding_idx):
        shape = (n,) if t is None else (n, t)
        _, e = make(case, (n, 1), (*shape, dim))
        ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(case.seed))
        norm = e.double().norm(dim=-1)
        norm = norm if padding_idx is None else norm.masked_fill(ids == padding_idx, 0)
        t = t or 1
        judge(
            case,
            lambda diag: fk.gram_embedding(
                ids.to(device), e.to(device), padding_idx=padding_idx, diag=diag, workspace=case.workspace
            ),
            (e,),
            oracles.embedding_rows(ids, e, vocabulary, padding_idx),
            norm.view(n, t).sum(1),
            2 * (2 * t + t * dim + 3,),
        )

    check()
    judge.worst.report(tally)


@pytest.mark.parametrize("device", DEVICES)
def test_rows(device, tally):
    judge = Judge("gram_rows", device, tally)

    @campaign
    @given(cases(), SAMPLES, st.sampled_from(((), (1,), (7,), (3, 5), (2000,))))
    def check(case, n, shape):
        _, g = make(case, (n, 1), (n, *shape))
        rows = g.double().reshape(n, -1)
        judge(
            case,
            lambda diag: fk.gram_rows(g.to(device), diag=diag, workspace=case.workspace),
            (g,),
            rows,
            rows.norm(dim=1),
            2 * (rows.shape[1] + 1,),
        )

    check()
    judge.worst.report(tally)


@pytest.mark.parametrize("strides", [(1, 1), (3, 8), (8, 3), (0, 1), (2, 5)])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_overlap_or_interleave(device, strides, tally):
    a, e = torch.randn(200).as_strided((7, 5), strides), torch.randn(7, 4)
    rows = oracles.linear_rows(a, e, True)
    assert oracles.relative_error(fk.gram(a.to(device), e.to(device), bias=True).cpu(), rows @ rows.T) < 1e-6
    assert oracles.relative_error(fk.gram_rows(a.to(device)).cpu(), a.double() @ a.double().T) < 1e-6
    tally("fk.gram", "samples that share memory, as sliding windows do", "within the bound")
