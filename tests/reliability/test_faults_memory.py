"""Memory that runs out in a solving step: less scratch memory, then the plain gradient, counted, logged."""

import copy
import logging

import pytest
import torch
from faulty_run import Run
from torch.nn import functional as F

import fngd.preconditioner
from fngd.coefficients import OUT_OF_MEMORY
from fngd.memory import HALVINGS
from fngd_kernels.workspace import default_workspace

AREA = "Faults in training"
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    MemoryError("std::bad_alloc"),
]


def fail_at_first(monkeypatch, times, error):
    """Let every Gram matrix fail so many times; return the scratch memory of each attempt."""
    gram, attempts = fngd.preconditioner.block_gram, []

    def failing(uses, sketch):
        attempts.append(default_workspace())
        if len(attempts) <= times:
            raise error
        return gram(uses, sketch)

    monkeypatch.setattr(fngd.preconditioner, "block_gram", failing)
    return attempts


@pytest.mark.parametrize("share", ["sample", "none", "position"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("times", [1, HALVINGS])
def test_less_memory_gives_the_same_step(share, error, times, monkeypatch, tally):
    run, whole = Run(share), Run(share)
    whole.train(range(6))
    run.train(range(2))
    with monkeypatch.context() as patch:
        attempts = fail_at_first(patch, times, error)
        run.train([2])
    run.train(range(3, 6))
    assert attempts[: times + 1] == [attempts[0] // 2**i for i in range(times + 1)]
    run.assert_same(whole)
    assert run.opt.stats()["fallbacks"] == {}
    tally(AREA, "memory runs out, less is enough", "bitwise the same step")


@pytest.mark.parametrize("share", ["sample", "none", "position"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_no_memory_at_all_gives_the_plain_gradient(share, error, monkeypatch, caplog, tally):
    caplog.set_level(logging.WARNING, "fngd")
    run = Run(share)
    run.train(range(2))
    x, y = run.batch(2)
    twin = copy.deepcopy(run.model)
    F.cross_entropy(twin(x), y).backward()
    with monkeypatch.context() as patch:
        fail_at_first(patch, 10**9, error)
        for _ in range(12):
            x, y = run.batch(2)
            run.opt.zero_grad()
            F.cross_entropy(run.model(x), y).backward()
            for p, q in zip(run.model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
    names = ("0", "2", "4")
    assert run.opt.stats()["fallbacks"] == {name: {OUT_OF_MEMORY: 12} for name in names}
    lines = [record.getMessage() for record in caplog.records if OUT_OF_MEMORY in record.getMessage()]
    assert len(lines) == 2 * len(names)  # the first and the tenth time
    run.train(range(3, 6))
    assert run.opt.stats()["fallbacks"] == {name: {OUT_OF_MEMORY: 12} for name in names}
    tally(AREA, "memory runs out whatever is tried", "plain gradient, counted and logged", 12)


def test_other_errors_are_not_taken_for_it(monkeypatch, tally):
    run = Run("none")
    fail_at_first(monkeypatch, 1, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run.train([0])
    tally(AREA, "another RuntimeError in a Gram matrix", "reaches the caller")
