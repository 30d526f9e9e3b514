"""Layers with other rows than the residuals: captured by row, or differentiated; always the dense step."""

import pytest
import torch
from least_squares import dense_jacobian, derivative, mlp, points, step_error
from torch import nn

import fngd
import fngd_kernels as fk
from fngd.gauss_newton import jacobian as jacobian_module

TOLERANCE = 1e-8
DIFFER = "generic: its rows are not those of the residuals"


class OperatorNetwork(nn.Module):
    """A branch net on B functions and a trunk net on Q points, as in DeepONet."""

    def __init__(self):
        super().__init__()
        self.branch, self.trunk = mlp(5, 6, 4), mlp(1, 6, 4)
        self.bias = nn.Parameter(points())

    def forward(self, functions, x):
        return self.branch(functions) @ self.trunk(x).T + self.bias


class SeenBySteps(nn.Module):
    """Token and position embeddings before attention."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(6, 4), nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, ids):
        return self.head(self.layer(self.tokens(ids) + self.positions(torch.arange(5)))).mean((1, 2))


class Graph(nn.Module):
    """A graph network: row n of its second layer depends on all rows of the first."""

    def __init__(self, nodes):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)
        self.register_buffer("adjacency", torch.rand(nodes, nodes))

    def forward(self, x):
        return self.second(self.adjacency @ self.first(x).tanh()).squeeze(1)


class Sine(torch.autograd.Function):
    """A sine whose backward runs neither under vmap nor, once more, under autograd."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        assert gradient.abs().max().item() < 1e9
        return gradient * x.cos()


# ---- problems whose layers are captured ----


def cut_afterwards():
    model, x = mlp(2, 8, 8, 1), points(20, 2)

    def residuals():
        z = x.clone().requires_grad_()
        u = model(z)
        du = derivative(u, z)
        equation = sum(derivative(du[:, i], z)[:, i] for i in range(2)) + u.squeeze(1) ** 2
        return {"equation": equation[:13], "value": (u[13:].squeeze(1) - 1, 9.0), "slope": du[13:18] - 1}

    return model, residuals


def chosen_by_masks():
    model, x = mlp(2, 8, 1), points(20, 2)
    mask = x[:, 0] > 0.2
    return model, lambda: {"right": model(x)[mask], "left": model(x)[~mask] - 1}


def cut_with_rows_without_gradient():
    # The boundary values are built in: the residuals at the ends do not change with the parameters.
    model, x = mlp(1, 8, 1), torch.linspace(0, 1, 16, dtype=torch.float64)[:, None]

    def residuals():
        z = x.clone().requires_grad_()
        u = z * (1 - z) * model(z)
        return {"values": u[:6].squeeze(1) - 1, "equation": (z * derivative(u, z))[:9] - 1, "end": u[9:]}

    return model, residuals


def cut_dead_units():
    model, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double(), points(20, 2)
    return model, lambda: (lambda u: {"first": u[:7], "second": u[7:] - 1})(model(x))


def cut_convolutions():
    layers = nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 1, bias=False)
    model, x = nn.Sequential(*layers).double(), points(12, 2, 4)
    return model, lambda: (lambda u: {"first": u[:7], "difference": u[:6] - u[6:]})(model(x))


def cut_embeddings():
    model = nn.Sequential(nn.Embedding(6, 3, padding_idx=0), nn.Flatten(), nn.Linear(12, 1)).double()
    ids = torch.randint(6, (12, 4))
    return model, lambda: (lambda u: {"first": u[:7], "mean": (u.mean() - 1).reshape(1)})(model(ids))


def differences_in_one_call():
    model, x = mlp(2, 8, 1), points(9, 2)

    def residuals():
        ahead, here, behind = model(torch.cat([x + 0.1, x, x - 0.1])).view(3, 9)
        return (ahead - 2 * here + behind) / 0.01 - 1

    return model, residuals


def differences_side_by_side():
    model, x = mlp(2, 8, 1), points(9, 2)

    def residuals():
        ahead, behind = model(torch.stack([x + 0.1, x - 0.1], 1).flatten(0, 1)).view(9, 2).unbind(1)
        return (ahead - behind) / 0.2 - 1

    return model, residuals


def integral():
    model, x = mlp(2, 8, 1), points(20, 2)

    def residuals():
        u = model(x).squeeze(1)
        return {"values": u - 1, "mass": (u.mean() - 0.5).reshape(1)}

    return model, residuals


def integrals_over_lines():
    model, x = mlp(2, 8, 1), points(20, 2)
    return model, lambda: {"mass": model(x).view(5, 4).mean(1) - 0.5, "value": model(x[:3]) - 1}


CAPTURED = [
    cut_afterwards,
    chosen_by_masks,
    cut_with_rows_without_gradient,
    cut_dead_units,
    cut_convolutions,
    cut_embeddings,
    differences_in_one_call,
    differences_side_by_side,
    integral,
    integrals_over_lines,
]


@pytest.mark.parametrize("problem", CAPTURED)
def test_rows_of_one_call_are_found_for_every_residual(problem):
    error, opt = step_error(*problem())
    assert error < TOLERANCE
    assert not any(how.startswith("generic") for how in opt.coverage().values())


def test_rows_that_change_between_steps_are_found_anew():
    model, x, mask = mlp(2, 8, 1), points(20, 2), torch.arange(20) % 3 == 0

    def residuals():
        u = model(x).squeeze(1)
        return {"some": u[mask], "others": u[~mask] - 1}

    _, opt = step_error(model, residuals)
    for shift in (1, 5):
        mask = mask.roll(shift)
        jacobian = opt._linearize(residuals)
        rho = torch.cat([r / len(r) ** 0.5 for r in residuals().values()])
        found = jacobian.by_parameter(jacobian.transposed_times(torch.arange(20.0).double()))
        expected = torch.autograd.grad(rho, list(model.parameters()), torch.arange(20.0).double())
        torch.testing.assert_close([found[p] for p in model.parameters()], list(expected))
        torch.testing.assert_close(jacobian.residuals, rho.detach())


# ---- problems of which some layers are differentiated ----


def operator_network(functions, x):
    model, inputs, at, targets = OperatorNetwork(), points(functions, 5), points(x, 1), points(functions, x)
    return model, lambda: model(inputs, at) - targets


def operator_network_by_pairs():
    model, inputs, at = OperatorNetwork(), points(4, 5), points(3, 1)
    i, j = torch.cartesian_prod(torch.arange(4), torch.arange(3)).T
    return model, lambda: (model.branch(inputs)[i] * model.trunk(at)[j]).sum(1) + model.bias - 1


def positions():
    model, ids = SeenBySteps().double(), torch.randint(6, (9, 5))
    return model, lambda: model(ids) - 1


def graph():
    model, x = Graph(9).double(), points(9, 3)
    return model, lambda: model(x) - 1


def mean_removed():
    model, x = mlp(2, 8, 1), points(9, 2)
    return model, lambda: model(x).squeeze(1) - model(x).mean()


def reordered():
    model, x = mlp(2, 8, 1), points(40, 2)  # fewer numbers than residuals
    return model, lambda: model(x).squeeze(1).flip(0) - 1


def prior():
    model, x = mlp(2, 4, 1), points(9, 2)
    return model, lambda: {"data": model(x), "prior": (model[0].weight, 0.1)}


def without_vmap(rows):
    model, x = mlp(2, 4, 1), points(rows, 2)
    return model, lambda: Sine.apply(model(x)).squeeze(1).flip(0)


DIFFERENTIATED = {
    "functions on points": (lambda: operator_network(4, 6), ["trunk.0", "trunk.2"]),
    "as many functions as points": (lambda: operator_network(5, 5), ["trunk.0", "trunk.2"]),
    "one point": (lambda: operator_network(6, 1), ["trunk.0", "trunk.2"]),
    "pairs": (operator_network_by_pairs, ["branch.0", "branch.2", "trunk.0", "trunk.2"]),
    "positions": (positions, ["positions"]),
    "graph": (graph, ["first"]),
    "mean removed": (mean_removed, ["0", "2"]),
    "reordered": (reordered, ["0", "2"]),
    "without vmap": (lambda: without_vmap(9), ["0", "2"]),
    "without a second derivative": (lambda: without_vmap(40), ["0", "2"]),
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_layers_with_other_rows_are_differentiated_and_named(name, caplog):
    problem, layers = DIFFERENTIATED[name]
    error, opt = step_error(*problem())
    assert error < TOLERANCE
    differing = {p.rpartition(".")[0] for p, how in opt.coverage().items() if how == DIFFER}
    assert sorted(differing) == layers
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("GaussNewton: layers differentiated instead of captured, which takes longer")
    assert all(layer in line for layer in layers)


def test_an_integral_over_many_points_takes_no_more_memory_than_its_rows(monkeypatch):
    monkeypatch.setattr(jacobian_module, "FORMED_BYTES", 0)
    filled_up = []
    gram = fk.gram
    monkeypatch.setattr(fk, "gram", lambda a, e, **k: filled_up.append(a.shape) or gram(a, e, **k))
    model, x = mlp(2, 8, 1), points(400, 2)

    def residuals():
        return {"values": model(x[:10]), "mass": model(x).mean().reshape(1)}

    jacobian = fngd.GaussNewton(model)._linearize(residuals)
    j, _ = dense_jacobian(residuals, jacobian.parameters)
    with torch.no_grad():
        torch.testing.assert_close(jacobian.gram(), j @ j.T)
    assert not filled_up


def test_rows_that_nothing_depends_on():
    model, x = mlp(2, 4, 1), points(12, 2)
    error, opt = step_error(model, lambda: model(x[:9]) + model(x)[:0].sum() - 1)
    assert error < TOLERANCE
    assert opt.coverage()["0.weight"] == "linear"


def test_a_call_on_no_rows():
    model, x = mlp(2, 4, 1), points(9, 2)
    error, _ = step_error(model, lambda: model(x) + model(x[:0]).sum() - 1)
    assert error < TOLERANCE


def test_residuals_may_be_parameters():
    error, opt = step_error(*prior())
    assert error < TOLERANCE
    assert opt.coverage()["2.weight"] == "linear"


def test_one_function_alone_is_captured():
    error, opt = step_error(*operator_network(1, 6))
    assert error < TOLERANCE
    assert opt.coverage()["trunk.0.weight"] == "linear"


def test_anomaly_detection_does_not_mind():
    with torch.autograd.detect_anomaly(check_nan=True):
        error, _ = step_error(*cut_afterwards())
    assert error < TOLERANCE


def test_single_precision():
    model, x = mlp(2, 8, 1).float(), points(20, 2).float()
    opt = fngd.GaussNewton(model, damping=0.1)
    jacobian = opt._linearize(lambda: (lambda u: {"first": u[:7], "second": u[7:] - 1})(model(x)))
    model, x = model.double(), x.double()
    dense = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(
        dict(model.named_parameters())
    )
    scale = torch.tensor([7.0] * 7 + [13.0] * 13).double().rsqrt()[:, None]
    j = scale * torch.cat([rows.reshape(20, -1) for rows in dense.values()], 1).detach()
    torch.testing.assert_close(jacobian.gram(), j @ j.T, rtol=1e-5, atol=1e-6)
