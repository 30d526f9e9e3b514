"""Least-squares problems of every kind of layer: each returns the model, its parameters and the residuals."""

import torch
import torch.nn.functional as F
from least_squares import N, derivative, mlp, points
from torch import nn


def regression():
    model, x, y = mlp(3, 8, 8, 1), points(N, 3), points(N)
    return model, list(model.parameters()), lambda: model(x).squeeze(-1) - y


def several_outputs():
    model, x, y = mlp(3, 8, 2), points(N, 3), points(N, 2)
    return model, list(model.parameters()), lambda: model(x) - y


def laplacian():
    model, x = mlp(2, 8, 8, 1), points(N, 2)

    def residuals():
        z = x.clone().requires_grad_()
        du = derivative(model(z), z)
        return sum(derivative(du[:, i], z)[:, i] for i in range(2)) - x[:, 0]

    return model, list(model.parameters()), residuals


def third_order():
    model, x = mlp(2, 6, 1), points(N, 2)

    def residuals():
        z = x.clone().requires_grad_()
        u = model(z)
        du = derivative(u, z)
        ut, ux = du[:, 0], du[:, 1]
        uxxx = derivative(derivative(ux, z)[:, 1], z)[:, 1]
        return ut + 6 * u.squeeze(1) * ux + uxxx

    return model, list(model.parameters()), residuals


def convolution():
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)
    ).double()
    x = points(N, 2, 8)

    def residuals():
        z = x.clone().requires_grad_()
        u = model(z).squeeze(1)
        return u + derivative(u, z).square().sum((1, 2))

    return model, list(model.parameters()), residuals


def tied_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model[2].weight = model[0].weight
    x = points(N, 4)
    return model, list(model.parameters()), lambda: model(x).squeeze(1) - 1


def reused_layer():
    model = mlp(4, 4, 4)
    x = points(N, 4)
    return model, list(model.parameters()), lambda: model(model(x)).sum(1) - 1


def two_blocks():
    model, inside, boundary = mlp(2, 8, 1), points(N, 2), points(5, 2)

    def residuals():
        z = inside.clone().requires_grad_()
        u = model(z)
        interior = derivative(derivative(u, z)[:, 0], z)[:, 1] + u.squeeze(1)
        return {"interior": interior, "boundary": (model(boundary).squeeze(1) - 1, 25.0)}

    return model, list(model.parameters()), residuals


def unknown_coefficient():
    model, x = mlp(1, 8, 1), points(N, 1)
    coefficient = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def residuals():
        z = x.clone().requires_grad_()
        u = model(z)
        du = derivative(u, z)
        return {"equation": (derivative(du, z) + coefficient * du).squeeze(1), "data": u.squeeze(1) - 1}

    return model, [*model.parameters(), coefficient], residuals


def raw_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.frequencies = mlp(6, 5, 1), nn.Parameter(torch.randn(3, 6))

        def forward(self, x):
            return self.net(torch.sin(x @ self.frequencies))

    model, x = Model().double(), points(N, 3)
    return model, list(model.parameters()), lambda: model(x).squeeze(1) - 1


def weight_used_outside():
    model, x = mlp(3, 3, 1), points(N, 3)
    return model, list(model.parameters()), lambda: model(F.linear(x, model[0].weight).sin()).squeeze(1) - 1


def normalised():
    model = nn.Sequential(
        nn.Linear(3, 8),
        nn.LayerNorm(8),
        nn.Tanh(),
        nn.Linear(8, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.Linear(8, 1),
    )
    model.double()[4].eval()
    x = points(N, 3)

    def residuals():
        z = x.clone().requires_grad_()
        u = model(z)
        return u.squeeze(1) + derivative(u, z).square().sum(1)

    return model, list(model.parameters()), residuals


def embedding():
    model = nn.Sequential(nn.Embedding(6, 3, padding_idx=2), nn.Flatten(), nn.Linear(12, 1)).double()
    ids = torch.randint(6, (N, 4))
    return model, list(model.parameters()), lambda: model(ids).squeeze(1) - 1


def attending():
    layer = nn.TransformerDecoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"layer": layer, "head": nn.Linear(4, 1)}).double()
    x, memory = points(N, 3, 4), points(N, 2, 4)
    return model, list(model.parameters()), lambda: model["head"](model["layer"](x, memory)).mean((1, 2)) - 1


def recurrent():
    model = nn.Sequential(nn.Linear(2, 3), nn.RNN(3, 3, batch_first=True)).double()
    x = points(N, 4, 2)
    return model, list(model.parameters()), lambda: model(x)[0][:, -1].sum(1) - 1


PROBLEMS = [
    regression,
    several_outputs,
    laplacian,
    third_order,
    convolution,
    tied_weight,
    reused_layer,
    two_blocks,
    unknown_coefficient,
    raw_parameters,
    weight_used_outside,
    normalised,
    embedding,
    attending,
    recurrent,
]
