"""Which parameters take part: coefficients outside of the model, unused ones, layers changed afterwards."""

import pytest
import torch
from least_squares import N, dense_step, flat, mlp, points, step_error
from torch import nn
from torch.nn.utils import parametrizations, prune

import fngd

MOVED = "generic: its parameters were replaced or parametrized since the optimizer was made"
OUTSIDE = "generic: it is outside of the model"


def test_coverage_names_coefficients_outside_of_the_model(caplog):
    model, x = mlp(2, 6, 1), points(N, 2)
    coefficient, forgotten = (nn.Parameter(points()) for _ in range(2))
    tensor = points().requires_grad_()
    frozen = nn.Parameter(points(), requires_grad=False)
    parameters = [*model.parameters(), coefficient, forgotten, tensor, frozen]

    def residuals():
        return model(x).squeeze(1) * coefficient + tensor

    expected = dense_step(residuals, [p for p in parameters if p.requires_grad], 0.1)
    before = flat(p for p in parameters if p.requires_grad)
    opt = fngd.GaussNewton(model, damping=0.1, params=parameters)
    for _ in range(2):
        opt.step(residuals)
    assert [record.getMessage() for record in caplog.records] == [
        "GaussNewton: no residual depends on params[5], which stays as it is"
    ]
    coverage = opt.coverage()
    assert coverage["0.weight"] == "linear"
    assert coverage["params[4]"] == coverage["params[6]"] == OUTSIDE
    assert coverage["params[5]"] == "unused: no residual depends on it"
    assert coverage["params[7]"] == "frozen"
    assert list(coverage) == [*dict(model.named_parameters()), *(f"params[{i}]" for i in range(4, 8))]

    for p, start in zip(parameters, before.split([p.numel() for p in parameters[:-1]]), strict=False):
        p.detach().copy_(start.view(p.shape))
    opt.step(residuals)
    step = before - flat(p for p in parameters if p.requires_grad)
    assert float((step - expected).norm() / expected.norm()) < 1e-8


def test_an_unused_layer_is_named(caplog):
    model, x = nn.ModuleDict({"used": mlp(2, 6, 1), "head": nn.Linear(6, 2).double()}), points(N, 2)
    error, opt = step_error(model, lambda: model["used"](x))
    assert error < 1e-8
    assert opt.coverage()["head.weight"] == "unused: no residual depends on it"
    assert len(caplog.records) == 2


def pruned(model):
    prune.l1_unstructured(model[0], "weight", amount=0.5)


def spectral_norm(model):
    parametrizations.spectral_norm(model[0]).parametrizations.eval()


def weight_norm(model):
    parametrizations.weight_norm(model[0])


def replaced(model):
    model[0].weight = nn.Parameter(points(4, 4))


def tied(model):
    model[0].weight = model[2].weight


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("change", [pruned, spectral_norm, weight_norm, replaced, tied])
def test_layers_changed_after_the_optimizer_was_made_are_differentiated(change, steps):
    model, x = mlp(4, 4, 4, 1), points(N, 4)

    def residuals():
        return model(x).squeeze(1) - 1

    opt = fngd.GaussNewton(model, damping=0.1)
    for _ in range(steps):
        opt.step(residuals)
    change(model)
    optimized = {p for group in opt.param_groups for p in group["params"]}
    trained = [p for p in model.parameters() if p in optimized]
    expected = dense_step(residuals, trained, 0.1)
    before = flat(trained)
    opt.step(residuals)
    assert float((before - flat(trained) - expected).norm() / expected.norm()) < 1e-8
    assert opt.coverage()["0.bias"] == MOVED
    assert opt.coverage()["4.weight"] == "linear"
    for name in ("0.weight_orig", "0.parametrizations.weight.original"):
        assert opt.coverage().get(name, MOVED) == MOVED


def test_new_parameters_of_a_layer_are_not_optimized_and_the_old_ones_are_named(caplog):
    model, x = mlp(4, 4, 1), points(N, 4)
    opt = fngd.GaussNewton(model)
    replaced(model)
    new = model[0].weight.detach().clone()
    opt.step(lambda: model(x).squeeze(1))
    assert torch.equal(model[0].weight, new)
    assert opt.coverage()["0.weight"] == "unused: no residual depends on it"
    assert "no residual depends on 0.weight" in caplog.text
