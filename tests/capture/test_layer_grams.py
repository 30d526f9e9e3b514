"""Gram matrices of layers without an optimizer."""

import pytest
import torch
from torch import nn

import fngd
import oracles


def contributions(model, loss, x):
    """Return {layer: C (N, P)} of a loss that is a mean over samples, by one backward for each sample."""
    rows = {}
    for n in range(len(x)):
        for name, module in model.named_children():
            own = list(module.parameters())
            if own:
                gradients = torch.autograd.grad(
                    loss(x[n : n + 1]) / len(x), own, allow_unused=True, materialize_grads=True
                )
                rows.setdefault(name, []).append(torch.cat([g.flatten() for g in gradients]))
    return {name: torch.stack(found) for name, found in rows.items()}


def penalised(model):
    """A loss with derivatives of the model: every layer is used in its forward and in a derivative of it."""

    def loss(x):
        x = x.requires_grad_()
        y = model(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return (y.square().sum(1) + slope.square().sum(1)).mean()

    return loss


def test_a_loss_that_holds_derivatives_of_the_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, loss = torch.randn(6, 3, dtype=torch.float64), penalised(model)
    expected = contributions(model, loss, x.clone())
    found = fngd.layer_grams(model, lambda: loss(x))
    assert found.keys() == expected.keys()
    for name, c in expected.items():
        torch.testing.assert_close(found[name], c @ c.T)


@pytest.mark.parametrize("derivatives", [False, True])
def test_the_closure_is_called_again_only_for_derivatives(derivatives):
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x, calls = torch.randn(4, 3, dtype=torch.float64), []

    def closure():
        calls.append(1)
        return penalised(model)(x) if derivatives else model(x).mean()

    fngd.layer_grams(model, closure)
    assert len(calls) == 1 + derivatives
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_what_a_layer_held_is_let_go_as_soon_as_its_matrix_is_formed():
    """A matrix product needs its inputs anyhow; what a finished layer's uses held must not add up."""
    layers, width, samples = 12, 512, 64
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    x = torch.randn(samples, width)
    weights = [layer.weight for layer in model]
    plain = oracles.peak_allocation(lambda: torch.autograd.grad(model(x).square().mean(), weights[:1]))
    held = oracles.peak_allocation(lambda: fngd.layer_grams(model, lambda: model(x).square().mean()))
    matrices = layers * samples**2 * 4
    activation = samples * width * 4
    assert held <= plain + matrices + 3 * activation
