"""Inputs that are hard on floating-point arithmetic, and the rounding errors that theory allows."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# Examples are cheap here: enough in the quick part to meet every kind of input.
campaign = settings(max_examples=max(100, settings.default.max_examples))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The largest relative error of one rounding.
UNIT = dict(zip(DTYPES, (2.0**-24, 2.0**-53, 2.0**-8, 2.0**-11), strict=True))
# What a product loses at most where it underflows: the smallest positive number; of bfloat16, whose products
# processors flush to zero, the smallest normal one.
TINY = dict(zip(DTYPES, (2.0**-149, 2.0**-1074, 2.0**-126, 2.0**-24), strict=True))
# Powers of ten by which inputs are scaled; float16 ends at 65504 and 6e-8.
SCALES = {dtype: st.integers(-20, 20) for dtype in DTYPES} | {torch.float16: st.integers(-7, 5)}

KINDS = (
    "random samples",
    "duplicate samples",
    "near-parallel samples",
    "one dominating sample",
    "samples of size 1e-6 to 1e6",
    "some samples without gradient",
    "no gradient at all",
    "constant input and gradient",
    "NaN in a sample",
    "infinity in a sample",
)
LAYOUTS = ("contiguous", "every second element", "transposed")


class Case(NamedTuple):
    """What a pair of inputs is made from; a failing example prints it."""

    kind: str
    dtype: torch.dtype
    scales: tuple[int, int]
    layout: str
    workspace: int
    seed: int


@st.composite
def cases(draw, dtypes=DTYPES) -> Case:
    dtype = draw(st.sampled_from(dtypes))
    return Case(
        draw(st.sampled_from(KINDS)),
        dtype,
        # Half of the pairs of a moderate size, where nothing overflows.
        draw(st.one_of(st.just((0, 0)), st.tuples(SCALES[dtype], SCALES[dtype]))),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from((64 << 20, 20_000, 1_000))),
        draw(st.integers(0, 2**31)),
    )


def make(case: Case, a_shape: tuple, e_shape: tuple) -> tuple[Tensor, Tensor]:
    """Return the layer input (N,...) and the gradient at its output (N,...) of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    a, e = (torch.randn(s, dtype=torch.float64, generator=generator) for s in (a_shape, e_shape))
    n = len(a)
    chosen = int(torch.randint(n, (), generator=generator))
    per_sample = (n, *[1] * (e.ndim - 1))
    if case.kind == "duplicate samples":
        of = torch.randint((n + 1) // 2, (n,), generator=generator)
        a, e = a[of], e[of]
    elif case.kind == "near-parallel samples":
        a, e = (t[:1] * (1 + 1e-4 * t) for t in (a, e))
    elif case.kind == "one dominating sample":
        e[chosen] *= 1e6
    elif case.kind == "samples of size 1e-6 to 1e6":
        e *= 10 ** torch.empty(per_sample, dtype=torch.float64).uniform_(-6, 6, generator=generator)
    elif case.kind == "some samples without gradient":
        e[torch.rand(n, generator=generator) < 0.5] = 0
    elif case.kind == "no gradient at all":
        e.zero_()
    elif case.kind == "constant input and gradient":
        a.fill_(0.1)
        e.fill_(0.3)
    elif case.kind in ("NaN in a sample", "infinity in a sample"):
        e[chosen].view(-1)[chosen % e[chosen].numel()] = math.nan if case.kind[0] == "N" else math.inf
    a_scale, e_scale = case.scales
    return tuple(
        laid_out((t * 10.0**scale).to(case.dtype), case.layout) for t, scale in ((a, a_scale), (e, e_scale))
    )


def given_name(case: Case, *inputs: Tensor) -> str:
    """Return the class that a case is counted under."""
    overflowed = case.kind.find("in a sample") < 0 and not all(t.isfinite().all() for t in inputs)
    return "float16 inputs that overflowed" if overflowed else case.kind


def laid_out(t: Tensor, layout: str) -> Tensor:
    """Return the same numbers in another memory layout, NaN in what lies between them."""
    if layout == "every second element":
        return torch.stack((t, torch.full_like(t, math.nan)), -1)[..., 0]
    if layout == "transposed" and t.ndim > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    return t


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Worst:
    """The largest error met, in units of the bound it was held against, and over how many cases."""

    def __init__(self) -> None:
        self.ratios: dict[str, list[float]] = {}

    def see(self, name: str, error: Tensor, bound: Tensor) -> None:
        """Require that no error exceeds its bound."""
        name = name.replace("torch.", "")
        assert not error.isnan().any()
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.3g} times the bound"
        ratio = (error / bound.clamp_min(1e-300)).max().item() if error.numel() else 0.0
        self.ratios.setdefault(name, []).append(ratio)

    def report(self, tally) -> None:
        """Write the largest error of each name into the table."""
        for name, ratios in self.ratios.items():
            tally("Error bounds", name, f"largest error {max(ratios):.1g} of the bound", len(ratios))
