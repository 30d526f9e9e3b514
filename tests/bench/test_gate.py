import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fngd
from bench.steps import gate, oracle
from bench.steps.networks import Network

CPU = torch.device("cpu")
SMALL = Network(
    name="small",
    model=lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ),
    batch=lambda: (torch.randn(6, 2, 4, 4), torch.randint(3, (6,))),
    loss=F.cross_entropy,
    gate=("0", "1", "4"),
)
fngd_class = fngd.FNGD


def test_gate_passes_correct_figures():
    torch.manual_seed(0)
    gate.check(SMALL, SMALL.batch())


@pytest.mark.parametrize(
    ("layer", "a"),
    [
        (nn.Linear(4, 3), torch.randn(5, 4)),
        (nn.Linear(4, 3, bias=False), torch.randn(5, 2, 3, 4)),
        (nn.Conv2d(2, 3, 3, padding=1, stride=2, dilation=2), torch.randn(5, 2, 9, 8)),
        (nn.Embedding(6, 3), torch.randint(6, (5, 4))),
        (nn.LayerNorm((2, 3)), torch.randn(5, 4, 2, 3)),
        (nn.BatchNorm2d(2), torch.randn(5, 2, 3, 3)),
    ],
)
def test_contributions_are_the_gradients_of_single_samples(layer, a):
    e = torch.randn_like(layer(a))
    parts = oracle.contributions(layer, a, e)
    assert parts.keys() == dict(layer.named_parameters()).keys()
    layer = layer.double()
    for n in range(len(a)):
        out = layer(a.double() if a.is_floating_point() else a)
        gradients = torch.autograd.grad((out[n] * e[n].double()).sum(), layer.parameters())
        for rows, expected in zip(parts.values(), gradients, strict=True):
            assert rows.dtype == torch.float64
            torch.testing.assert_close(rows[n], expected)
    with pytest.raises(TypeError, match="layer: expected one that the oracle has a formula for"):
        oracle.contributions(nn.GroupNorm(1, 2), torch.ones(2, 2), torch.ones(2, 2))


class Noise(nn.Module):
    """Two passes differ, more than tolerances allow."""

    def forward(self, x):
        return x + 0.2 * torch.randn_like(x)


def test_the_gate_compares_each_pass_with_itself():
    noisy = dataclasses.replace(SMALL, model=lambda: SMALL.model().insert(2, Noise()), gate=("0", "1", "5"))
    torch.manual_seed(0)
    batch = noisy.batch()
    gate.check(noisy, batch)
    gate.check_mode(noisy, batch, "graphed")


@pytest.mark.parametrize("share", ["sample", "none"])
def test_gate_stops_a_graph_with_weights_of_other_samples(share, monkeypatch):
    batch = SMALL.draw(CPU)
    make_step = gate.make_step

    def stale(network, batch, model, optimizer, mode):
        step = make_step(network, batch, model, optimizer, mode)

        def run():
            step()
            if optimizer.share == share:
                optimizer.state[model[4].weight]["momentum_buffer"][0] *= 1.001

        return run

    gate.check_mode(SMALL, batch, "graphed")
    monkeypatch.setattr(gate, "make_step", stale)
    message = f"weighted gradient of 4, graphed, share='{share}', weight: relative deviation"
    with pytest.raises(AssertionError, match=message):
        gate.check_mode(SMALL, batch, "graphed")


def test_gate_stops_wrong_figures(monkeypatch):
    torch.manual_seed(0)
    batch = SMALL.batch()
    layer_grams = fngd.layer_grams
    with monkeypatch.context() as patch:
        patch.setattr(fngd, "layer_grams", lambda *a: {k: 1.0001 * v for k, v in layer_grams(*a).items()})
        with pytest.raises(AssertionError, match=r"Gram matrix of 0: relative deviation 1\.0e-04"):
            gate.check(SMALL, batch)
        patch.setattr(fngd, "layer_grams", lambda *a: {"0": layer_grams(*a)["0"]})
        with pytest.raises(AssertionError, match=r"layers without a Gram matrix: \['1', '4'\]"):
            gate.check(SMALL, batch)
    with monkeypatch.context() as patch:
        patch.setattr(gate, "DAMPING", 0.1 + 1e-3)
        patch.setattr(gate.fngd, "FNGD", lambda *a, damping, **k: fngd_class(*a, damping=0.1, **k))
        with pytest.raises(AssertionError, match="coefficients of 0: relative deviation"):
            gate.check(SMALL, batch)
    with monkeypatch.context() as patch:
        patch.setattr(gate.fngd, "FNGD", lambda *a, **k: fngd_class(*a, **k, skip=("4",)))
        with pytest.raises(AssertionError, match=r"layers with the plain gradient: \['4'\]"):
            gate.check(SMALL, batch)
    with monkeypatch.context() as patch:
        patch.setattr(fngd_class, "zero_grad", lambda *_: None)
        with pytest.raises(AssertionError, match="weighted gradient of 0, weight: relative deviation"):
            gate.check(SMALL, batch)


def test_gate_compares_modes_by_what_fngd_changes(monkeypatch):
    batch = SMALL.draw(CPU)
    changes = gate._changes
    eager = changes(SMALL, batch, "eager")
    assert list(eager) == ["0.weight", "0.bias", "4.weight", "4.bias"]
    assert all(change.norm() > 0 for change in eager.values())
    monkeypatch.setattr(gate, "_changes", lambda network, batch, _: changes(network, batch, "eager"))
    gate.check_mode(SMALL, batch, "compiled")
    # a layer that lost its weights keeps the plain gradient
    lost = {"eager": eager, "compiled": eager | {"4.bias": torch.zeros(3)}}
    monkeypatch.setattr(gate, "_changes", lambda *arguments: lost[arguments[2]])
    with pytest.raises(AssertionError, match=r"compiled step: weighted gradient of 4.bias is 100% off"):
        gate.check_mode(SMALL, batch, "compiled")
