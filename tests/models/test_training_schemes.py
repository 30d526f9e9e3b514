"""Schemes in which samples mix, models meet, or samples come in pieces."""

import torch
import torch.nn.functional as F
from torch import nn

import fngd
from architectures import floats, mlp
from natural import call_rows, check, natural_gradients

N = 4


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


# ---- samples or steps apart


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
