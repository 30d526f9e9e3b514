"""Models that change after the optimizer was made, and ids that are none: right, named, or refused."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fngd
from fngd.optimizer import NOT_OPTIMIZED

AREA = "Bad input"
N = 6


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data():
    x = torch.randn(N, 4, dtype=torch.float64)
    return x, x[:, :3].argmax(1)


def natural(model, x, y, ids=range(N)):
    """Return the gradients of a solving step by per-sample autograd: {name: gradient}.

    Rows of the same id are one sample, whose contribution is their sum.
    """
    found = {}
    for name in ("0", "2"):
        own = {n: p for n, p in model.named_parameters() if n.startswith(name) and p.requires_grad}
        if not own:
            continue
        rows = [
            torch.autograd.grad(F.cross_entropy(model(x), y, reduction="none")[n] / N, own.values())
            for n in range(N)
        ]
        flat = [torch.cat([part.flatten() for part in row]) for row in rows]
        g = torch.stack(
            [sum(row for row, i in zip(flat, ids, strict=True) if i == sample) for sample in set(ids)]
        )
        k, n = g @ g.T, len(g)
        v = torch.linalg.solve(k + 0.1 * k.trace() * torch.eye(n, dtype=k.dtype), k.new_ones(n))
        flat = (v / v.mean()) @ g
        found |= dict(zip(own, flat.split([p.numel() for p in own.values()]), strict=True))
    return found


def assert_natural(model, rtol=1e-9, ids=range(N)):
    x, y = data()
    twin = copy.deepcopy(model)
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    F.cross_entropy(model(x.to(dtype)), y).backward()
    expected = natural(twin.double(), x.to(dtype).double(), y, ids)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad.flatten().double(), expected[name], rtol=rtol, atol=rtol)


def replaced_module(model):
    model[0] = nn.Linear(4, 5).double()


def replaced_parameter(model):
    model[0].weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))


def assigned_state(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


@pytest.mark.parametrize("change", [replaced_module, replaced_parameter, assigned_state])
def test_parameters_that_the_optimizer_does_not_have_are_named(change, tally):
    model = network()
    opt = fngd.FNGD(model, lr=0.1, share="none")
    change(model)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    opt.step()
    report, optimized = opt.coverage(), {id(p) for group in opt.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert (report[name] == NOT_OPTIMIZED) == (id(p) not in optimized)
    assert report["0.weight"] == NOT_OPTIMIZED
    tally(AREA, "module or parameter replaced after the optimizer was made", "named in coverage()")


def test_a_module_that_is_removed_or_added(tally):
    model = network()
    opt = fngd.FNGD(model, lr=0.1, share="none")
    model.append(nn.Linear(3, 3).double())
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    assert opt.coverage()["3.weight"] == NOT_OPTIMIZED
    del model[3]
    assert_natural(model)
    assert "3.weight" not in opt.coverage()
    tally(
        AREA, "module added or removed after the optimizer was made", "the others right, the new one named", 2
    )


def to_float(model):
    model.float()


def to_half(model):
    model.to(torch.bfloat16)


def frozen(model):
    model[2].requires_grad_(False)


def frozen_and_back(model):
    model[0].requires_grad_(False)
    model[0].requires_grad_(True)


def eval_and_back(model):
    model.eval().train()


def loaded_state(model):
    model.load_state_dict({name: 2 * p for name, p in model.state_dict().items()})


def new_data(model):
    model[0].weight.data = torch.randn(5, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "rtol"),
    [
        (to_float, 1e-4),
        (to_half, 0.1),
        (frozen, 1e-9),
        (frozen_and_back, 1e-9),
        (eval_and_back, 1e-9),
        (loaded_state, 1e-9),
        (new_data, 1e-9),
    ],
)
def test_changes_that_are_followed(change, rtol, tally):
    model = network()
    opt = fngd.FNGD(model, lr=0.1, share="none")
    change(model)
    assert_natural(model, rtol)
    opt.step()
    if change is frozen:
        assert opt.coverage()["2.weight"] == "plain: frozen"
    tally(
        AREA,
        f"model changed after the optimizer was made: {change.__name__.replace('_', ' ')}",
        f"natural gradient right to {rtol:g}",
    )


def test_copies_are_plain_and_leave_the_model_alone(tally):
    model = network()
    opt = fngd.FNGD(model, lr=0.1, share="none")
    x, y = data()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        F.cross_entropy(clone(x), y).backward()
        plain = torch.autograd.grad(F.cross_entropy(clone(x), y), list(clone.parameters()))
        for p, g in zip(clone.parameters(), plain, strict=True):
            assert torch.equal(p.grad, g)
    assert opt.stats()["solved_batches"] == 0
    assert_natural(model)
    tally(AREA, "model copied or pickled", "copies are plain, the model right", 2)


def test_shapes_and_devices_that_do_not_fit_raise(tally):
    model = network()
    opt = fngd.FNGD(model, lr=0.1, share="none")
    model[2].weight.data = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="shape"):
        model(data()[0])
    model = network()
    opt = fngd.FNGD(model, lr=0.1)
    opt.set_samples(range(N))
    model.to("meta")
    with pytest.raises(RuntimeError):
        F.cross_entropy(model(data()[0]), data()[1]).backward()
    tally(AREA, "weight resized, or moved to meta", "RuntimeError", 2)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([-1, 2], ValueError),
        ([0, 30], ValueError),
        ([0.0, 1.0], TypeError),
        (torch.zeros(3), TypeError),
        (torch.ones(3, dtype=torch.bool), TypeError),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError),
        (torch.tensor(3), TypeError),
        ([2**70], TypeError),
        ([None], TypeError),
        ("0123", TypeError),
        (b"01234567", TypeError),
        (3, TypeError),
    ],
    ids=str,
)
def test_ids_that_are_none(ids, error, tally):
    model = network()
    opt = fngd.FNGD(model)
    opt.start_epoch(20)
    opt.set_samples(range(N))
    before = opt._schedule.batch
    with pytest.raises(error, match="ids: expected"):
        opt.set_samples(ids)
    assert opt._schedule.batch is before
    assert len(opt._schedule.table) == 20
    tally(AREA, "ids out of range or of another type", error.__name__)


@pytest.mark.parametrize("count", [0, 1, N - 1, N + 1, 3 * N])
def test_too_many_and_too_few_ids(count, tally):
    model = network()
    opt = fngd.FNGD(model)
    opt.set_samples(range(count))
    x, y = data()
    twin = copy.deepcopy(model)
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert opt.coverage()["0.weight"] == f"plain: its input has {N} rows, the batch has {count} samples"
    assert opt.stats()["seen_samples"] == 0
    tally(AREA, "more or fewer ids than rows", "plain gradient, named in coverage()")


def test_an_id_twice_in_a_batch(tally):
    model = network()
    opt = fngd.FNGD(model)
    ids = [0, 1, 2, 2, 3, 1]
    opt.set_samples(ids)
    assert_natural(model, ids=ids)
    opt.step()
    assert opt.stats()["seen_samples"] == 4
    tally(AREA, "an id twice in a batch", "one sample of both rows, natural gradient right to 1e-09")
