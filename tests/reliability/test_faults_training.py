"""Faults in a step: it is left out or lost, and the run goes on as one without it, bit for bit."""

import gc
import weakref

import pytest
import torch
from faulty_run import EPOCH, STEPS, Run
from torch.nn import functional as F

AREA = "Faults in training"
SHARES = ("sample", "none", "position", "GaussNewton")
CASES = [
    (share, base)
    for share in SHARES
    for base in ("sgd", "adamw")
    if (share, base) != ("GaussNewton", "adamw")
]


def nan_in_one_sample(x):
    x[2] = float("nan")


def inf_in_one_element(x):
    x[2, 1] = float("inf")


def nan_everywhere(x):
    x.fill_(float("nan"))


def raised(step, *arguments, error=ArithmeticError):
    """Make a step that must raise, as a loop that catches what it raises; nothing keeps the traceback."""
    try:
        step(*arguments)
    except error:
        return True
    return False


def compared(share, base, at, fail):
    """Return a run with `fail(run)` before step `at`, after it was compared with the run without."""
    run, whole = Run(share, base), Run(share, base)
    first = run.loss()
    run.train(range(at))
    whole.train(range(STEPS))
    before = run.loss()
    fail(run)
    assert run.loss() == before
    run.train(range(at, STEPS))
    run.assert_same(whole)
    assert run.loss() < first
    return run


@pytest.mark.parametrize("at", [2, EPOCH + 2])
@pytest.mark.parametrize(("share", "base"), CASES)
@pytest.mark.parametrize("spoil", [nan_in_one_sample, inf_in_one_element, nan_everywhere])
def test_a_batch_that_is_not_finite(spoil, share, base, at, tally):
    def fail(run):
        x, y = run.batch(at)
        spoil(x)
        run.make_step(x, y)

    run = compared(share, base, at, fail)
    assert run.opt.stats()["skipped_steps"] == 1
    tally(
        AREA,
        f"batch with {spoil.__name__.replace('_', ' ')}",
        "left out and counted, then bitwise the run without it",
    )


@pytest.mark.parametrize("at", [2, EPOCH + 2])
@pytest.mark.parametrize(("share", "base"), CASES)
def test_a_target_that_is_not_finite(share, base, at, tally):
    def fail(run):
        x, y = run.batch(at)
        target = F.one_hot(y, 3).float()
        target[1, 2] = float("nan")
        if share == "GaussNewton":
            run.opt.step(lambda: run.model(x) - target)
            return
        run.opt.zero_grad()
        (run.model(x) - target).square().mean().backward()
        run.opt.step()

    run = compared(share, base, at, fail)
    assert run.opt.stats()["skipped_steps"] == 1
    tally(AREA, "batch with a target that is NaN", "left out and counted, then bitwise the run without it")


@pytest.mark.parametrize("at", [2, EPOCH + 2])
@pytest.mark.parametrize(("share", "base"), CASES)
@pytest.mark.parametrize("where", ["forward", "backward", "loss"])
def test_an_exception_that_the_loop_catches(where, share, base, at, tally):
    left = []

    def fail(run):
        x, y = run.batch(at)
        run.fault.where = where
        handle = run.model[2].register_forward_hook(
            lambda module, args, output: left.append(weakref.ref(output))
        )
        left.append(weakref.ref(x))
        if where == "loss":
            y[1] = 7  # no such class
        assert raised(run.make_step, x, y, error=(ArithmeticError, IndexError, RuntimeError))
        run.fault.where = ""
        handle.remove()
        if share != "GaussNewton":
            assert all(p.grad is None for p in run.model[0].parameters())

    run = compared(share, base, at, fail)
    gc.collect()
    assert all(each() is None for each in left)
    if share != "GaussNewton":
        assert not run.opt._preconditioner._backwards
        assert not any(run.opt._preconditioner._open.values())
    tally(
        AREA,
        f"exception in the {where}, caught by the loop",
        "nothing left behind, then bitwise the run without it",
    )


@pytest.mark.parametrize("share", ["sample", "none", "position"])
@pytest.mark.parametrize("at", [2, EPOCH + 2])
def test_a_step_that_the_scaler_skips(share, at, tally):
    def fail(run):
        x, y = run.batch(at)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        run.opt.zero_grad()
        scaler.scale(F.cross_entropy(run.model(x), y) * 16).backward()
        scaler.step(run.opt)
        scaler.update()
        assert scaler.get_scale() < 2.0**127

    compared(share, "sgd", at, fail)
    tally(AREA, "step that a GradScaler skips", "bitwise the run without it")


@pytest.mark.parametrize("share", ["sample", "none"])
def test_an_exception_where_gradients_are_awaited(share, tally):
    """A hook on a parameter makes its layer solve inside backward, before a later layer raises."""

    def fail(run):
        x, y = run.batch(2)
        handle = run.model[4].weight.register_hook(lambda gradient: gradient)
        run.fault.where = "backward"
        assert raised(run.make_step, x, y)
        run.fault.where = ""
        handle.remove()

    compared(share, "sgd", 2, fail)
    tally(AREA, "exception in backward after a layer has solved", "bitwise the run without it")
