"""What falls back to the plain gradient is counted by layer and reason, and logged 1, 10, 100, ... times."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fngd
import fngd.preconditioner
from fngd.coefficients import OUT_OF_MEMORY
from fngd.coefficients.report import REASONS
from fngd.event_log import READ_ON, EventLog
from fngd_kernels.workspace import default_workspace
from networks import make

N = 8
FAILED, ZERO = REASONS.values()


@pytest.fixture
def lines(caplog):
    """The lines logged so far, without the advice at the end of each."""
    caplog.set_level(logging.WARNING, "fngd")

    def logged():
        messages = [record.getMessage() for record in caplog.records if record.name == "fngd"]
        assert all(message.endswith(READ_ON) for message in messages)
        return [message.removesuffix(READ_ON) for message in messages]

    return logged


def gradients(model):
    return [p.grad for p in model.parameters()]


def assert_plain(model, twin, x, y):
    F.cross_entropy(twin(x), y).backward()
    torch.testing.assert_close(gradients(model), gradients(twin))


def test_a_line_is_written_at_powers_of_ten(lines):
    journal = EventLog("layer fc")
    for _ in range(120):
        journal.count("plain gradient, no luck")
    journal.count("plain gradient, no luck", 1000)
    assert lines() == [
        "layer fc: plain gradient, no luck",
        "layer fc: plain gradient, no luck (10 times so far)",
        "layer fc: plain gradient, no luck (100 times so far)",
        "layer fc: plain gradient, no luck (1120 times so far)",
    ]


def test_a_matrix_that_cannot_be_factored(monkeypatch, lines):
    model, x, y = make("mlp", N)
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, share="none")
    identity = torch.eye(N, dtype=torch.float64)
    identity[3, 1] = float("inf")
    monkeypatch.setattr(fngd.preconditioner, "block_gram", lambda uses, sketch: identity)
    F.cross_entropy(model(x), y).backward()
    stats = opt.stats()
    assert (stats["failed_solves"], stats["zero_grams"], stats["raised_dampings"]) == (2, 0, 0)
    assert stats["fallbacks"] == {"0": {FAILED: 1}, "2": {FAILED: 1}}
    assert sorted(lines()) == [f"layer 0: plain gradient, {FAILED}", f"layer 2: plain gradient, {FAILED}"]
    assert_plain(model, twin, x, y)


def test_a_zero_gradient_is_no_failure_but_told(lines):
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, share="none")
    (F.cross_entropy(model(x), y) * 0).backward()
    stats = opt.stats()
    assert (stats["failed_solves"], stats["zero_grams"]) == (0, 2)
    assert stats["fallbacks"] == {"0": {ZERO: 1}, "2": {ZERO: 1}}
    assert len(lines()) == 2
    assert all((gradient == 0).all() for gradient in gradients(model))


def test_a_gradient_too_small_for_its_gram_matrix_is_plain_and_told():
    model, x, y = make("mlp", N, torch.float32)
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, share="none")
    (F.cross_entropy(model(x), y) * 1e-20).backward()
    (F.cross_entropy(twin(x), y) * 1e-20).backward()
    assert opt.stats()["fallbacks"] == {"0": {ZERO: 1}, "2": {ZERO: 1}}
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-4, atol=0)


def test_rows_that_are_no_samples(lines):
    model = nn.Sequential(nn.Linear(4, 5), nn.Flatten(0, 1), nn.Linear(5, 3))
    opt = fngd.FNGD(model)
    for _ in range(10):
        opt.set_samples(range(6))
        model(torch.randn(6, 7, 4)).square().mean().backward()
        opt.step()
    reason = "its input has other rows than the batch's samples"
    assert opt.stats()["fallbacks"] == {"2": {reason: 10}}
    told = "layer 2: plain gradient, its input has 42 rows, the batch has 6 samples"
    assert lines() == [told, f"{told} (10 times so far)"]


def test_steps_that_are_left_out(lines):
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, share="none")
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(model(x * float("nan")), y).backward()
        opt.step()
    assert opt.stats()["skipped_steps"] == 2
    assert [line for line in lines() if "step" in line] == ["step: left out, its gradient is not finite"]


@pytest.mark.parametrize("hooked", [False, True], ids=["at the end", "inside backward"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "cpu"],
)
def test_when_memory_runs_out_the_workspace_is_halved_until_it_suffices(monkeypatch, error, hooked, lines):
    """The first layer's matrix takes 8 MiB here, the second one's more than there is."""
    model, x, y = make("mlp", N)
    twin, calm = copy.deepcopy(model), copy.deepcopy(model)
    opts = [fngd.FNGD(m, share="none") for m in (model, calm)]
    if hooked:
        for p in model.parameters():
            p.register_hook(lambda g: g)
    F.cross_entropy(calm(x), y).backward()
    tried, real = [], fngd.preconditioner.block_gram

    def scarce(uses, sketch):
        tried.append((next(iter(uses)).module is model[0], default_workspace() >> 20))
        if not (tried[-1][0] and default_workspace() <= 8 << 20):
            raise error
        return real(uses, sketch)

    monkeypatch.setattr(fngd.preconditioner, "block_gram", scarce)
    F.cross_entropy(model(x), y).backward()
    assert [size for first, size in tried if first] == [64, 32, 16, 8]
    assert [size for first, size in tried if not first] == [64, 32, 16, 8, 4, 2, 1]
    assert default_workspace() == 64 << 20
    assert opts[0].stats()["fallbacks"] == {"2": {OUT_OF_MEMORY: 1}}
    assert lines() == [f"layer 2: plain gradient, {OUT_OF_MEMORY}"]
    F.cross_entropy(twin(x), y).backward()
    torch.testing.assert_close(gradients(model), gradients(calm)[:2] + gradients(twin)[2:])


def test_other_errors_in_a_kernel_reach_the_user(monkeypatch):
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, share="none")

    def broken(uses, sketch):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(fngd.preconditioner, "block_gram", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        F.cross_entropy(model(x), y).backward()
    assert opt.stats()["fallbacks"] == {}


@pytest.mark.parametrize("damping", ["lm", 0.1])
def test_gauss_newton_steps_that_are_left_out(damping, lines):
    model, x = nn.Linear(3, 1), torch.randn(5, 3)
    opt = fngd.GaussNewton(model, damping=damping, line_search=damping != "lm")
    for _ in range(10):
        opt.step(lambda: model(x * float("nan")).squeeze(-1))
    opt.step(lambda: model(x).squeeze(-1) * 0 + 1)  # stationary
    left_out = "step: left out, its loss or Jacobian is not finite"
    assert lines() == [left_out, f"{left_out} (10 times so far)"]
    calls = iter(range(100))
    opt.step(lambda: model(x).squeeze(-1) + next(calls))  # every trial raises the loss
    assert lines()[2:] == ["step: given up after 12 trials"]
    assert (opt.stats()["skipped_steps"], opt.stats()["given_up_steps"]) == (10, 1)


def test_counts_are_part_of_the_state(lines):
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, share="none")
    for factor in (0.0, float("nan")):
        opt.zero_grad()
        (F.cross_entropy(model(x), y) * factor).backward()
        opt.step()
    other = fngd.FNGD(copy.deepcopy(model), share="none")
    other.load_state_dict(opt.state_dict())
    keys = ("failed_solves", "zero_grams", "raised_dampings", "fallbacks", "skipped_steps")
    stats = opt.stats()
    assert {key: other.stats()[key] for key in keys} == {key: stats[key] for key in keys}
    assert (stats["failed_solves"], stats["zero_grams"], stats["skipped_steps"]) == (2, 2, 1)
    assert len(lines()) == 5


@pytest.mark.gpu
def test_on_a_device_counts_arrive_without_waiting(lines):
    model, x, y = make("mlp", N, torch.float32)
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    opt = fngd.FNGD(model, share="none")
    bad = x * float("nan")
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(model(bad), y).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert "step: left out, its gradient is not finite" in lines()
    assert f"layer 0: plain gradient, {FAILED}" in lines()
    stats = opt.stats()
    assert (stats["skipped_steps"], stats["fallbacks"]["0"]) == (3, {FAILED: 3})


@pytest.mark.gpu
def test_a_step_that_does_not_fit_a_device():
    """Captured tensors fit, the rows of the generic rule do not."""
    torch.cuda.empty_cache()
    model = nn.LSTM(512, 512, batch_first=True).cuda()
    opt = fngd.FNGD(model, share="none")
    x = torch.randn(256, 4, 512, device="cuda")
    model(x)[0].square().mean().backward()  # the libraries' own memory, once
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    opt.zero_grad()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (192 << 20)) / total)
    try:
        model(x)[0].square().mean().backward()
        opt.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert opt.stats()["fallbacks"] == {"": {OUT_OF_MEMORY: 1}}
    assert all(p.isfinite().all() for p in model.parameters())
