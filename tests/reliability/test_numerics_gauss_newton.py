"""Gauss-Newton steps on hard residuals: the dense float64 step, or a step left out and counted; never a NaN.

With lam = damping mean(diag(J J^T)) the system's condition number is at most 1 + M / damping. A step
computed at roundoff u is held against 10 u M / damping, relative to sum_m |y_m| |j_m|, and against what
the rounding of the residuals themselves is worth; 10 is about what a row of this network's Jacobian
collects in roundings.
"""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numeric_cases import UNIT, Worst
from torch import nn
from torch.func import functional_call, jacrev

import fngd

KINDS = (
    "random points",
    "more residuals than parameters",
    "duplicate points",
    "constant points",
    "dead units",
    "residuals of zero",
    "one dominating residual",
    "points of size 1e10",
    "NaN in a residual",
    "infinity in a residual",
)
STEPS = 3


def problem(kind, dtype, seed):
    """Return the network, the points and the targets."""
    torch.manual_seed(seed)
    m = 60 if kind == "more residuals than parameters" else 7
    activation = nn.ReLU() if kind == "dead units" else nn.Tanh()
    model = nn.Sequential(nn.Linear(2, 8), activation, nn.Linear(8, 1)).to(dtype)
    x, y = torch.randn(m, 2, dtype=dtype), torch.randn(m, dtype=dtype)
    if kind == "duplicate points":
        x, y = x[: m // 2].repeat(2, 1), y[: m // 2].repeat(2)
    elif kind == "constant points":
        x = torch.ones_like(x)
    elif kind == "dead units":
        nn.init.constant_(model[0].bias, -100.0)
    elif kind == "residuals of zero":
        y = model(x).squeeze(-1).detach()
    elif kind == "one dominating residual":
        y[0] = 1e8
    elif kind == "points of size 1e10":
        x = 1e10 * x
    elif "in a residual" in kind:
        y[1] = math.nan if kind[0] == "N" else math.inf
    return model, x, y


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def check_step(worst, model, moved, x, y, scale, damping, dtype):
    """Require the dense step of the residuals scale (model(x) - y) / sqrt(M), taken in float64."""
    wide = copy.deepcopy(model).double()
    x, y, m = x.double(), y.double(), len(x)
    factor = scale / math.sqrt(m)
    rows = jacrev(lambda p: factor * functional_call(wide, p, (x,)).squeeze(-1))(
        dict(wide.named_parameters())
    )
    jacobian = torch.cat([row.reshape(m, -1) for row in rows.values()], 1).detach()
    output = wide(x).squeeze(-1).detach()
    k = jacobian @ jacobian.T
    lam = damping * k.diagonal().mean()
    weights = torch.linalg.solve(k + lam * torch.eye(m).double(), factor * (output - y))
    before, after = (
        torch.cat([p.detach().double().flatten() for p in net.parameters()]) for net in (model, moved)
    )
    error = (before - after - weights @ jacobian).norm()
    bound = 10 * UNIT[dtype] * m / damping * (weights.abs() @ jacobian.norm(dim=1))
    bound += 10 * UNIT[dtype] * jacobian.norm() / lam * factor * (output.norm() + y.norm())
    # The difference of the parameters is rounded as well.
    worst.see(f"GaussNewton, {dtype}", error, bound + UNIT[dtype] * (before.norm() + after.norm()))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_on_hard_residuals(momentum, tally):
    worst = Worst()

    @settings(max_examples=max(60, settings.default.max_examples // 2))
    @given(
        st.sampled_from(KINDS),
        st.sampled_from((torch.float32, torch.float64)),
        st.one_of(st.just(0), st.integers(-20, 20)),
        st.sampled_from(("lm", 0.1, 1e-3, 1e-12)),
        st.booleans(),
        st.integers(0, 2**31),
    )
    # The directions of a fixed damping overflow.
    @example("one dominating residual", torch.float32, -20, 1e-12, False, 127)
    def check(kind, dtype, exponent, damping, line_search, seed):
        model, x, y = problem(kind, dtype, seed)
        scale, before = 10.0**exponent, copy.deepcopy(model)
        line_search = line_search and damping != "lm"
        opt = fngd.GaussNewton(model, damping=damping, momentum=momentum, line_search=line_search)
        losses = []
        for step in range(STEPS):
            losses.append(opt.step(lambda: scale * (model(x).squeeze(-1) - y)).item())
            assert all(p.isfinite().all() for p in model.parameters())
            # Where no Gram matrix leaves float32's range and no unit saturates.
            largest = 10 if kind == "one dominating residual" else 12  # nor the loss
            comparable = damping in (0.1, 1e-3) and -12 <= exponent <= largest and "size" not in kind
            if step == 0 and comparable and not line_search and y.isfinite().all():
                check_step(worst, before, model, x, y, scale, damping, dtype)
        stats = opt.stats()
        if not y.isfinite().all():
            assert stats["skipped_steps"] == STEPS
            assert all(map(torch.equal, before.parameters(), model.parameters()))
        assert all(map(math.isfinite, losses)) or stats["skipped_steps"] > 0
        if damping == "lm":
            assert not any(later > earlier for earlier, later in itertools.pairwise(losses))
        outcome = "steps left out, counted" if stats["skipped_steps"] else "finite"
        tally("Gauss-Newton steps", kind, outcome, STEPS)

    check()
    worst.report(tally)
