"""The optimizer under FNGD: its own state, modes and hooks live on, and one that cannot serve is refused."""

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fngd
from networks import make

N = 8
UNIT = {"share": "none", "damping": 1e12}
"""All coefficients are 1 to 1e-12: the gradient is the plain one."""


class Annealed(torch.optim.SGD):
    """SGD whose rate falls with a count of its steps; saves the count beside, momentum as bytes."""

    def __init__(self, params, lr=0.2, momentum=0.9):
        super().__init__(params, lr=lr, momentum=momentum)
        self.count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.2 / self.count
        return super().step(closure)

    def state_dict(self):
        saved = super().state_dict()
        saved["state"] = {
            n: {"bytes": s["momentum_buffer"].view(torch.uint8)} for n, s in saved["state"].items()
        }
        return {**saved, "count": self.count}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, n in zip(group["params"], saved["params"], strict=True):
                if n in state_dict["state"]:
                    self.state[p] = {"momentum_buffer": state_dict["state"][n]["bytes"].clone().view(p.dtype)}
        self.count = state_dict["count"]


def train(model, opt, x, y, steps):
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- its state


def test_a_resumed_run_has_all_that_its_base_saves():
    model, x, y = make("mlp", N, torch.float32)
    opt = fngd.FNGD(model, base=Annealed, share="none")
    train(model, opt, x, y, 3)
    other = copy.deepcopy(model)
    resumed = fngd.FNGD(other, base=Annealed, share="none")
    resumed.load_state_dict(through_file(opt.state_dict()))
    assert resumed.count == 3
    assert torch.equal(train(model, opt, x, y, 3), train(other, resumed, x, y, 3))


def test_a_state_of_the_base_alone_is_taken_over_in_its_own_form():
    model, x, y = make("mlp", N, torch.float32)
    twin = copy.deepcopy(model)
    alone = Annealed(twin.parameters())
    train(twin, alone, x, y, 3)
    model.load_state_dict(twin.state_dict())
    opt = fngd.FNGD(model, base=Annealed, **UNIT)
    opt.load_state_dict(through_file(alone.state_dict()))
    torch.testing.assert_close(train(model, opt, x, y, 3), train(twin, alone, x, y, 3))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_training_goes_on_from_torchs_checkpoint_and_keeps_coefficients(base):
    model, x, y = make("mlp", N)
    twin = copy.deepcopy(model)
    options = {"lr": 0.05, "weight_decay": 0.01}
    alone = base(twin.parameters(), **options)
    train(twin, alone, x, y, 3)
    model.load_state_dict(twin.state_dict())
    opt = fngd.FNGD(model, base=base, damping=1e12, **options)
    opt.set_samples(range(N))
    F.cross_entropy(model(x), y).backward()
    opt.step()
    model.load_state_dict(twin.state_dict())
    opt.load_state_dict(through_file(alone.state_dict()))
    assert opt.stats()["seen_samples"] == N
    opt.set_samples(range(N))
    assert not opt.solving
    torch.testing.assert_close(train(model, opt, x, y, 1), train(twin, alone, x, y, 1))


def test_a_state_without_the_bases_own_leaves_that_as_it_is():
    model, x, y = make("mlp", N, torch.float32)
    opt = fngd.FNGD(model, base=Annealed, share="none")
    train(model, opt, x, y, 3)
    state = copy.deepcopy(opt.state_dict())
    del state["fngd"]["base"]  # as earlier versions saved it
    for group in state["param_groups"]:
        group["fngd"] = True
    opt.load_state_dict(state)
    assert opt.count == 3
    assert "fngd" not in opt.param_groups[0]


def test_a_state_that_the_base_refuses_changes_nothing():
    model, x, y = make("mlp", N, torch.float32)
    opt = fngd.FNGD(model, base=Annealed, share="none")
    train(model, opt, x, y, 2)
    before, damaged = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt.state_dict())
    damaged["state"][1] = {"something": 3}
    with pytest.raises(KeyError, match="bytes"):
        opt.load_state_dict(damaged)
    after = opt.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert all(torch.equal(after["state"][n]["bytes"], s["bytes"]) for n, s in before["state"].items())
    train(model, opt, x, y, 1)


def test_hooks_of_states_see_the_bases_form_and_can_change_it():
    model, x, y = make("mlp", N, torch.float32)
    opt = fngd.FNGD(model, base=Annealed, share="none")
    train(model, opt, x, y, 1)
    seen = []
    opt.register_state_dict_post_hook(lambda _, state: seen.append(state["state"][0].keys()))
    opt.register_load_state_dict_pre_hook(
        lambda _, state: {**state, "param_groups": [{**g, "momentum": 0.5} for g in state["param_groups"]]}
    )
    opt.register_load_state_dict_post_hook(lambda o: o.param_groups[0].update(note="loaded"))
    opt.load_state_dict(opt.state_dict())
    assert seen == [{"bytes": 0}.keys()]
    assert (opt.param_groups[0]["momentum"], opt.param_groups[0]["note"]) == (0.5, "loaded")
    train(model, opt, x, y, 1)
    assert opt.param_groups[0]["lr"] == 0.1  # what the base works on is what the hook has changed


def test_a_state_that_the_user_replaces_is_what_the_base_works_on():
    model, x, y = make("mlp", N)
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, lr=0.1, momentum=0.9, **UNIT)
    alone = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for net, optimizer in ((model, opt), (twin, alone)):
        train(net, optimizer, x, y, 2)
        optimizer.state = type(alone.state)(dict)
        train(net, optimizer, x, y, 1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_state_that_the_user_replaces_is_what_is_saved():
    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, lr=0.1, momentum=0.9, share="none")
    train(model, opt, x, y, 2)
    opt.state, opt.param_groups = type(opt.state)(dict), [{**group, "lr": 0.3} for group in opt.param_groups]
    state = opt.state_dict()
    assert (state["state"], state["param_groups"][0]["lr"]) == ({}, 0.3)
    extra = nn.Parameter(torch.ones(()))
    opt.add_param_group({"params": [extra]})
    assert [len(group["params"]) for group in opt.param_groups] == [4, 1]


def test_a_base_hears_of_groups_that_come_later():
    class Masked(torch.optim.SGD):
        def add_param_group(self, param_group):
            super().add_param_group(param_group)
            for p in self.param_groups[-1]["params"]:
                self.state[p]["mask"] = torch.ones_like(p)

    model, _, _ = make("mlp", N)
    opt = fngd.FNGD(model, base=Masked, params=model[0].parameters())
    opt.add_param_group({"params": model[2].parameters()})
    assert len(opt.param_groups) == 2
    assert all("mask" in opt.state[p] for p in model.parameters())


# ---- its modes and hooks


def test_schedule_free_bases_are_switched_through_fngd():
    base = pytest.importorskip("pytorch_optimizer").ScheduleFreeAdamW
    model, x, y = make("mlp", N)
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, lr=0.1, base=base, **UNIT)
    alone = base(twin.parameters(), lr=0.1)
    for net, optimizer in ((model, opt), (twin, alone)):
        train(net, optimizer, x, y, 3)
        optimizer.eval()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for net, optimizer in ((model, opt), (twin, alone)):
        optimizer.train()
        train(net, optimizer, x, y, 2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_only_what_the_base_has_is_found_on_fngd():
    opt = fngd.FNGD(nn.Linear(2, 2))
    for name in ("train", "eval", "found_inf", "grad_scale", "_something"):
        assert not hasattr(opt, name)
    with pytest.raises(AttributeError, match="'FNGD' object has no attribute 'train'"):
        opt.train()
    unfinished = fngd.FNGD.__new__(fngd.FNGD)
    assert not hasattr(unfinished, "train")


def test_what_a_scaler_says_of_one_step_is_gone_after_it():
    model, x, y = make("mlp", N, torch.float32)
    opt = fngd.FNGD(model, fused=True, share="none")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.step(opt)
    assert not hasattr(opt, "found_inf")
    assert not hasattr(opt, "grad_scale")


def test_hooks_hear_each_step_once():
    class Noted(torch.optim.SGD):
        def __init__(self, params, **options):
            super().__init__(params, **options)
            self.register_step_post_hook(lambda optimizer, *_: heard.append(("own", type(optimizer))))

    model, x, y = make("mlp", N)
    opt, heard = fngd.FNGD(model, base=Noted, share="none"), []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: heard.append(("before", type(optimizer)))),
        register_optimizer_step_post_hook(lambda optimizer, *_: heard.append(("after", type(optimizer)))),
    ]
    opt.register_step_post_hook(lambda optimizer, *_: heard.append(("here", type(optimizer))))
    try:
        train(model, opt, x, y, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert heard == [("before", fngd.FNGD), ("own", Noted), ("here", fngd.FNGD), ("after", fngd.FNGD)]


def test_a_step_that_borrows_the_name_of_a_hooked_one_is_the_one_that_runs():
    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # from here on SGD.step is hooked

    class Halving(torch.optim.SGD):
        @functools.wraps(torch.optim.SGD.step)
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] = 0.5
            return torch.optim.SGD.step(self)

    model, x, y = make("mlp", N)
    opt = fngd.FNGD(model, lr=1.0, base=Halving, share="none")
    train(model, opt, x, y, 1)
    assert opt.param_groups[0]["lr"] == 0.5


# ---- which can serve


class Around(torch.optim.Optimizer):
    """Holds another optimizer, whose groups and state it shows as its own."""

    def __init__(self, params, lr=0.1):
        self.inner = torch.optim.SGD(params, lr=lr)
        self.defaults = self.inner.defaults

    @property
    def param_groups(self):
        return self.inner.param_groups


class Holding(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        params = list(params)
        super().__init__(params, lr=lr)
        self.inner = [torch.optim.SGD(params, lr=lr)]


class Wanting(torch.optim.SGD):
    def __init__(self, params, base_optimizer, lr=0.1):
        super().__init__(params, lr=lr)


class OfModel(torch.optim.SGD):
    def __init__(self, model, lr=0.1):
        super().__init__(model.parameters(), lr=lr)


class Evaluating(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (Around, "base: Around works around another optimizer"),
        (Holding, "base: Holding works around another optimizer"),
        (Wanting, "base: Wanting works around another optimizer.*make Wanting around FNGD instead"),
        (OfModel, "base: OfModel takes a model"),
        (Evaluating, r"base: Evaluating\.step\(\) needs closure"),
        (torch.optim.LBFGS, r"base: LBFGS\.step\(\) needs closure"),
        (
            "adam",
            r"base: expected one of 'sgd', 'adamw' or any torch\.optim class, as base=torch\.optim\.Adam",
        ),
    ],
)
def test_a_base_that_cannot_serve_is_refused_by_name(base, message):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        fngd.FNGD(model, base=base)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", ["SAM", "Lookahead", "Magma"])
@pytest.mark.parametrize("share", ["none", "sample"])
def test_wrappers_go_around_fngd(name, share):
    """With coefficients of 1 the run is that of the wrapper around SGD."""
    wrapper = getattr(pytest.importorskip("pytorch_optimizer"), name)

    def run(make_inner, names):
        torch.manual_seed(0)
        model, x, y = make("mlp", N)
        made = []

        def inner(groups=None, **options):
            made.append(make_inner(model, model.parameters() if groups is None else groups, **options))
            return made[0]

        outer = wrapper(model.parameters(), inner) if name == "SAM" else wrapper(inner())

        def evaluate():
            if names:
                made[0].set_samples(range(N))
            outer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        torch.manual_seed(1)
        for _ in range(7):
            evaluate()
            outer.step(*([evaluate] if name == "SAM" else []))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def natural(model, groups, **options):
        return fngd.FNGD(model, lr=0.1, params=groups, damping=1e12, share=share, **options)

    expected = run(lambda _, groups, **options: torch.optim.SGD(groups, lr=0.1, **options), False)
    torch.testing.assert_close(run(natural, share == "sample"), expected)


@pytest.mark.parametrize(
    ("base", "lr"),
    [("sgd", 0.1), (torch.optim.SGD, 0.1), ("adamw", 1e-3), (torch.optim.RMSprop, 1e-2), (Annealed, 0.2)],
)
def test_the_learning_rate_is_the_bases_own_unless_named(base, lr):
    assert fngd.FNGD(nn.Linear(2, 2), base=base).param_groups[0]["lr"] == lr
    assert fngd.FNGD(nn.Linear(2, 2), 0.3, base=base).param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("kind", [fngd.FNGD, fngd.GaussNewton])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda opt: torch.save(opt, io.BytesIO())])
def test_copies_are_refused_with_advice(kind, copied):
    opt = kind(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=rf"{kind.__name__} cannot be copied or pickled.*make a new"):
        copied(opt)
