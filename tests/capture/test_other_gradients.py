"""Gradients that are taken in other ways than one backward, and weights that something else reads."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fngd
from architectures import floats, mlp
from natural import check

N = 4


def assert_plain_gradients(model, twin):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


def test_gradient_penalty_of_a_critic():
    model, between = mlp(3, 4, 4, 1), floats(N, 3)

    def loss(net, samples):
        x = between[list(samples)].requires_grad_()
        y = net(x)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return (y.squeeze(1) + 10 * (dx.norm(dim=1) - 1).square()).mean()

    assert set(check(model, loss, N).values()) == {"linear"}


def test_a_module_of_another_kind_stays_plain_under_a_gradient_penalty():
    model, x = nn.Sequential(mlp(3, 4), nn.PReLU(4), nn.Linear(4, 1)).double(), floats(N, 3)
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, lr=0.0)
    for _ in range(3):
        opt.set_samples(range(N))
        for net in (model, twin):
            leaf = x.clone().requires_grad_()
            net.zero_grad()
            y = net(leaf).square()
            (dx,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
            (y.mean() + dx.square().mean()).backward()
        torch.testing.assert_close(model[1].weight.grad, twin[1].weight.grad, rtol=1e-10, atol=1e-14)
    assert opt.coverage()["1.weight"] == "plain: its gradient is differentiated again"
    assert opt.coverage()["2.weight"] == "linear"


def test_a_module_whose_input_is_written_to_stays_plain():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return x + self.shift

    model, x = nn.Sequential(Shift(), nn.Linear(3, 2)).double(), floats(N, 3)
    twin = copy.deepcopy(model)
    opt = fngd.FNGD(model, lr=0.0)
    for _ in range(3):
        opt.set_samples(range(N))
        for net in (model, twin):
            net.zero_grad()
            buffer = x.clone()
            y = net[0](buffer)
            buffer.zero_()
            net[1](y).square().mean().backward()
        torch.testing.assert_close(model[0].shift.grad, twin[0].shift.grad, rtol=1e-10, atol=1e-14)
    assert opt.coverage()["0.shift"] == "plain: its input is written to after the call"


NETWORKS = {
    "linear": (lambda: mlp(3, 4, 2), lambda: floats(N, 3)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 2), nn.Tanh(), nn.ConvTranspose1d(3, 2, 2), nn.Flatten()
        ).double(),
        lambda: floats(N, 2, 4),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Flatten(), nn.Linear(6, 2)).double(),
        lambda: torch.randint(0, 5, (N, 2)),
    ),
    "own": (lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4)).double(), lambda: floats(N, 3)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_hessian_vector_product_is_the_plain_one(name):
    build, draw = NETWORKS[name]
    model, x = build(), draw()
    opt = fngd.FNGD(model, share="none", norms="weighted")
    products = []
    for _ in range(2):
        p = list(model.parameters())
        gradients = torch.autograd.grad(model(x).sin().square().sum(), p, create_graph=True)
        torch.manual_seed(1)
        products.append(torch.autograd.grad(gradients, p, [torch.randn_like(g) for g in gradients]))
        assert opt.stats()["solved_batches"] == 0
        assert set(opt.coverage().values()) <= {
            "plain: its gradient was asked for with create_graph=True",
            "plain: its gradient is differentiated again",
        }
        opt.detach()
    for found, expected in zip(*products, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def meta_loss(net, x, y, create_graph):
    """The loss after a step of an inner loop."""
    parameters = dict(net.named_parameters())
    inner = F.mse_loss(functional_call(net, parameters, x[0]), y[0])
    gradients = torch.autograd.grad(inner, list(parameters.values()), create_graph=create_graph)
    fast = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
    return F.mse_loss(functional_call(net, fast, x[1]), y[1])


def scaled_loss(net, x, y):
    return F.mse_loss(functional_call(net, {name: 1.5 * p for name, p in net.named_parameters()}, x[0]), y[0])


def foreign_loss(net, x, y):
    torch.manual_seed(1)
    foreign = {name: torch.randn_like(p).requires_grad_() for name, p in net.named_parameters()}
    return F.mse_loss(functional_call(net, foreign, x[0]), y[0]) + sum(p.sum() for p in net.parameters())


@pytest.mark.parametrize(
    "loss", [lambda *a: meta_loss(*a, True), scaled_loss, foreign_loss], ids=["meta", "scaled", "foreign"]
)
def test_other_tensors_in_the_place_of_parameters_keep_plain_gradients(loss):
    model = nn.Sequential(mlp(3, 4), nn.PReLU(4), nn.Linear(4, 1)).double()
    x, y, twin = floats(2, N, 3), floats(2, N, 1), copy.deepcopy(model)
    opt = fngd.FNGD(model)
    for _ in range(2):
        opt.set_samples(range(N))
        model.zero_grad()
        twin.zero_grad()
        loss(model, x, y).backward()
        loss(twin, x, y).backward()
        assert_plain_gradients(model, twin)
    assert opt.stats()["solved_batches"] == 0
    assert all(how.startswith("plain: ") for how in opt.coverage().values())


# ---- weights that something else reads


def test_a_weight_that_is_read_outside_of_its_module_is_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.mix = nn.Embedding(6, 3), nn.Linear(3, 3)

        def forward(self, x):
            return F.linear(torch.tanh(self.mix(self.embedding(x))), self.embedding.weight)

    model, tokens = Tied().double(), torch.randint(0, 6, (N, 5))
    opt = fngd.FNGD(model, share="none")
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    coverage = opt.coverage()
    outside = "at times plain: a parameter of it is also used outside of its calls"
    assert coverage == {
        "embedding.weight": f"embedding, {outside}",
        "mix.weight": "linear",
        "mix.bias": "linear",
    }


def test_a_penalty_on_the_weights_adds_its_own_gradient():
    model, x = mlp(3, 4, 2), floats(N, 3)
    gradients = []
    for penalty in (0.0, 0.1):
        opt = fngd.FNGD(model, lr=0.0, share="none")
        opt.zero_grad()
        (model(x).square().mean() + penalty * sum(p.square().sum() for p in model.parameters())).backward()
        gradients.append([p.grad for p in model.parameters()])
        opt.step()
        assert not opt._preconditioner._watches
        opt.detach()
    assert all("outside of its calls" in how for how in opt.coverage().values())
    for p, alone, both in zip(model.parameters(), *gradients, strict=True):
        torch.testing.assert_close(both, alone + 0.2 * p, rtol=1e-10, atol=1e-14)
