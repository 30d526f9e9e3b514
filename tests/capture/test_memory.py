"""What a step leaves behind: nothing. And that it never waits for the device."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

import fngd
from networks import NETWORKS, make

N, BATCHES = 6, 5


def live_tensors():
    """Return the tensors that Python can reach."""
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def count(tensors):
    """Return the number of tensors, and the bytes of their storages."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return len(tensors), sum(storages.values())


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("share", ["sample", "position", "mean", "none"])
def test_two_hundred_steps_leave_what_the_first_left(share, hooked):
    others = live_tensors()  # noqa: F841 - kept, so that what other tests left behind stays the same
    model, x, y = make("conv2d-groups-reflect", N, torch.float32)
    opt = fngd.FNGD(model, lr=1e-3, momentum=0.9, share=share, refresh_every=20, norms="weighted")
    for p in model.parameters() if hooked else ():
        p.register_post_accumulate_grad_hook(lambda p: None)
    held = {}
    for step in range(200):
        if step % BATCHES == 0:
            opt.start_epoch(BATCHES * N)
        first = step % BATCHES * N
        opt.set_samples(range(first, first + N))
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        if step in (4, 9, 104, 199):
            held[step] = count(live_tensors())
    assert opt.stats()["solved_batches"] == (200 if share == "none" else 2 * BATCHES)
    assert held[104] == held[4]  # after an epoch that solves
    assert held[199] == held[9]  # after one that does not, for most ways of sharing


@pytest.mark.parametrize("network", NETWORKS)
def test_a_solving_step_holds_neither_inputs_nor_gradients(monkeypatch, network):
    model, x, y = make(network, N)
    opt = fngd.FNGD(model, share="none", norms="weighted")
    held, alive_at_combine = {}, {}
    for member in opt._preconditioner.modules:
        rule = member.rule

        def watch(module, uses, s, rule=rule, combine=rule.combine):
            alive_at_combine[module] = [m for m, ref in held.items() if not ref.expired()]
            held[module] = StorageWeakRef(uses[0].e.untyped_storage())
            return combine(module, uses, s)

        if not hasattr(rule.combine, "watching"):
            watch.watching = True
            monkeypatch.setattr(rule, "combine", watch)
    F.cross_entropy(model(x), y).backward()
    assert len(held) == len(opt._preconditioner.modules)
    assert all(ref.expired() for ref in held.values())
    assert not any(alive_at_combine.values())  # the layer before was let go
    assert opt.stats()["captured_bytes"] > 0


def test_gram_matrices_are_formed_inside_backward(monkeypatch):
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, share="none")
    first, last = opt._preconditioner.blocks
    order = []
    rule = first.modules[0].rule

    def gram(module, uses, gram=rule.gram):
        order.append("gram of the first" if module is first.modules[0].module else "gram of the last")
        return gram(module, uses)

    monkeypatch.setattr(rule, "gram", gram)
    model[1].register_full_backward_hook(lambda *_: order.append("backward between them"))
    F.cross_entropy(model(x), y).backward()
    assert order == ["gram of the last", "backward between them", "gram of the first"]
    assert opt._report.solves[last.index] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("share", ["sample", "position", "mean", "none"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("network", ["mlp", "conv2d-groups-reflect", "group-norm", "sequence"])
def test_no_step_waits_for_the_device(network, base, share):
    model, x, y = make(network, N, torch.float32)
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    opt = fngd.FNGD(model, lr=0.01, base=base, share=share, norms="weighted")

    def step(ids):
        opt.set_samples(ids)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()

    opt.start_epoch()
    for first in (0, N):  # compiles kernels, makes the optimizer's state
        step(range(first, first + N))
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(range(2 * N, 3 * N))  # solves
    finally:
        torch.cuda.set_sync_debug_mode("default")
    opt.start_epoch()
    step(range(N))
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(range(N, 2 * N))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.stats()["solved_batches"] == (5 if share == "none" else 3)
