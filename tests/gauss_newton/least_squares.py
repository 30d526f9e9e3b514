"""Least-squares problems and their dense Gauss-Newton step, whose Jacobian autograd gives row by row."""

import itertools
import math

import torch
from torch import nn

import fngd

N = 9


def mlp(*sizes):
    layers = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def points(*shape):
    return torch.randn(shape, dtype=torch.float64)


def derivative(u, x):
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def rows(closure):
    """Scaled residuals of a closure, stacked."""
    returned = closure()
    blocks = returned.values() if isinstance(returned, dict) else [returned]
    parts = []
    for block in blocks:
        values, weight = block if isinstance(block, tuple) else (block, 1.0)
        parts.append(math.sqrt(weight / values.numel()) * values.flatten())
    return torch.cat(parts)


def dense_jacobian(closure, parameters):
    residuals = rows(closure)
    jacobian = []
    for r in residuals:
        gradients = torch.autograd.grad(r, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        jacobian.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    return torch.stack(jacobian), residuals.detach()


def dense_step(closure, parameters, damping, previous=None, momentum=0.0):
    """(J^T J + lam I)^-1 (J^T rho + lam mu phi), lam relative to the mean diagonal of J J^T."""
    jacobian, residuals = dense_jacobian(closure, parameters)
    lam = damping * jacobian.square().sum(1).mean()
    right = jacobian.T @ residuals
    if previous is not None:
        right = right + lam * momentum * previous
    return torch.linalg.solve(jacobian.T @ jacobian + lam * torch.eye(len(right)).double(), right)


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def step_error(model, residuals, parameters=None, **options):
    """Make a step; return its distance from the dense one, relative, and the optimizer."""
    parameters = list(model.parameters()) if parameters is None else parameters
    expected = dense_step(residuals, parameters, 0.1)
    before = flat(parameters)
    opt = fngd.GaussNewton(model, damping=0.1, params=parameters, **options)
    opt.step(residuals)
    return float((before - flat(parameters) - expected).norm() / expected.norm()), opt
