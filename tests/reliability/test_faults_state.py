"""States that are foreign, damaged or of an older format: refused, and the optimizer is what it was."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fngd

AREA = "Checkpoints"
N = 6


def network(width=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 3))


def trained(kind, steps=3, model=None):
    """Return an optimizer after some steps, and what makes one step more."""
    model = network() if model is None else model
    x, y = torch.randn(2 * N, 4), torch.randint(0, 3, (2 * N,))
    if kind == "GaussNewton":
        opt = fngd.GaussNewton(model, lr=0.3, damping=0.1, momentum=0.9)
    else:
        opt = fngd.FNGD(model, lr=0.1, momentum=0.9, share=kind)

    def step(number):
        if kind == "GaussNewton":
            opt.step(lambda: model(x) - F.one_hot(y, 3))
            return
        ids = torch.arange(N) + number % 2 * N
        opt.set_samples(ids)
        opt.zero_grad()
        F.cross_entropy(model(x[ids]), y[ids]).backward()
        opt.step()

    for number in range(steps):
        step(number)
    return opt, step


NOT_IN_EARLIER_VERSIONS = {
    *("fngd", "base", "missed", "datasets", "epoch_ended"),
    *("damping_increase", "accelerated_steps", "iterations"),
}
KINDS = ("sample", "position", "none", "GaussNewton")


def assert_equal(one, other, path="state"):
    """Compare nested states bit for bit."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}[{i}]")
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def refused(opt, state, error=ValueError, match="state_dict"):
    """Load a state that must be refused, and look for what it has changed."""
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=match):
        opt.load_state_dict(state)
    assert_equal(opt.state_dict(), before)


def own(kind):
    return "gauss_newton" if kind == "GaussNewton" else "fngd"


def inside(state, path):
    for key in path:
        state = state[key]
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_missing_keys(kind, tally):
    opt, step = trained(kind)
    state = opt.state_dict()
    cases = 0
    for path in [(), (own(kind),), ("param_groups", 0)]:
        # A state of the base optimizer alone lacks "fngd", an older one the others.
        for key in sorted(set(inside(state, path)) - NOT_IN_EARLIER_VERSIONS):
            damaged = copy.deepcopy(state)
            del inside(damaged, path)[key]
            refused(opt, damaged, match=key)
            cases += 1
    step(3)
    tally(AREA, f"state without one of its keys ({type(opt).__name__})", "ValueError, nothing changed", cases)


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_other_kinds_and_sizes(kind, tally):
    opt, step = trained(kind)
    state, cases = opt.state_dict(), 0
    for key, value in state[own(kind)].items():
        others = [None, "x", 7, 0.5, [], {}, torch.zeros(1, 1, 1), torch.zeros(3, dtype=torch.complex64)]
        if isinstance(value, Tensor):
            larger = torch.zeros([n + 1 for n in value.shape], dtype=value.dtype)
            others += [value.half() if value.is_floating_point() else value.float()]
            others += [larger] if value.ndim else []
        for other in others:
            kinds = {type(other), type(value)}
            if kinds in ({str}, {int}, {float}, {type(None)}, {int, type(None)}):
                continue  # of the kind of the value that was there
            if kinds in ({list}, {dict}) and other == value:
                continue
            damaged = copy.deepcopy(state)
            damaged[own(kind)][key] = other
            refused(opt, damaged)
            cases += 1
    if kind == "sample":
        damaged = copy.deepcopy(state)
        damaged["fngd"]["values"][0, 1] = float("nan")
        refused(opt, damaged, match="finite")
        cases += 1
    step(3)
    tally(
        AREA,
        f"state with a value of another kind or size ({type(opt).__name__})",
        "ValueError, nothing changed",
        cases,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_other_optimizers(kind, tally):
    opt, step = trained(kind)
    foreign = [trained(other)[0].state_dict() for other in KINDS if other != kind]
    foreign.append(torch.optim.AdamW(network().parameters(), lr=0.1).state_dict())
    if kind == "GaussNewton":  # FNGD takes over a state of its base
        foreign.append(torch.optim.SGD(network().parameters(), lr=0.1).state_dict())
    foreign += [
        network().state_dict(),
        {},
        {"state": {}, "param_groups": 3},
        {"state": {}, "param_groups": [3]},
    ]
    for state in foreign:
        refused(opt, state)
    for nothing in (None, [], 3, "state"):
        refused(opt, nothing, TypeError)
    step(3)
    tally(
        AREA,
        f"state of another optimizer, or none at all ({type(opt).__name__})",
        "ValueError or TypeError, nothing changed",
        len(foreign) + 4,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_other_models(kind, tally):
    opt, step = trained(kind)
    models = [network(width=6), nn.Sequential(nn.Linear(4, 3)), nn.Sequential(*network(), nn.Linear(3, 3))]
    renamed = nn.Sequential(nn.Identity(), *network())
    models += [renamed] if kind != "GaussNewton" else []  # names mean nothing to it
    for model in models:
        refused(opt, trained(kind, model=model)[0].state_dict(), match="state|parameter group")
    step(3)
    tally(AREA, f"state of another model ({type(opt).__name__})", "ValueError, nothing changed", len(models))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_was_refused_leaves_the_run_as_it_was(kind, tally):
    (opt, step), (untouched, plain_step) = trained(kind), trained(kind)
    damaged = copy.deepcopy(opt.state_dict())
    del damaged[own(kind)][next(iter(damaged[own(kind)]))]
    with pytest.raises(ValueError, match="state_dict"):
        opt.load_state_dict(damaged)
    for number in range(3, 8):
        step(number)
        plain_step(number)
    assert_equal(opt.state_dict(), untouched.state_dict())
    tally(AREA, "run that goes on after a state was refused", "bitwise the run without it")


@pytest.mark.parametrize("kind", ["sample", "position", "none"])
def test_a_resumed_run_reports_the_coverage_it_had(kind, tally):
    opt, _ = trained(kind)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    resumed, _ = trained(kind, steps=0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(resumed.state_dict(), opt.state_dict())
    assert resumed.coverage() == opt.coverage()
    assert resumed.coverage()["0.weight"] == "linear"
    tally(AREA, "state of the same run", "restored bit for bit, coverage() as before")
