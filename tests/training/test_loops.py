"""Training loops as people write them, each run twice: by FNGD, and by torch's SGD on gradients from the
definition in float64; and what a loop may not do."""

import copy
import gc
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, TensorDataset

import fngd
from networks import NETWORKS, make
from trajectory import Definition

SAMPLES, N = 10, 4


class Ours:
    """A model with FNGD, under the names that its definition has."""

    def __init__(self, model):
        self.model, self.opt = model, None

    def optimizer(self, params=None, **options):
        self.opt = fngd.FNGD(self.model, params=params, norms="weighted", **options)
        return self.opt

    def name(self, ids):
        self.opt.set_samples(ids)

    def backward(self, contributions):
        contributions.sum().backward()


class Theirs(Definition):
    def optimizer(self, params=None, **options):
        return torch.optim.SGD(self.model.parameters() if params is None else params, **options)


def epochs(drop_last=False, samples=SAMPLES, size=N):
    """Yield the ids of the batches of two epochs; the last ones are short."""
    for order in (torch.arange(samples), torch.randperm(samples, generator=torch.Generator().manual_seed(1))):
        batches = order.split(size)
        yield from (ids.tolist() for ids in batches if len(ids) == size or not drop_last)


def forward(side, x, y, ids):
    """Return the losses of the named samples."""
    side.name(ids)
    return F.cross_entropy(side.model(x[ids]), y[ids], reduction="none")


def step_by_step(reduce=torch.Tensor.mean, set_to_none=True, before_step=lambda model: None, **options):
    """Return the usual loop, with what can vary in it."""

    def loop(side, x, y):
        opt = side.optimizer(lr=0.1, momentum=0.9, **options)
        for ids in epochs():
            opt.zero_grad(set_to_none=set_to_none)
            losses = forward(side, x, y, ids)
            side.backward(losses / len(ids) if reduce is torch.Tensor.mean else losses)
            before_step(side.model)
            opt.step()

    return loop


def drop_last(side, x, y):
    opt = side.optimizer(lr=0.1)
    for ids in epochs(drop_last=True):
        side.backward(forward(side, x, y, ids) / N)
        opt.step()
        opt.zero_grad()


def weighted_mean(side, x, y):
    """Labels weigh differently, as tokens do in sentences of different lengths."""
    opt, weight = side.optimizer(lr=0.1), torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    for ids in epochs():
        side.name(ids)
        losses = F.cross_entropy(side.model(x[ids]), y[ids], weight=weight, reduction="none")
        opt.zero_grad()
        side.backward(losses / weight[y[ids]].sum())
        opt.step()


def accumulation(side, x, y):
    """Two micro-batches a step, each with the Gram matrix of its own samples."""
    opt = side.optimizer(lr=0.1)
    for ids in epochs():
        for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
            side.backward(forward(side, x, y, part) / len(ids))
        opt.step()
        opt.zero_grad()


def two_losses_one_backward(side, x, y):
    opt = side.optimizer(lr=0.1)
    for ids in epochs():
        side.name(ids)
        output = side.model(x[ids])
        losses = F.cross_entropy(output, y[ids], reduction="none") + 0.1 * output.square().sum(1)
        opt.zero_grad()
        side.backward(losses / len(ids))
        opt.step()


def two_backwards(side, x, y):
    """A second forward with other labels; what its backward solved for is what is kept."""
    opt = side.optimizer(lr=0.1)
    for ids in epochs():
        opt.zero_grad()
        side.name(ids)
        for labels in (y, (y + 1) % 3):
            side.backward(F.cross_entropy(side.model(x[ids]), labels[ids], reduction="none") / len(ids))
        opt.step()


def closure(side, x, y):
    opt = side.optimizer(lr=0.1, momentum=0.9)
    for ids in epochs():

        def evaluate(ids=ids):
            opt.zero_grad()
            losses = forward(side, x, y, ids)
            side.backward(losses / len(ids))
            return losses.mean()

        assert opt.step(evaluate).isfinite()


def groups_and_schedulers(side, x, y):
    biases = [p for name, p in side.model.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in side.model.named_parameters() if not name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": biases, "lr": 0.2}]
    opt = side.optimizer(groups, lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=[0.1, 0.2], total_steps=6)
    for ids in epochs():
        opt.zero_grad()
        side.backward(forward(side, x, y, ids) / len(ids))
        opt.step()
        schedule.step()


def joining_group(side, x, y):
    """A parameter outside the model, added while training."""
    opt = side.optimizer(lr=0.1)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for step, ids in enumerate(epochs()):
        if step == 2:
            opt.add_param_group({"params": [shift], "lr": 0.3})
        opt.zero_grad()
        side.name(ids)
        logits = side.model(x[ids]) + shift.detach() * torch.arange(3)
        side.backward(F.cross_entropy(logits, y[ids], reduction="none") / len(ids))
        shift.grad = torch.full_like(shift, 0.1)
        opt.step()
    assert shift.item() == pytest.approx(-0.12)


def growing_data(side, x, y):
    opt = side.optimizer(lr=0.1)
    for samples in (5, 5, 7, SAMPLES):
        for ids in torch.arange(samples).split(N):
            opt.zero_grad()
            side.backward(forward(side, x, y, ids.tolist()) / len(ids))
            opt.step()


def scaler(**options):
    def loop(side, x, y):
        opt = side.optimizer(lr=0.1, momentum=0.9, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
        for ids in epochs():
            opt.zero_grad()
            side.backward(scaler.scale(forward(side, x, y, ids) / len(ids)))
            if "fused" not in options:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(side.model.parameters(), 0.5)
            scaler.step(opt)
            scaler.update()

    return loop


LOOPS = {
    "mean, short last batch": step_by_step(),
    "sum": step_by_step(reduce=torch.Tensor.sum),
    "zero_grad without None": step_by_step(set_to_none=False),
    "clipped norm": step_by_step(before_step=lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.3)),
    "clipped values": step_by_step(before_step=lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.02)),
    "fused": step_by_step(fused=True, nesterov=True),
    "drop_last": drop_last,
    "weighted mean": weighted_mean,
    "accumulation": accumulation,
    "two losses, one backward": two_losses_one_backward,
    "two backwards": two_backwards,
    "closure": closure,
    "groups and schedulers": groups_and_schedulers,
    "joining group": joining_group,
    "growing data": growing_data,
    "scaler and clipping": scaler(),
    "scaler, fused": scaler(fused=True),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_trains_what_the_definition_trains(loop, network):
    model, x, y = make(network, SAMPLES)
    theirs = Theirs(model)
    before = copy.deepcopy(model.state_dict())
    LOOPS[loop](Ours(model), x, y)
    LOOPS[loop](theirs, x, y)
    for (name, p), q in zip(model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
        assert not torch.equal(p, before[name])


# ---- loops of several models and optimizers


def test_several_models_in_one_loop_hear_of_one_loader():
    models, twins = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        model, x, y = make("mlp", SAMPLES)
        models.append(model)
        twins.append(Definition(model))
    opts = [fngd.FNGD(model, lr=0.1) for model in models]
    references = [torch.optim.SGD(twin.model.parameters(), lr=0.1) for twin in twins]
    data = TensorDataset(x, y, torch.arange(SAMPLES))
    for _ in range(2):
        for inputs, labels, ids in fngd.track(DataLoader(data, batch_size=N, shuffle=True), *opts):
            first, second = (model(inputs) for model in models)
            loss = F.cross_entropy(first, labels) + F.cross_entropy(second + first.detach(), labels)
            loss.backward()
            first = twins[0].model(inputs)
            for twin, logits in zip(twins, (first, twins[1].model(inputs) + first.detach()), strict=True):
                twin.name(ids.tolist())
                twin.backward(F.cross_entropy(logits, labels, reduction="none") / len(ids))
            for optimizer in (*opts, *references):
                optimizer.step()
                optimizer.zero_grad()
    for model, twin in zip(models, twins, strict=True):
        for p, q in zip(model.parameters(), twin.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    assert [opt.stats()["seen_samples"] for opt in opts] == [SAMPLES, SAMPLES]


def test_two_optimizers_for_parts_of_one_model():
    model, x, y = make("mlp", SAMPLES)
    twin = Definition(model)
    parts = [fngd.FNGD(model, lr=lr, params=model[i].parameters()) for i, lr in ((0, 0.1), (2, 0.05))]
    reference = torch.optim.SGD(
        [{"params": twin.model[i].parameters(), "lr": lr} for i, lr in ((0, 0.1), (2, 0.05))]
    )
    for ids in epochs():
        for opt in parts:
            opt.set_samples(ids)
        F.cross_entropy(model(x[ids]), y[ids]).backward()
        twin.name(ids)
        twin.backward(F.cross_entropy(twin.model(x[ids]), y[ids], reduction="none") / len(ids))
        for optimizer in (*parts, reference):
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_a_dataset_that_grows_between_the_epochs_of_a_tracked_loader():
    model, x, y = make("mlp", SAMPLES)
    theirs, samples = Definition(model), [(x[0], y[0], 0)]
    opt, reference = fngd.FNGD(model, lr=0.1), torch.optim.SGD(theirs.model.parameters(), lr=0.1)
    loader = fngd.track(DataLoader(samples, batch_size=N, shuffle=True), opt)
    solved = []
    for size in (5, 5, 7, SAMPLES, SAMPLES):
        samples += [(x[i], y[i], i) for i in range(len(samples), size)]
        for inputs, labels, ids in loader:
            theirs.name(ids.tolist())
            F.cross_entropy(model(inputs), labels).backward()
            theirs.backward(F.cross_entropy(theirs.model(inputs), labels, reduction="none") / len(ids))
            for optimizer in (opt, reference):
                optimizer.step()
                optimizer.zero_grad()
        assert opt.stats()["seen_samples"] == size
        solved.append(opt.stats()["solved_batches"])
    assert solved[0] == solved[1] == 2
    assert solved[3] == solved[4]
    for p, q in zip(model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


# ---- mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", ["mlp", "sequence", "conv2d-groups-reflect", "reused", "transformer"])
def test_autocast_costs_no_more_accuracy_than_it_costs_torch(network, dtype):
    model, x, y = make(network, SAMPLES)
    weighted, unweighted = Definition(model), copy.deepcopy(model)
    F.cross_entropy(unweighted(x), y).backward()
    model, x32 = model.float(), x.float() if x.is_floating_point() else x
    plain = copy.deepcopy(model)
    opt = fngd.FNGD(model, lr=0.0, norms="weighted")

    def error(net, truth):
        pairs = list(zip(net.parameters(), truth.parameters(), strict=True))
        difference = sum((p.grad.double() - q.grad).square().sum() for p, q in pairs)
        return float((difference / sum(q.grad.square().sum() for _, q in pairs)).sqrt())

    def backward(net):
        net.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(net(x32), y)
        loss.backward()

    backward(plain)
    for _ in range(2):  # solves, then shares
        weighted.model.zero_grad()
        weighted.name(range(SAMPLES))
        weighted.backward(F.cross_entropy(weighted.model(x), y, reduction="none") / SAMPLES)
        opt.set_samples(range(SAMPLES))
        backward(model)
        assert error(model, weighted.model) <= 2 * error(plain, unweighted) + torch.finfo(dtype).eps
        assert error(model, unweighted) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", ["mean", "lambda", "graft"])
@pytest.mark.parametrize("damping_mode", ["trace", "mean_eig"])
@pytest.mark.parametrize("network", ["mlp", "conv2d-groups-reflect", "language-model-bias", "lstm"])
def test_relative_damping_gives_coefficients_free_of_the_loss_scale(network, damping_mode, normalize, dtype):
    found = []
    for scale in (1.0, 2.0**24, 2.0**-10):
        torch.manual_seed(0)
        model, x, y = make(network, SAMPLES, dtype)
        opt = fngd.FNGD(model, lr=0.0, damping_mode=damping_mode, normalize=normalize)
        opt.set_samples(range(SAMPLES))
        (scale * F.cross_entropy(model(x), y)).backward()
        opt.step()
        assert opt.stats()["seen_samples"] == SAMPLES
        found.append([opt._schedule.table.values, *(p.grad / scale for p in model.parameters())])
    for unscaled, *scaled in zip(*found, strict=True):
        for other in scaled:
            assert torch.equal(unscaled, other)  # powers of two


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_nothing(fused):
    model, x, y = make("mlp", SAMPLES, torch.float32)
    opt = fngd.FNGD(model, lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-5)
    before, solved = copy.deepcopy(model.state_dict()), []
    for _ in range(6):
        opt.zero_grad()
        opt.set_samples(range(SAMPLES))
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        skipped = not all(p.grad.isfinite().all() for p in model.parameters())
        scaler.step(opt)
        scaler.update()
        if skipped:
            assert opt.stats()["seen_samples"] == 0
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name])
            for state in opt.state.values():
                assert not state["momentum_buffer"].any()
        solved.append(opt.stats()["solved_batches"])
    assert skipped is False
    assert 1 < solved[-1] < 6  # solved for until the scale fits, once more there, then shared
    unscaled = copy.deepcopy(model)
    unscaled.load_state_dict(before)
    again = fngd.FNGD(unscaled, lr=0.1)
    again.set_samples(range(SAMPLES))
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(unscaled(x), y)
    loss.backward()
    again.step()
    torch.testing.assert_close(opt._schedule.table.values, again._schedule.table.values, rtol=2e-2, atol=0)


@pytest.mark.parametrize("share", ["sample", "position", "mean"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_in_mid_training_changes_nothing_either(fused, base, share):
    """Samples that are known, and samples of a batch with new ones: overflowing, both stay as they are."""
    model, x, y = make("mlp", SAMPLES, torch.float32)
    options = {"momentum": 0.9} if base == "sgd" else {}
    opt = fngd.FNGD(model, lr=0.1, base=base, share=share, fused=fused, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)

    def step(ids, factor=1.0):
        opt.zero_grad()
        opt.set_samples(ids)
        scaler.scale(factor * F.cross_entropy(model(x[ids]), y[ids])).backward()
        scaler.step(opt)
        scaler.update()

    def state():
        whole = copy.deepcopy([model.state_dict(), opt.state_dict()])
        own = whole[1]["fngd"]
        for counter in ("solved_batches", "solves", "fallbacks", "outcomes", "skipped_steps"):
            own.pop(counter)
        return tree_flatten(whole)[0]

    opt.start_epoch(SAMPLES)
    for ids in (range(4), range(2, 8)):
        step(list(ids))
    before, known = state(), list(range(2, 8))
    for ids in (known, [0, 1, 8, 9]):
        step(ids, float("inf"))
        for old, new in zip(before, state(), strict=True):
            assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
    assert opt.stats()["skipped_steps"] == 2 * fused  # otherwise the scaler does not call step
    opt.set_samples(known)
    assert opt.solving == (share != "sample")
    step([0, 1, 8, 9])
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=False))


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_without_any_gradient(fused):
    model, *_ = make("mlp", N, torch.float32)
    opt = fngd.FNGD(model, lr=0.1, momentum=0.9, share="none", fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros((), requires_grad=True)).backward()
    if fused:
        scaler.step(opt)
        assert opt.stats()["skipped_steps"] == 0
    else:  # as with every optimizer of torch's
        with pytest.raises(AssertionError, match="No inf checks"):
            scaler.step(opt)


# ---- what a loop leaves behind


@pytest.mark.parametrize("share", ["sample", "position", "mean", "none"])
def test_a_thousand_steps_leave_no_more_than_a_hundred(share):
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
    opt = fngd.FNGD(model, lr=1e-3, momentum=0.9, share=share, refresh_every=7)
    data = TensorDataset(torch.randn(40, 3), torch.randint(0, 3, (40,)))
    loader, held = fngd.track(DataLoader(data, batch_size=2, shuffle=True), opt), []
    for epoch in range(50):
        for x, y in loader:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        if epoch in (7, 49):  # the eighth epoch solves, as does the last
            gc.collect()
            kept = gc.get_objects()
            tensors = [each for each in kept if issubclass(type(each), torch.Tensor)]
            own = [each for each in kept if str(type(each).__module__).startswith("fngd")]
            held.append((len(own), len(tensors), sum(each.untyped_storage().nbytes() for each in tensors)))
            del kept, tensors, own
    assert all(later <= earlier for earlier, later in zip(*held, strict=True))


def test_a_loop_raises_no_warnings():
    program = """
        import torch, fngd
        from torch.utils.data import DataLoader, TensorDataset

        data = TensorDataset(torch.randn(10, 4), torch.randint(0, 3, (10,)))
        for options in ({}, {"share": "none", "fused": True}, {"share": "mean", "base": "adamw"}):
            model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
            opt = fngd.FNGD(model, **options)
            schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
            for _ in range(2):
                for x, y in fngd.track(DataLoader(data, batch_size=4, shuffle=True), opt):
                    opt.zero_grad()
                    torch.nn.functional.cross_entropy(model(x), y).backward()
                    opt.step()
                schedule.step()
            opt.load_state_dict(opt.state_dict())
            opt.stats(), opt.coverage()
    """
    # But the one about a package without its extension.
    warnings = ["-W", "error", "-W", "ignore:fngd_kernels works without its native extension"]
    subprocess.run([sys.executable, *warnings, "-c", textwrap.dedent(program)], check=True)


# ---- what a loop may not do, or does with the plain gradient


def test_a_layer_that_joins_later_keeps_the_plain_gradient_and_says_so():
    model, x, y = make("mlp", SAMPLES)
    plain = copy.deepcopy(model)
    opt = fngd.FNGD(model, params=model[2].parameters(), lr=0.1)
    opt.add_param_group({"params": model[0].parameters()})
    opt.set_samples(range(SAMPLES))
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(plain(x), y).backward()
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)
    assert opt.coverage()["0.weight"] == "plain: its parameter group was added later"
    assert opt.coverage()["2.weight"] == "linear"


def test_a_frozen_layer_is_solved_for_once_it_is_trained():
    model, x, y = make("mlp", SAMPLES)
    opt = fngd.FNGD(model, lr=0.1, refresh_every=1)
    model[0].requires_grad_(False)
    for frozen in (True, False):
        model[0].requires_grad_(not frozen)
        opt.start_epoch(SAMPLES)
        opt.set_samples(range(SAMPLES))
        opt.zero_grad()
        theirs = Definition(model)
        F.cross_entropy(model(x), y).backward()
        assert (model[0].weight.grad is None) == frozen
        opt.step()
    theirs.name(range(SAMPLES))
    theirs.backward(F.cross_entropy(theirs.model(x), y, reduction="none") / SAMPLES)
    torch.testing.assert_close(model[0].weight.grad, theirs.model[0].weight.grad)


def test_a_layer_unfrozen_after_the_solving_epoch_is_plain_and_says_so_until_the_next():
    model, x, y = make("mlp", SAMPLES)
    opt = fngd.FNGD(model, lr=0.1, refresh_every=2)
    model[0].requires_grad_(False)
    reports = []
    for epoch in range(3):
        opt.start_epoch(SAMPLES)
        model[0].requires_grad_(epoch > 0)
        opt.set_samples(range(SAMPLES))
        theirs = Definition(model, plain=["0"] if epoch < 2 else [])
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if epoch > 0:
            theirs.model.zero_grad()
            theirs.name(range(SAMPLES))
            theirs.backward(F.cross_entropy(theirs.model(x), y, reduction="none") / SAMPLES)
            torch.testing.assert_close(model[0].weight.grad, theirs.model[0].weight.grad)
        reports.append(opt.coverage()["0.weight"])
        opt.step()
    assert reports == ["plain: frozen", "plain: its module took no part in a solving step", "linear"]


@pytest.mark.parametrize("steps", [SAMPLES - 1, SAMPLES, SAMPLES + 1])
def test_time_first_inputs_are_told_by_their_length_alone(steps):
    """(T, N, D): other rows than samples keep the plain gradient; T = N cannot be told from (N, T, D)."""

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.mix(x.transpose(0, 1))).mean(0))

    model, skipping = TimeFirst().double(), TimeFirst().double()
    skipping.load_state_dict(model.state_dict())
    x, y = torch.randn(SAMPLES, steps, 4, dtype=torch.float64), torch.randint(0, 3, (SAMPLES,))
    (plain,) = torch.autograd.grad(F.cross_entropy(model(x), y), model.mix.weight)
    for net, skip in ((model, ()), (skipping, ("mix",))):
        opt = fngd.FNGD(net, skip=skip)
        opt.set_samples(range(SAMPLES))
        F.cross_entropy(net(x), y).backward()
        taken = steps == SAMPLES and not skip
        assert torch.allclose(net.mix.weight.grad, plain) != taken
        assert opt.coverage()["mix.weight"].startswith("linear" if taken else "plain: ")


def test_a_forward_without_names_says_what_to_do():
    model, x, _ = make("mlp", N)
    opt = fngd.FNGD(model)
    with pytest.raises(RuntimeError, match=r"fngd\.track.*set_samples.*share='none'"):
        model(x)
    opt.detach()
    assert model(x).isfinite().all()


def test_an_update_that_evaluates_the_loss_several_times_is_refused():
    with pytest.raises(ValueError, match=r"base: LBFGS\.step\(\) needs closure"):
        fngd.FNGD(nn.Linear(2, 2), base=torch.optim.LBFGS)
