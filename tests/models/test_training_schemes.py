"""Schemes in which samples mix, models meet, or gradients are taken in other ways than one backward."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fngd
from natural import call_rows, check, natural_gradients

N = 4


def floats(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def mlp(*sizes):
    layers = [nn.Linear(i, o) for i, o in pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1]).double()


def assert_plain_gradients(model, twin):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


# ---- samples mix: a sample's part is what its row of a layer's input gives


class GraphConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)
        self.register_buffer("adjacency", (torch.rand(N, N) < 0.6).double())

    def forward(self, x):
        return self.adjacency @ self.second(torch.tanh(self.adjacency @ self.first(x)))


def test_nodes_of_a_graph_are_its_samples():
    x = floats(N, 3)
    coverage = check(
        GraphConvolution().double(), lambda net, _: net(x).square().sum(1).mean(), N, rows=call_rows
    )
    assert set(coverage.values()) == {"linear"}


def test_contrastive_learning_with_two_views():
    views = floats(2, N, 3)

    def loss(net, _):
        first, second = (F.normalize(net(view)) for view in views)
        return F.cross_entropy(first @ second.T / 0.1, torch.arange(N))

    assert set(check(mlp(3, 5, 2), loss, N, rows=call_rows).values()) == {"linear"}


def test_views_side_by_side_are_no_samples():
    views, model = floats(2, N, 3), mlp(3, 5, 2)

    def loss(net, _):
        first, second = F.normalize(net(views.flatten(0, 1))).chunk(2)
        return F.cross_entropy(first @ second.T / 0.1, torch.arange(N))

    reason = f"plain: its input has {2 * N} rows, the batch has {N} samples"
    assert set(check(model, loss, N, rows=lambda *_: {}).values()) == {reason}


# ---- several models


def test_adversarial_networks_with_an_optimizer_each():
    generator, critic = mlp(2, 4, 3), mlp(3, 4, 1)
    real, noise = floats(N, 3), floats(N, 2)

    def critic_loss(net, samples):
        rows = list(samples)
        fake = generator(noise[rows]).detach()
        return (F.softplus(-net(real[rows])) + F.softplus(net(fake))).mean()

    def generator_loss(net, samples):
        return F.softplus(-critic(net(noise[list(samples)]))).mean()

    expected = natural_gradients(critic, critic_loss, N), natural_gradients(generator, generator_loss, N)
    options = {"lr": 0.0, "normalize": "raw", "damping": 0.3, "share": "none"}
    optimizers = fngd.FNGD(critic, **options), fngd.FNGD(generator, **options)
    for net, loss, opt, truth in zip(
        (critic, generator), (critic_loss, generator_loss), optimizers, expected, strict=True
    ):
        opt.zero_grad()
        loss(net, range(N)).backward()
        opt.step()
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.grad, truth[name], rtol=1e-9, atol=1e-13)


def test_actor_and_critic_on_batches_of_any_size():
    model = nn.ModuleDict({"trunk": mlp(3, 4), "actor": nn.Linear(4, 2), "critic": nn.Linear(4, 1)}).double()
    opt = None
    for size in (5, 2, 7):
        x, action, gain = floats(size, 3), torch.randint(0, 2, (size,)), floats(size)

        def loss(net, samples, x=x, action=action, gain=gain):
            rows = list(samples)
            hidden = torch.tanh(net["trunk"](x[rows]))
            value = net["critic"](hidden).squeeze(1)
            chosen = net["actor"](hidden).log_softmax(1).gather(1, action[rows, None]).squeeze(1)
            return ((value - gain[rows]).square() - chosen * (gain[rows] - value.detach())).mean()

        if opt is not None:
            opt.detach()
        truth = natural_gradients(model, loss, size)
        opt = fngd.FNGD(model, lr=0.0, normalize="raw", damping=0.3, share="none")
        loss(model, range(size)).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, truth[name], rtol=1e-9, atol=1e-13)
        model.zero_grad()


# ---- other ways of taking gradients


def test_truncated_backpropagation_through_time():
    class LanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = nn.Embedding(6, 3), nn.LSTM(3, 4, batch_first=True)
            self.head = nn.Linear(4, 6)

        def forward(self, x, state):
            y, state = self.layer(self.embedding(x), state)
            return self.head(y), state

    model, tokens = LanguageModel().double(), torch.randint(0, 6, (N, 7))
    state = None
    for begin in (0, 3):
        piece, target = tokens[:, begin : begin + 3], tokens[:, begin + 1 : begin + 4]

        def loss(net, samples, piece=piece, target=target, state=state):
            rows = list(samples)
            part = None if state is None else tuple(s[:, rows] for s in state)
            return F.cross_entropy(net(piece[rows], part)[0].flatten(0, 1), target[rows].flatten())

        coverage = check(model, loss, N)
        assert {coverage["embedding.weight"], coverage["layer.weight_hh_l0"]} == {"embedding", "generic"}
        state = tuple(s.detach() for s in model(piece, state)[1])


def test_gradient_penalty_of_a_critic():
    model, between = mlp(3, 4, 4, 1), floats(N, 3)

    def loss(net, samples):
        x = between[list(samples)].requires_grad_()
        y = net(x)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return (y.squeeze(1) + 10 * (dx.norm(dim=1) - 1).square()).mean()

    assert set(check(model, loss, N).values()) == {"linear"}


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
        assert {"plain: its gradient was asked for with create_graph=True", "generic"} >= set(
            opt.coverage().values()
        )
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
        assert not opt._engine._watches
        opt.detach()
    assert all("outside of its calls" in how for how in opt.coverage().values())
    for p, alone, both in zip(model.parameters(), *gradients, strict=True):
        torch.testing.assert_close(both, alone + 0.2 * p, rtol=1e-10, atol=1e-14)


def test_adaptive_softmax_names_the_clusters_that_see_some_samples():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.softmax = nn.Linear(3, 8), nn.AdaptiveLogSoftmaxWithLoss(8, 10, [4, 7])

        def forward(self, x, y):
            return self.softmax(torch.tanh(self.first(x)), y)

    model, x, y = Classifier().double(), floats(N, 3), torch.tensor([0, 1, 5, 2])
    coverage = check(model, lambda net, rows: net(x[list(rows)], y[list(rows)]).loss, N)
    assert coverage["softmax.head.weight"] == coverage["first.weight"] == "linear"
    assert coverage["softmax.tail.0.0.weight"] == f"plain: its input has 1 rows, the batch has {N} samples"
    assert coverage["softmax.tail.1.0.weight"] == "plain: its module took no part in a solving step"
