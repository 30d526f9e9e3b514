"""FNGD as a torch optimizer: trajectories, phases, reports, state, bad input."""

import copy
import functools
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fngd
import oracles
from fngd.coefficients.table import Table
from networks import blocks, make, sample_gradients

N = 8


def train(model, opt, x, y, steps, ids=None, loss_of=F.cross_entropy):
    losses = []
    for _ in range(steps):
        if ids is not None:
            opt.set_samples(ids)
        opt.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    return torch.stack(losses) if losses else None


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
        ("sgd", {"momentum": 0.9, "foreach": False}),
        ("sgd", {"momentum": 0.9, "fused": True}),
        ("adamw", {"betas": (0.8, 0.99), "weight_decay": 1e-2}),
        (torch.optim.RMSprop, {"alpha": 0.9}),
    ],
)
@pytest.mark.parametrize("share", ["none", "sample", "position", "mean"])
def test_unit_weights_give_the_base_optimizer_trajectory(base, options, share):
    model, x, y = make("conv2d-groups-reflect", N, torch.float32)
    twin = copy.deepcopy(model)
    reference = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}.get(base, base)
    reference = reference(twin.parameters(), lr=0.02, **options)
    opt = fngd.FNGD(model, lr=0.02, base=base, share=share, damping=1e12, **options)  # s = 1 to 1e-12

    expected = train(twin, reference, x, y, 50)
    actual = train(model, opt, x, y, 50, torch.arange(N))

    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_samples_keep_their_coefficients_until_refreshed():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, lr=0.1, refresh_every=2)
    ids = torch.tensor([3, 1, 7, 0, 2, 5, 6, 4])
    solved = []
    for _ in range(4):
        opt.start_epoch(N)
        train(model, opt, x, y, 1, ids)
        solved.append(opt.stats()["solved_batches"])
    assert solved == [1, 1, 2, 2]


def test_a_batch_with_one_unseen_sample_is_solved():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model)
    train(model, opt, x[:4], y[:4], 1, torch.arange(4))
    train(model, opt, x[:4], y[:4], 1, torch.tensor([3, 2, 1, 0]))
    assert opt.stats()["solved_batches"] == 1
    train(model, opt, x[:4], y[:4], 1, torch.tensor([0, 1, 2, 9]))
    assert opt.stats()["solved_batches"] == 2
    assert opt.stats()["solve_seconds"] > 0
    assert opt.stats()["seen_samples"] == 5


@pytest.mark.parametrize("hooked", [False, True], ids=["at the end of backward", "layer by layer"])
def test_known_samples_keep_their_weights_beside_a_new_one(hooked):
    model, x, y = make("mlp", N)
    if hooked:
        for p in model.parameters():
            p.register_hook(lambda gradient: gradient)
    opt = fngd.FNGD(model, lr=0.1)
    for _ in range(2):  # solved for, then known
        train(model, opt, x[:4], y[:4], 1, torch.arange(4))
    before = opt._schedule.table.values.clone()
    train(model, opt, x[2:6], y[2:6], 1, torch.arange(2, 6))
    solved = torch.stack(oracles.solved(opt)).float()
    after = opt._schedule.table.values
    assert torch.equal(after[:, :4], before[:, :4])
    assert torch.equal(after[:, 4:6], solved[:, 2:])
    assert not torch.equal(solved[:, :2], before[:, 2:4])


def test_coefficients_follow_samples_through_a_reordered_batch():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, lr=0.0)
    train(model, opt, x, y, 1, torch.arange(N))
    order = torch.randperm(N)
    train(model, opt, x, y, 1, torch.arange(N))
    expected = [p.grad.clone() for p in model.parameters()]
    train(model, opt, x[order], y[order], 1, order)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize(("share", "width"), [("position", N), ("mean", 1)])
def test_means_are_collected_in_the_first_epoch_and_then_shared(share, width):
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, lr=0.0, share=share, normalize="lambda")
    seen = []
    opt.start_epoch()
    for _ in range(3):
        x = torch.randn_like(x)
        train(model, opt, x, y, 1)
        seen.append(torch.stack(oracles.solved(opt)))
    expected = torch.stack(seen).mean(0).float()
    expected = expected if share == "position" else expected.mean(1, keepdim=True)
    torch.testing.assert_close(opt._schedule.table.values, expected)

    opt.start_epoch()
    train(model, opt, x, y, 1)
    assert opt.stats()["solved_batches"] == 3
    assert opt._schedule.table.values.shape[1] == width
    weights = expected.expand(-1, N).double()
    opt.detach()
    shared = [p.grad.clone() for p in model.parameters()]
    for row, gradient in zip((0, 0, 1, 1), range(4), strict=True):
        rows = torch.stack(
            [
                torch.autograd.grad(
                    F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters())
                )[gradient]
                for n in range(N)
            ]
        )
        torch.testing.assert_close(shared[gradient], torch.einsum("n,n...->...", weights[row], rows) / N)


@pytest.mark.parametrize("share", ["position", "mean"])
@pytest.mark.parametrize("normalize", ["mean", "lambda"])
def test_a_longer_batch_than_any_that_was_solved_for_shares_the_mean_weight(share, normalize):
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, lr=0.0, share=share, normalize=normalize)
    opt.start_epoch()
    train(model, opt, x[:3], y[:3], 1)
    weights = oracles.solved(opt)
    train(model, opt, x * float("nan"), y, 1)  # not learned from
    opt.start_epoch()
    assert not opt.solving
    train(model, opt, x, y, 1)
    assert opt.stats()["solved_batches"] == 2
    truth = blocks(copy.deepcopy(model), sample_gradients(copy.deepcopy(model), x, y))
    for layer, s in zip(opt._preconditioner.blocks, weights, strict=True):
        mean = s.mean().expand(N)
        s = torch.cat([s, mean[3:]]) if share == "position" else mean
        actual = torch.cat([p.grad.flatten() for p in layer.parameters])
        torch.testing.assert_close(actual, s @ truth[layer.name] / N, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("share", ["position", "mean"])
@pytest.mark.parametrize("steps", [0, 1])
def test_an_epoch_that_learned_nothing_leaves_the_next_one_to_solve(share, steps):
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, lr=0.1, share=share)
    solving = []
    for epoch in range(4):
        opt.start_epoch()
        solving.append(opt.solving)
        train(model, opt, x if epoch else x * float("nan"), y, 1 if epoch else steps)
    assert solving == [True, True, False, False]


def test_gradient_accumulation_solves_each_micro_batch():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, share="none")
    F.cross_entropy(model(x[:4]), y[:4]).backward()
    first = [p.grad.clone() for p in model.parameters()]
    opt.zero_grad()
    F.cross_entropy(model(x[4:]), y[4:]).backward()
    second = [p.grad.clone() for p in model.parameters()]
    opt.zero_grad()
    F.cross_entropy(model(x[:4]), y[:4]).backward()
    F.cross_entropy(model(x[4:]), y[4:]).backward()
    for p, a, b in zip(model.parameters(), first, second, strict=True):
        torch.testing.assert_close(p.grad, a + b)


@pytest.mark.parametrize("how", ["hook", "autograd.grad"])
def test_gradients_asked_for_inside_backward_are_the_same(how):
    model, x, y = make("conv2d-groups-reflect", N)
    opt = fngd.FNGD(model, share="none", norms="weighted")
    F.cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    opt.zero_grad()
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(x), y)
    if how == "hook":
        seen = []
        for p in parameters:
            p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        loss.backward()
        assert len(seen) == len(parameters)
        actual = [p.grad for p in parameters]
    else:
        actual = torch.autograd.grad(loss, parameters)
        assert all(p.grad is None for p in parameters)
    for gradient, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("how", ["autograd.grad", "hook registered after the forward"])
def test_a_reused_layer_asked_for_out_of_the_blue_keeps_the_plain_gradient_and_says_so(how):
    model, x, y = make("reused", N)
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, share="none")
    loss, weight = F.cross_entropy(model(x), y), model.linear.weight
    if how == "autograd.grad":
        (actual,) = torch.autograd.grad(loss, weight)
    else:
        weight.register_post_accumulate_grad_hook(lambda p: None)
        loss.backward()
        actual = weight.grad
    F.cross_entropy(twin(x), y).backward()
    torch.testing.assert_close(actual, twin.linear.weight.grad)
    assert opt.coverage()["linear.weight"].startswith("plain: used several times")


def test_input_gradients_in_a_solving_step_solve_nothing():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, share="none")
    x.requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(x), y), x)
    assert opt.stats()["solved_batches"] == 0


def test_a_forward_of_an_earlier_step_that_is_kept_does_not_count_as_a_use():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, lr=0.0, share="none")
    F.cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    kept = model(x)
    opt.step()
    actual = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert kept.requires_grad
    for gradient, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_a_failed_backward_does_not_disturb_the_next():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, share="none")

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError("on purpose")

    hidden = Failing.apply(model[1](model[0](x)))
    with pytest.raises(ArithmeticError):
        F.cross_entropy(model[2](hidden), y).backward()
    assert opt._preconditioner._backwards
    opt.zero_grad()
    assert not opt._preconditioner._backwards
    F.cross_entropy(model(x), y).backward()
    actual = [p.grad.clone() for p in model.parameters()]
    opt.zero_grad()
    opt.step()
    assert not opt._preconditioner._backwards
    F.cross_entropy(model(x), y).backward()
    for gradient, p in zip(actual, model.parameters(), strict=True):
        assert torch.equal(gradient, p.grad)


@pytest.mark.parametrize("share", ["none", "sample"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_never_reaches_the_parameters(share, poison):
    model, x, y = make("mlp", N, torch.float32)
    opt = fngd.FNGD(model, lr=0.1, share=share, momentum=0.9)
    bad = x.clone()
    bad[2, 1] = poison
    before = copy.deepcopy(model.state_dict())
    train(model, opt, bad, y, 1, torch.arange(N))
    stats = opt.stats()
    assert stats["skipped_steps"] == 1
    assert stats["failed_solves"] > 0
    assert stats["seen_samples"] == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    losses = train(model, opt, x, y, 20, torch.arange(N))
    assert losses[-1] < losses[0]
    assert opt.stats()["skipped_steps"] == 1


FUSED = [
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("sgd", {}),
    ("adamw", {"amsgrad": True}),
    (torch.optim.Adagrad, {}),
]


@pytest.mark.parametrize(("base", "options"), FUSED, ids=str)
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_fused_base_leaves_out_steps_on_the_device(monkeypatch, base, options, bad_step):
    monkeypatch.setattr(torch, "empty_like", lambda t, **kwargs: torch.full_like(t, float("nan"), **kwargs))
    model, x, y = make("mlp", N, torch.float32)
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, lr=0.05, base=base, share="none", fused=True, **options)
    synchronising = fngd.FNGD(twin, lr=0.05, base=base, share="none", fused=False, **options)
    bad = x.clone()
    bad[2, 1] = float("nan")
    for step in range(4):
        batch = bad if step == bad_step else x
        train(model, opt, batch, y, 1)
        train(twin, synchronising, batch, y, 1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert opt._step_supports_amp_scaling or base is torch.optim.Adagrad  # not yet in torch 2.11
    assert not synchronising._step_supports_amp_scaling
    assert opt.stats()["skipped_steps"] == synchronising.stats()["skipped_steps"] == 1
    assert opt.state_dict()["fngd"]["skipped_steps"] == 1


def test_momentum_of_a_parameter_that_joins_later_begins_at_zero():
    model, x, y = make("mlp", N, torch.float32)
    twin = copy.deepcopy(model)
    options = {"lr": 0.1, "momentum": 0.9, "share": "none"}
    opt, reference = fngd.FNGD(model, fused=True, **options), fngd.FNGD(twin, foreach=False, **options)
    for net, optimizer in ((model, opt), (twin, reference)):
        net[2].requires_grad_(False)
        train(net, optimizer, x, y, 2)
        net[2].requires_grad_(True)
        train(net, optimizer, x, y, 2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("change", ["state", "load_state_dict", "parameter"])
def test_momentum_begins_at_zero_again_when_its_state_is_gone(change):
    model, x, y = make("mlp", N, torch.float32)
    opt = fngd.FNGD(model, lr=0.1, momentum=0.9, fused=True, share="none")
    fresh = opt.state_dict()
    train(model, opt, x, y, 2)
    replaced = []
    if change == "state":
        opt.state.clear()
    elif change == "load_state_dict":
        opt.load_state_dict(fresh)
    else:
        replaced = [torch.nn.Parameter(model[0].weight.detach().clone())]
        model[0].weight = opt.param_groups[0]["params"][0] = replaced[0]
    opt.zero_grad()
    (F.cross_entropy(model(x), y) * torch.inf).backward()
    opt.step()
    assert opt.stats()["skipped_steps"] == 1
    for p in replaced or model.parameters():
        assert not opt.state[p]["momentum_buffer"].any()


def test_dampened_momentum_keeps_the_test_of_the_host():
    model, x, y = make("mlp", N, torch.float32)
    twin = copy.deepcopy(model)
    options = {"momentum": 0.9, "dampening": 0.5, "fused": True}
    opt = fngd.FNGD(model, lr=0.1, share="none", damping=1e12, **options)
    train(model, opt, x, y, 3)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1, **options), x, y, 3)
    assert not opt._step_supports_amp_scaling
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_grad_scaler(fused, unscaled):
    model, x, y = make("mlp", N, torch.float32)
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, lr=0.1, momentum=0.9, share="none", damping=1e12, fused=fused)
    reference = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)

    def train_scaled(net, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-62, growth_interval=2)
        scales = []
        for _ in range(6):
            optimizer.zero_grad()
            scaler.scale(16 * F.cross_entropy(net(x), y)).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    assert train_scaled(model, opt) == train_scaled(twin, reference)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert opt.stats()["skipped_steps"] == int(fused)  # otherwise the scaler does not even call step


def test_a_state_of_a_fused_run_continues_without_fused_and_back():
    model, x, y = make("mlp", N, torch.float32)
    options = {"lr": 0.1, "momentum": 0.9, "share": "none"}
    opt = fngd.FNGD(model, fused=True, **options)
    train(model, opt, x, y, 2)
    fused = copy.deepcopy(opt.state_dict())
    opt.param_groups[0]["fused"] = False
    train(model, opt, x, y, 2)
    opt.load_state_dict(fused)
    losses = train(model, opt, x, y, 2)
    assert opt._step_supports_amp_scaling
    assert losses.isfinite().all()


@pytest.mark.parametrize("share", ["position", "mean"])
def test_means_take_in_no_batch_that_is_not_finite(share):
    model, x, y = make("mlp", N, torch.float32)
    opt = fngd.FNGD(model, lr=0.0, share=share)
    train(model, opt, x, y, 1)
    expected = opt._schedule.table.values.clone()
    train(model, opt, x * float("inf"), y, 1)
    assert torch.equal(opt._schedule.table.values, expected)
    train(model, opt, x, y, 1)
    torch.testing.assert_close(opt._schedule.table.values, expected)


def test_only_samples_of_finite_batches_are_known():
    model, x, y = make("mlp", N, torch.float32)
    opt = fngd.FNGD(model, lr=0.0)
    opt.start_epoch(2 * N)
    train(model, opt, x, y, 1, torch.arange(N))
    train(model, opt, x * float("nan"), y, 1, torch.arange(N, 2 * N))
    assert len(opt._schedule.table._pending) == 2
    opt.set_samples(range(N))
    assert not opt.solving
    assert not opt._schedule.table._pending
    opt.set_samples(range(N, 2 * N))
    assert opt.solving
    train(model, opt, x, y, 1, torch.arange(N, 2 * N))
    assert opt.state_dict()["fngd"]["seen"].all()
    opt.set_samples(range(N, 2 * N))
    assert not opt.solving


def test_hooked_layers_of_a_batch_are_known_together():
    model, x, y = make("mlp", N)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: None)
    opt = fngd.FNGD(model, lr=0.0)
    train(model, opt, x, y, 1, torch.arange(N))
    assert len(opt._schedule.table._pending) == 1
    assert opt.stats()["seen_samples"] == N


def test_pending_samples_are_settled_before_they_become_many(monkeypatch):
    monkeypatch.setattr(Table, "MOST_PENDING", 3)
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, lr=0.0)
    pending = []
    for first in range(0, 5 * N, N):
        train(model, opt, x, y, 1, range(first, first + N))
        pending.append(len(opt._schedule.table._pending))
    assert pending == [1, 2, 0, 1, 2]


def test_a_refresh_forgets_pending_samples():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, lr=0.0, refresh_every=1)
    for _ in range(2):
        opt.start_epoch(N)
        train(model, opt, x, y, 1, torch.arange(N))
    opt.start_epoch(N)
    assert opt.stats()["seen_samples"] == 0


def test_damping_is_raised_where_rounding_leaves_no_positive_pivot():
    model, x, y = make("mlp", N)
    x, y = x[:1].repeat(N, 1), y[:1].repeat(N)  # rank one, and no damping
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, share="none", damping=0.0)
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    stats = opt.stats()
    assert (stats["raised_dampings"], stats["failed_solves"], stats["fallbacks"]) == (2, 0, {})
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=1e-12)  # condition times eps


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_on_cuda_the_update_is_fused_unless_another_is_named(base):
    build = functools.partial(fngd.FNGD, nn.Linear(2, 2).cuda(), base=base, share="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each takes the model over from the one before
        assert build().param_groups[0]["fused"]
        assert not build(foreach=True).param_groups[0]["fused"]
        assert not build(differentiable=True).param_groups[0]["fused"]


# ---- groups


def test_groups_schedulers_and_closures():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(
        model,
        lr=0.1,
        params=[{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.0}],
    )
    frozen = model[2].weight.clone()
    opt.set_samples(range(N))

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    loss = opt.step(closure)
    assert loss.requires_grad
    assert torch.equal(model[2].weight, frozen)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    opt.step()
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.0]
    opt.param_groups[1]["lr"] = 1.0
    opt.step()
    assert not torch.equal(model[2].weight, frozen)


def test_parameters_outside_the_groups_are_left_alone():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, params=model[0].parameters(), share="none")
    F.cross_entropy(model(x), y).backward()
    assert set(opt.coverage()) == {"0.weight", "0.bias"}
    assert [layer.name for layer in opt._preconditioner.blocks] == ["0"]


def test_added_group_is_optimized():
    model, x, y = make("mlp", N)
    extra = nn.Parameter(torch.ones(()))
    opt = fngd.FNGD(model, lr=0.1, share="none")
    opt.add_param_group({"params": [extra]})
    (F.cross_entropy(model(x), y) + extra).backward()
    opt.step()
    assert float(extra.detach()) == pytest.approx(0.9)


def test_options_of_fngd_are_one_for_all_groups():
    model, _, _ = make("mlp", N)
    opt = fngd.FNGD(model, params=[{"params": model[0].parameters(), "note": "kept"}])
    group = {"params": [*model[2].parameters()], "share": "none", "damping": 1.0}
    message = "parameter group: one for all groups is 'damping', 'share'"
    with pytest.raises(ValueError, match=message):
        fngd.FNGD(model, params=[dict(group)])
    with pytest.raises(ValueError, match=message):
        opt.add_param_group(dict(group))
    assert [group["note"] for group in opt.param_groups] == ["kept"]


def test_a_group_may_set_an_option_that_the_base_calls_the_same():
    class Damped(torch.optim.SGD):
        def __init__(self, params, lr=0.1):
            super().__init__(params, lr=lr)
            self.defaults["damping"] = 1.0
            for group in self.param_groups:
                group.setdefault("damping", 1.0)

    model, _, _ = make("mlp", N)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "damping": 2.0}]
    opt = fngd.FNGD(model, params=groups, base=Damped, damping=0.5)
    assert [group["damping"] for group in opt.param_groups] == [1.0, 2.0]
    assert opt.damping == 0.5


# ---- what is routed
# ---------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """Modules that no rule serves beside one that a rule does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied_twin = nn.Linear(4, 4, bias=False)
        self.tied_twin.weight = self.tied.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4)
        self.skipped = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)
        self.scalar = nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = self.inner(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.tied_twin(torch.tanh(self.tied(x)))
        return self.scalar * self.frozen(self.skipped(self.norm(self.normed(x)))).mean(1)


def test_coverage_names_every_parameter_and_uncovered_ones_get_plain_gradients():
    model = Zoo().double()
    x, y = torch.randn(N, 3, 4, dtype=torch.float64), torch.randint(0, 4, (N,))
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, share="none", skip=["skip*"])
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    coverage = opt.coverage()
    assert coverage.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    expected = {
        "inner.weight": "linear",
        "attention.in_proj_weight": "plain: MultiheadAttention with add_bias_kv or add_zero_attn",
        "attention.out_proj.weight": "plain: MultiheadAttention reads its weight without calling it",
        "tied.weight": "linear",
        "normed.parametrizations.weight.original1": "generic",
        "norm.weight": 'plain: normalisation (norms="plain")',
        "skipped.bias": "plain: skipped",
        "frozen.weight": "plain: frozen",
        "unused.weight": "plain: its module took no part in a solving step",
        "scalar": "plain: no rule for Zoo",
    }
    assert {name: coverage[name] for name in expected} == expected
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
        elif coverage[name].startswith("plain"):
            torch.testing.assert_close(p.grad, q.grad)
        else:
            assert not torch.allclose(p.grad, q.grad), name


@pytest.mark.parametrize(("skip", "left"), [(["0"], ["1"]), (["0.*"], ["1"]), (["0.0"], ["0.1", "1"])])
def test_what_is_skipped_is_skipped_with_all_inside(skip, left):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 3))
    opt = fngd.FNGD(model, share="none", skip=skip)
    assert [block.name for block in opt._preconditioner.blocks] == left
    assert opt.coverage()["0.0.weight"] == "plain: skipped"


def test_a_module_can_be_skipped_by_any_of_its_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model.append(model[0])
    opt = fngd.FNGD(model, share="none", skip=["3"])
    assert opt.coverage()["0.weight"] == "plain: skipped"


def test_strict_refuses_what_no_rule_serves():
    with pytest.raises(ValueError, match=r"strict.*attention: MultiheadAttention with add_bias_kv"):
        fngd.FNGD(Zoo(), strict=True)


def test_rows_that_are_not_the_samples_keep_the_plain_gradient():
    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.mix(x.flatten(0, 1))).view(len(x), -1, 4).mean(1))

    model = Flattening().double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(N, 5, 4, dtype=torch.float64), torch.randint(0, 3, (N,))
    opt = fngd.FNGD(model)
    opt.set_samples(range(N))
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    torch.testing.assert_close(model.mix.weight.grad, twin.mix.weight.grad)
    assert not torch.allclose(model.head.weight.grad, twin.head.weight.grad)
    assert opt.coverage()["mix.weight"] == "plain: its input has 40 rows, the batch has 8 samples"


def test_eval_and_no_grad_forwards_leave_nothing_behind():
    model, x, _ = make("mlp", N)
    opt = fngd.FNGD(model)
    with torch.no_grad():
        expected = model(x)
    model.eval()
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    model.train()
    assert opt.stats()["solved_batches"] == 0
    assert not any(opt._preconditioner._open.values())


def test_detach_gives_the_model_back_and_attach_takes_it_again():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, share="none")
    opt.detach()
    assert all("forward" not in module.__dict__ for module in model.modules())
    F.cross_entropy(model(x), y).backward()
    assert opt.stats()["solved_batches"] == 0
    opt.attach()
    F.cross_entropy(model(x), y).backward()
    assert opt.stats()["solved_batches"] == 1


def test_the_model_outlives_its_optimizer():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model)
    engine = weakref.ref(opt._preconditioner)
    del opt
    assert engine() is None
    F.cross_entropy(model(x), y).backward()  # without ids: nobody asks for them any more


def test_a_second_optimizer_takes_over_with_a_warning():
    model, x, y = make("mlp", N)
    first = fngd.FNGD(model, share="none")
    with pytest.warns(UserWarning, match="another FNGD"):
        second = fngd.FNGD(model, share="none")
    F.cross_entropy(model(x), y).backward()
    assert (first.stats()["solved_batches"], second.stats()["solved_batches"]) == (0, 1)


def test_copies_of_the_model_are_not_routed():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, share="none")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for clone in (
        copy.deepcopy(model),
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(model)),
    ):
        torch.testing.assert_close(clone(x), model(x))
        F.cross_entropy(clone(x), y).backward()
        assert clone[0].forward.__self__ is clone[0]
    assert opt.stats()["solved_batches"] == 0
    assert all(p.grad is None for p in model.parameters())


def test_layer_grams_on_a_routed_model_leave_the_optimizer_untouched():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model)
    opt.set_samples(range(N))
    grams = fngd.layer_grams(model, lambda: F.cross_entropy(model(x), y))
    assert opt.stats()["solved_batches"] == 0
    F.cross_entropy(model(x), y).backward()
    assert opt.stats()["solved_batches"] == 1
    assert list(grams) == ["0", "2"]


# ---- bad input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"damping": -0.1}, ValueError, "damping: expected a finite number >= 0, got -0.1"),
        ({"damping": float("nan")}, ValueError, "damping"),
        ({"damping": "big"}, TypeError, "damping"),
        ({"damping": 0.0, "normalize": "lambda"}, ValueError, "damping: expected a number > 0"),
        ({"damping_mode": "relative"}, ValueError, "damping_mode: expected one of 'trace'"),
        ({"normalize": "none"}, ValueError, "normalize"),
        ({"share": "batch"}, ValueError, "share"),
        ({"norms": "both"}, ValueError, "norms"),
        ({"refresh_every": 0}, ValueError, "refresh_every"),
        ({"skip": "head"}, TypeError, "skip"),
        ({"skip": ["head*"]}, ValueError, r"skip: expected patterns of module names, 'head\*' matches none"),
        ({"skip": [3]}, TypeError, "skip: expected patterns of module names, got int"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"base": "lion"}, ValueError, "base: expected one of 'sgd', 'adamw'"),
        ({"base": torch.optim.LBFGS}, ValueError, "LBFGS"),
        ({"base": nn.Linear}, TypeError, "base: expected 'sgd', 'adamw' or a torch.optim class.*Linear"),
        (
            {"base": torch.optim.Adam([torch.ones(1)])},
            TypeError,
            "base.* options go to FNGD; got an instance of Adam",
        ),
        (
            {"base": "adamw", "momentum": 0.9},
            TypeError,
            "options of base AdamW.*'momentum'; it takes lr, betas",
        ),
        ({"dampning": 0.1}, TypeError, "'dampning'; did you mean 'damping' of FNGD or 'dampening' of SGD"),
        ({"refresh_evry": 1}, TypeError, "did you mean 'refresh_every' of FNGD"),
        ({"weigth_decay": 1}, TypeError, "did you mean 'weight_decay' of SGD"),
        (
            {"lr": iter([])},
            TypeError,
            "lr: expected a number or a tensor, got list_iterator; parameters go to",
        ),
        ({"lr": "0.1"}, TypeError, "lr: expected a number or a tensor, got str"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fngd.FNGD(nn.Linear(2, 2), **arguments)


def test_damping_can_be_scheduled():
    model, x, y = make("mlp", N)
    opt, other = fngd.FNGD(model, share="none"), fngd.FNGD(copy.deepcopy(model), share="none", damping=3.0)
    opt.damping = 3
    assert opt.damping == 3.0
    for optimizer in (opt, other):
        F.cross_entropy(optimizer._model(x), y).backward()
    for p, q in zip(opt._model.parameters(), other._model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(
    ("damping", "normalize", "error"),
    [
        ("big", "mean", TypeError),
        (-1.0, "mean", ValueError),
        (torch.nan, "mean", ValueError),
        (0, "lambda", ValueError),
    ],
)
def test_a_bad_damping_is_not_set(damping, normalize, error):
    opt = fngd.FNGD(nn.Linear(2, 2), normalize=normalize)
    with pytest.raises(error, match="damping: expected"):
        opt.damping = damping
    assert opt.damping == 0.1


def test_repr_shows_the_settings():
    opt = fngd.FNGD(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), share="none", sketch=4, skip=["1"])
    opt.damping = 0.5
    text = repr(opt)
    for line in ("damping: 0.5", "base: SGD", "share: none", "normalize: mean", "skip: ['1']", "momentum: 0"):
        assert f"    {line}\n" in text
    assert text.index("damping_mode") < text.index("Parameter Group 0")


def test_bad_models():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list; parameters go to"):
        fngd.FNGD([nn.Parameter(torch.ones(1))])
    unsupported = nn.LSTM(2, 2, num_layers=2, dropout=0.5)
    with pytest.raises(ValueError, match=r"no supported layer.*LSTM"):
        fngd.FNGD(unsupported)
    with pytest.raises(ValueError, match="no supported layer"):
        fngd.layer_grams(unsupported, lambda: None)
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="closure: expected a scalar loss"):
        fngd.layer_grams(model, lambda: model(torch.ones(3, 2)))
    assert "forward" not in model.__dict__


def test_bad_samples():
    model, x, _ = make("mlp", N)
    opt = fngd.FNGD(model)
    with pytest.raises(RuntimeError, match=r"fngd\.track\(loader, optimizer\)"):
        model(x)
    with pytest.raises(TypeError, match="ids: expected integers"):
        opt.set_samples([0.5, 1.0])
    with pytest.raises(TypeError, match=r"shape \(N,\)"):
        opt.set_samples(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids: expected ids >= 0 and below 2\^31, got -1 to 3"):
        opt.set_samples([3, -1])
    with pytest.raises(ValueError, match=r"below 2\^31, got 0 to 10000000000"):
        opt.set_samples([0, 10**10])  # a hash
    opt.start_epoch(4)
    with pytest.raises(ValueError, match="below the dataset's length 4, got 0 to 4"):
        opt.set_samples([0, 4])
