"""Calls that cannot be routed keep the plain gradient, train as they do without FNGD, and are named."""

import copy
import logging

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune

import fngd
from architectures import floats, mlp
from fngd_kernels import native

N = 4


def shared_phase(model, x):
    """Return an optimizer that knows all samples, with the model as it was."""
    before = copy.deepcopy(model.state_dict())
    opt = fngd.FNGD(model, lr=0.0, norms="weighted")
    opt.set_samples(range(N))
    model(x).square().mean().backward()
    opt.step()
    opt.zero_grad()
    model.load_state_dict(before)
    return opt


def optimizer(phase, model, x):
    opt = shared_phase(model, x) if phase == "shared" else fngd.FNGD(model, lr=0.0, norms="weighted")
    opt.set_samples(range(N))
    return opt


def assert_plain(model, twin, loss):
    """Assert that the gradients of a loss are those of a model without FNGD."""
    for net in (model, twin):
        net.zero_grad()
        loss(net).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


PHASES = pytest.mark.parametrize("phase", ["solving", "shared"])


class Half(nn.Module):
    def forward(self, w):
        return w * 0.5


CHANGES = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", amount=0.5),
    "weight_norm": parametrizations.weight_norm,
    "hooked weight_norm": nn.utils.weight_norm,
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
}


@PHASES
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_moved_after_the_optimizer_was_made(name, phase):
    model, x = mlp(3, 4, 2), floats(N, 3)
    twin = copy.deepcopy(model)
    opt = optimizer(phase, model, x)
    for net in (model, twin):
        torch.manual_seed(1)
        CHANGES[name](net[0])
        net(x).square().mean().backward()
    coverage = opt.coverage()
    for (key, p), q in zip(model[0].named_parameters(), twin[0].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
        assert coverage[f"0.{key}"].startswith(("plain: its weight or bias is no longer", "not optimized"))
    assert coverage["2.weight"] == "linear"
    assert not torch.allclose(model[2].weight.grad, twin[2].weight.grad)


def test_a_parametrization_that_is_removed_again_is_routed_again():
    model, x = mlp(3, 4, 2), floats(N, 3)
    opt = fngd.FNGD(model, share="none")
    parametrize.register_parametrization(model[0], "weight", Half())
    parametrize.remove_parametrizations(model[0], "weight")
    model(x).square().mean().backward()
    assert set(opt.coverage().values()) == {"linear"}
    assert opt._report.solves == [1, 1]


def tangent(model, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent


TRANSFORMS = {
    "grad": lambda model, x: grad(lambda z: model(z).square().sum())(x),
    "jacrev": lambda model, x: jacrev(lambda z: model(z).sum(0))(x),
    "jacfwd": lambda model, x: jacfwd(lambda z: model(z).sum(0))(x),
    "hessian": lambda model, x: hessian(lambda z: model(z).square().sum())(x),
    "jvp": lambda model, x: jvp(model, (x,), (x,))[1],
    "vmap": lambda model, x: vmap(model)(torch.stack([x, x + 1])),
    "forward mode": tangent,
}


@PHASES
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_see_the_model_as_it_is(name, phase):
    model, x = nn.Sequential(mlp(3, 4), nn.LayerNorm(4).double(), nn.Linear(4, 2).double()), floats(N, 3)
    twin = copy.deepcopy(model)
    opt = optimizer(phase, model, x)
    torch.testing.assert_close(TRANSFORMS[name](model, x), TRANSFORMS[name](twin, x))
    assert any("called inside" in reason for counts in opt.stats()["fallbacks"].values() for reason in counts)


@PHASES
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_inputs(layout, phase):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()  # torch has no tanh of them
    twin = copy.deepcopy(model)
    opt = optimizer(phase, model, floats(N, 3))
    rows = [floats(n, 3) for n in (2, 3, 1, 2)]
    x = torch.nested.nested_tensor(rows, layout=layout)

    def loss(net):
        y = net(x)
        return (
            y.values().square().mean() if layout is torch.jagged else y.to_padded_tensor(0.0).square().sum()
        )

    assert_plain(model, twin, loss)
    assert all("its input is not a dense tensor" in how for how in opt.coverage().values())


KINDS = {
    "conv": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(6, 2)),
        lambda: floats(N, 2, 3),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)),
        lambda: floats(N, 2, 3),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Flatten(), nn.Linear(6, 2)),
        lambda: torch.randint(0, 5, (N, 2)),
    ),
    "generic": (lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)), lambda: floats(N, 3)),
}


def several_gradients(net, x):
    """Return the gradients of three weighted sums of the outputs at once."""
    y = net(x)
    e = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(1)).double()
    return torch.autograd.grad(y, list(net.parameters()), e, is_grads_batched=True)


@pytest.mark.parametrize("name", KINDS)
def test_several_gradients_at_once_are_plain_where_a_batch_is_solved_for(name):
    build, draw = KINDS[name]
    model, x = build().double(), draw()
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, share="none", norms="weighted")
    for found, expected in zip(several_gradients(model, x), several_gradients(twin, x), strict=True):
        torch.testing.assert_close(found, expected)
    assert all("asked for in a batch" in how for how in opt.coverage().values())


@pytest.mark.parametrize("name", KINDS)
def test_several_gradients_at_once_with_known_coefficients_are_those_of_each(name):
    build, draw = KINDS[name]
    model, x = build().double(), draw()
    opt = shared_phase(model, x)
    opt.set_samples(range(N))
    together = several_gradients(model, x)
    e = torch.randn(3, N, 2, generator=torch.Generator().manual_seed(1)).double()
    for n in range(3):
        alone = torch.autograd.grad(model(x), list(model.parameters()), e[n])
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found[n], expected)


@pytest.mark.parametrize("name", KINDS)
def test_backward_with_create_graph_gives_gradients_that_have_their_own(name):
    build, draw = KINDS[name]
    model, x = build().double(), draw()
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, share="none", norms="weighted")
    products = []
    for net in (model, twin):
        parameters = list(net.parameters())
        net(x).sin().square().mean().backward(create_graph=True)
        gradients = [p.grad for p in parameters]
        products.append((*gradients, *torch.autograd.grad(gradients, parameters, gradients)))
        for p in parameters:
            p.grad = None  # or graph and parameter would hold each other
    for found, expected in zip(*products, strict=True):
        torch.testing.assert_close(found, expected)
    assert all(how.startswith("plain: its gradient") for how in opt.coverage().values())


@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph_with_the_nodes_in_python(monkeypatch):
    monkeypatch.setattr(native, "AVAILABLE", False)
    test_backward_with_create_graph_gives_gradients_that_have_their_own("conv")


def test_a_backward_under_vmap_is_plain_where_a_batch_is_solved_for():
    model, x = mlp(3, 4, 2), floats(N, 3)
    opt, twin, e = fngd.FNGD(model, share="none"), copy.deepcopy(model), floats(3, N, 2)

    def gradients(net):
        y, parameters = net(x), list(net.parameters())
        return vmap(lambda e: torch.autograd.grad(y, parameters, e, retain_graph=True))(e)

    found, expected = gradients(model), gradients(twin)
    for g, h in zip(found, expected, strict=True):
        torch.testing.assert_close(g, h)
    assert opt.stats()["solved_batches"] == 0


@pytest.fixture
def lines(caplog):
    """The lines logged so far."""
    caplog.set_level(logging.WARNING, "fngd")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "fngd"]


def test_a_model_in_eval_mode_is_told_once_and_named(lines):
    model, x = mlp(3, 4, 2).eval(), floats(N, 3)
    opt = fngd.FNGD(model, share="none")
    for _ in range(3):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    assert set(opt.coverage().values()) == {"plain: its module is in eval mode"}
    assert [line for line in lines() if "eval mode" in line] == lines()
    assert len(lines()) == 1


def test_parts_in_eval_mode_are_named_without_a_line(lines):
    model, x = mlp(3, 4, 2), floats(N, 3)
    model[0].eval()
    opt = fngd.FNGD(model, share="none")
    model(x).square().mean().backward()
    opt.step()
    assert opt.coverage()["0.weight"] == "plain: its module is in eval mode"
    assert opt.coverage()["2.weight"] == "linear"
    assert lines() == []


def test_a_weight_frozen_later_is_the_reason_for_its_bias():
    model, x = mlp(3, 4, 2), floats(N, 3)
    opt = fngd.FNGD(model, share="none")
    model[0].weight.requires_grad_(False)
    model(x).square().mean().backward()
    assert opt.coverage()["0.weight"] == "plain: frozen"
    assert opt.coverage()["0.bias"] == "plain: its weight is frozen"
    assert opt.coverage()["2.weight"] == "linear"


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)

    def forward(self, t):
        return self.head(torch.tanh(self.words(t))).mean(1)


@PHASES
def test_a_weight_that_is_tied_later_keeps_the_plain_gradient(phase):
    model, tokens = Language().double(), torch.randint(0, 9, (N, 3))
    opt = optimizer(phase, model, tokens)
    model.head.weight = model.words.weight
    twin = copy.deepcopy(model)
    opt.set_samples(range(N))
    assert_plain(model, twin, lambda net: net(tokens).square().mean())
    how = opt.coverage()["words.weight"]
    assert how.startswith("plain: its parameter came to be shared")
    assert "words (embedding), head (linear)" in how


def test_a_module_that_was_exchanged_for_another_one_is_named():
    model, x = mlp(3, 4, 2), floats(N, 3)
    opt = fngd.FNGD(model, share="none")
    other = nn.Linear(3, 4).double()
    other.weight, other.bias = model[0].weight, model[0].bias
    model[0] = other
    model(x).square().mean().backward()
    assert opt.coverage()["0.weight"] == "plain: its module was replaced since the optimizer was made"
    assert opt.coverage()["2.weight"] == "linear"


def test_a_second_loss_before_the_step_is_no_foreign_use():
    model, x = mlp(3, 4, 2), floats(N, 3)
    opt = fngd.FNGD(model)
    losses = []
    for _ in range(2):
        opt.set_samples(range(N))
        losses.append(model(x).square().mean())
        losses[-1].backward()
    assert set(opt.coverage().values()) == {"linear"}
    assert opt.stats()["fallbacks"] == {}


def test_normalisation_in_eval_mode_has_gram_matrices():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double(), floats(N, 3)
    model(x)
    model.eval()
    loss = lambda net, rows: net(x[list(rows)]).square().sum(1).mean()  # noqa: E731
    rows = []
    for n in range(N):
        rows.append(torch.autograd.grad(loss(model, [n]) / N, list(model.parameters())))
    before = copy.deepcopy(model.state_dict())
    found = fngd.layer_grams(model, lambda: loss(model, range(N)))
    for name, some in (("0", slice(0, 2)), ("1", slice(2, 4)), ("2", slice(4, 6))):
        c = torch.stack([torch.cat([g.flatten() for g in row[some]]) for row in rows])
        torch.testing.assert_close(found[name], c @ c.T)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
