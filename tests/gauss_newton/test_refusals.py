"""Residuals that make no Gauss-Newton step are refused by name, and no parameter changes."""

import pytest
import torch
import torch.nn.functional as F
from least_squares import N, flat, mlp, points, step_error
from torch import nn

import fngd

MEMORY = "DefaultCPUAllocator: can't allocate memory"


def fitted(transform):
    model, x = mlp(3, 8, 1), points(N, 3)
    return model, lambda: transform(model(x).squeeze(1))


def subtracted(subtract):
    model, x, y = mlp(3, 8, 1), points(N, 3), points(N)
    return model, lambda: subtract(model(x), y)


def batch_norm():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x = points(N, 3)
    return model, lambda: model(x).squeeze(1)


def frozen():
    model, residuals = fitted(lambda r: r - 1)
    return model.requires_grad_(False), residuals


def of_another_model():
    model, other, x = mlp(3, 8, 1), mlp(3, 8, 1), points(N, 3)
    return model, lambda: {"own": model(x), "other": other(x)}


def losses(loss, targets):
    model, x = mlp(3, 8, 4), points(N, 3)
    return model, lambda: loss(model(x), targets, reduction="none")


def without_graph(combine):
    model, x = mlp(3, 8, 1), points(N, 3)

    def residuals():
        z = x.clone().requires_grad_()
        u = model(z).squeeze(1)
        return combine(u, torch.autograd.grad(u.sum(), z)[0][:, 0])

    return model, residuals


SQUARE = r"block 'residuals' is \(9, 9\), and the residuals of a row or column are multiples of one function"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (batch_norm, ValueError, r"module '1' \(BatchNorm1d\) couples the samples"),
        (lambda: fitted(lambda r: r.square().mean()), ValueError, r"expected shape \(N,\) or \(N, C\)"),
        (lambda: fitted(lambda r: r.detach()), ValueError, "does not depend on a parameter"),
        (lambda: fitted(lambda r: r.tolist()), TypeError, "expected floating tensors"),
        (lambda: fitted(lambda r: {}), ValueError, "at least one block"),
        (lambda: fitted(lambda r: {"a": (r, -1.0)}), ValueError, "weight >= 0 for block 'a'"),
        (lambda: fitted(lambda r: {"a": (r, "x")}), TypeError, "a number as the weight of block 'a'"),
        (lambda: subtracted(lambda u, y: u - y), ValueError, SQUARE),
        (lambda: subtracted(lambda u, y: u.squeeze(1) - y[:, None]), ValueError, SQUARE),
        (lambda: subtracted(lambda u, y: (u - y) / y), ValueError, SQUARE),
        (lambda: subtracted(lambda u, y: (u - y).tanh() * y[:, None]), ValueError, SQUARE),
        (lambda: subtracted(lambda u, y: (u - y).flatten()), ValueError, SQUARE),
        (frozen, ValueError, "params: expected a parameter that requires a gradient"),
        (of_another_model, ValueError, "block 'other' depends on no parameter of this optimizer"),
        (lambda: losses(F.cross_entropy, torch.zeros(N).long()), ValueError, "already a loss .NllLoss"),
        (lambda: losses(F.mse_loss, points(N, 4)), ValueError, "already a loss .MseLoss"),
        (lambda: without_graph(lambda u, du: du), ValueError, "create_graph=True"),
        (lambda: without_graph(lambda u, du: du + u), ValueError, "graph was freed.*create_graph=True"),
    ],
)
def test_residuals_are_refused(make, error, message):
    model, residuals = make()
    before = flat(model.parameters())
    with pytest.raises(error, match=message):
        fngd.GaussNewton(model).step(residuals)
    assert torch.equal(flat(model.parameters()), before)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("outputs", [2, 3, 5])
def test_as_many_outputs_as_samples_are_no_broadcast(outputs):
    model, x, y = mlp(3, 4, outputs), points(outputs, 3), points(outputs, outputs)
    error, _ = step_error(model, lambda: model(x) - y)
    assert error < 1e-8


def test_one_coefficient_of_as_many_outputs_as_samples_is_no_broadcast():
    model, x, coefficient = mlp(3, 4, 3), points(3, 3), nn.Parameter(points())
    error, _ = step_error(model, lambda: coefficient * model(x).detach() - 1, [coefficient])
    assert error < 1e-8


def test_columns_of_one_function_are_served_as_two_blocks():
    model, x, y = mlp(3, 4, 1), points(4, 3), points(4, 4)

    def residuals():
        r = model(x) - y  # four measurements of every sample
        return {"first": r[:, :2], "second": r[:, 2:]}

    error, _ = step_error(model, residuals)
    assert error < 1e-8


def test_systems_larger_than_memory_are_refused(monkeypatch):
    model, x = mlp(3, 4, 1), points(N, 3)
    empty = torch.empty

    def out_of_memory(size, **options):
        if size == (3, N, N):
            raise RuntimeError(MEMORY)
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", out_of_memory)
    with pytest.raises(ValueError, match=r"9 residuals, J J\^T and its factor need 0.0 GB"):
        fngd.GaussNewton(model, solver="sample").step(lambda: {"values": model(x)})


def test_derivatives_that_do_not_belong_to_their_values_are_refused():
    class Wrong(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            Wrong.calls += 1
            return gradient * Wrong.calls

    model, x = mlp(3, 4, 1), points(N, 3)
    opt = fngd.GaussNewton(model)
    with pytest.raises(ValueError, match=r"Jacobian of .* does not agree with its gradient"):
        opt.step(lambda: Wrong.apply(model(x)).flip(0))
