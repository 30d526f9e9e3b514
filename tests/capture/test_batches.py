"""Gram matrices that are formed together at the end of backward, as on a GPU."""

import copy

import pytest
import torch
from torch import nn

import fngd
import fngd.preconditioner
import natural
from fngd.rules import register, rule_for
from fngd.rules.linear import LinearRule

N, T = 5, 3


class Layers(nn.Module):
    """Linear layers of which some are equal; one is called twice, two share a weight."""

    def __init__(self):
        super().__init__()
        self.equal = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.unbiased = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        self.rows = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in (*self.equal, *self.unbiased, self.twice, self.twice, self.first, self.second):
            x = torch.tanh(layer(x))
        return self.head(torch.tanh(self.rows(x.sum(1)))).square().mean()


def loss(model, samples):
    return model(torch.linspace(-1, 1, N * T * 4, dtype=torch.float64).view(N, T, 4).sin()[list(samples)])


@pytest.fixture
def batches(monkeypatch):
    """Let FNGD form Gram matrices as on a GPU; return the number of layers of each batch."""
    found, gram_batch = [], fngd.preconditioner.gram_batch

    def spy(a, e, bias):
        found.append(len(a))
        return gram_batch(a, e, bias)

    monkeypatch.setattr(fngd.preconditioner, "runs_triton", lambda device: True)
    monkeypatch.setattr(fngd.preconditioner, "gram_batch", spy)
    return found


def test_only_equal_layers_are_formed_together(batches):
    natural.check(Layers().double(), loss, N)
    assert sorted(batches) == [2, 3]


# Compressed, layers of different sizes become equal.
@pytest.mark.parametrize(("sketch", "layers"), [(None, [2, 3]), (2, [2, 2, 3])])
def test_the_same_bits_as_one_by_one(sketch, layers, batches, monkeypatch):
    gradients = []
    for together in (True, False):
        monkeypatch.setattr(fngd.preconditioner, "runs_triton", lambda device, together=together: together)
        torch.manual_seed(0)
        model = Layers().double()
        opt = fngd.FNGD(model, share="none", sketch=sketch)
        loss(model, range(N)).backward()
        assert opt.stats()["solved_batches"] == 1
        gradients.append([p.grad for p in model.parameters()])
    assert sorted(batches) == layers
    for together, alone in zip(*gradients, strict=True):
        assert torch.equal(together, alone)


def test_layers_whose_memory_differs_are_formed_alone(batches):
    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))

        def forward(self, x):
            y = self.layers[0](x) * self.layers[1](x.mT.contiguous().mT)
            return y.square().mean()

    natural.check(Columns().double(), loss, N)
    assert batches == []


def test_a_rule_with_a_gram_matrix_of_its_own_is_asked_for_it(batches):
    asked = []

    class Own(nn.Linear):
        pass

    class OwnRule(LinearRule):
        def gram(self, module, uses):
            asked.append(module)
            return super().gram(module, uses)

    register(Own, OwnRule())
    assert isinstance(rule_for(Own(1, 1))[0], OwnRule)
    model = nn.Sequential(Own(4, 4), Own(4, 4)).double()
    opt = fngd.FNGD(model, share="none")
    model(torch.randn(N, 4, dtype=torch.float64)).square().sum().backward()
    assert opt.stats()["solved_batches"] == 1
    assert sorted(map(id, asked)) == sorted(map(id, model))
    assert batches == []


@pytest.mark.parametrize("failures", [1, 10**9])
def test_without_memory_for_all_each_is_formed_alone(batches, failures, monkeypatch):
    model = Layers().double()
    twin = copy.deepcopy(model)
    attempts = []

    def failing(a, e, bias, gram_batch=fngd.preconditioner.gram_batch):
        attempts.append(len(a))
        if len(attempts) <= failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gram_batch(a, e, bias)

    for each in (model, twin):
        opt = fngd.FNGD(each, share="none")
        loss(each, range(N)).backward()
        monkeypatch.setattr(fngd.preconditioner, "gram_batch", failing)
    assert len(attempts) > 2
    assert opt.stats()["fallbacks"] == {}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_second_backward_forms_its_own(batches):
    model = Layers().double()
    opt = fngd.FNGD(model, share="none")
    loss(model, range(N)).backward()
    first = [p.grad.clone() for p in model.parameters()]
    loss(model, range(N)).backward()
    assert sorted(batches) == [2, 2, 3, 3]
    assert opt.stats()["solved_batches"] == 2
    for p, gradient in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)
