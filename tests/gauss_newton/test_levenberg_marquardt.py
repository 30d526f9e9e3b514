"""Steps of damping="lm": geodesic acceleration and the damping rule, against both written out densely."""

import pytest
import torch
from least_squares import dense_jacobian, flat, mlp, points, rows
from residual_problems import laplacian, regression, two_blocks
from torch.nn.utils import vector_to_parameters

import fngd


def residuals_at(model, residuals, theta):
    before = flat(model.parameters())
    vector_to_parameters(theta, model.parameters())
    found = rows(residuals).detach()
    vector_to_parameters(before, model.parameters())
    return found


def dense_trial(model, residuals, damping, h=0.1):
    """Velocity, acceleration and the loss that the linear model foretells, by dense algebra."""
    jacobian, rho = dense_jacobian(residuals, list(model.parameters()))
    theta = flat(model.parameters())
    lam = damping * jacobian.square().sum(1).mean()
    inverse = torch.linalg.inv(jacobian.T @ jacobian + lam * torch.eye(len(theta)).double())
    v = -inverse @ jacobian.T @ rho
    second = 2 / h * ((residuals_at(model, residuals, theta + h * v) - rho) / h - jacobian @ v)
    return v, -inverse @ jacobian.T @ second, (rho + jacobian @ v).square().sum(), rho.square().sum()


@pytest.mark.parametrize("solver", ["sample", "parameter", "iterative"])
@pytest.mark.parametrize("problem", [laplacian, regression, two_blocks], ids=lambda f: f.__name__)
def test_a_step_is_velocity_and_half_the_acceleration(problem, solver):
    torch.manual_seed(1)
    model, parameters, residuals = problem()
    opt = fngd.GaussNewton(model, initial_damping=3.0, solver=solver, tolerance=1e-11)
    v, a, foretold, before = dense_trial(model, residuals, 3.0)
    assert a.norm() < 0.75 * v.norm()
    start = flat(parameters)
    opt.step(residuals)
    torch.testing.assert_close(flat(parameters) - start, v + a / 2, rtol=1e-7, atol=1e-10)
    assert opt.stats()["accelerated_steps"] == 1
    gain = (before - rows(residuals).detach().square().sum()) / (before - foretold)
    factor = max(1 / 3, 1 - (2 * min(float(gain), 1.0) - 1) ** 3)
    assert opt.damping == pytest.approx(3.0 * factor, rel=1e-6)


def test_an_acceleration_that_is_too_large_is_left_out():
    torch.manual_seed(0)
    model, parameters, residuals = two_blocks()
    v, a, _, before = dense_trial(model, residuals, 0.01)
    start = flat(parameters)
    assert a.norm() > 0.75 * v.norm()
    assert residuals_at(model, residuals, start + v).square().sum() < before
    opt = fngd.GaussNewton(model, initial_damping=0.01)
    opt.step(residuals)
    torch.testing.assert_close(flat(parameters) - start, v, rtol=1e-7, atol=1e-10)
    assert opt.stats()["accelerated_steps"] == 0


def test_without_acceleration():
    torch.manual_seed(1)
    model, parameters, residuals = laplacian()
    v, _, _, _ = dense_trial(model, residuals, 3.0)
    start = flat(parameters)
    fngd.GaussNewton(model, initial_damping=3.0, geodesic=False).step(residuals)
    torch.testing.assert_close(flat(parameters) - start, v, rtol=1e-7, atol=1e-10)


def test_failed_trials_raise_the_damping_faster_and_faster():
    """By 2, 4, 8, ... until a step lowers the loss."""
    torch.manual_seed(0)
    model, parameters, residuals = regression()
    opt = fngd.GaussNewton(model, initial_damping=1e-9, geodesic=False)
    start, damping, factor = flat(parameters), 1e-9, 2.0
    v, _, foretold, before = dense_trial(model, residuals, damping)
    while not residuals_at(model, residuals, start + v).square().sum() < before:
        damping, factor = damping * factor, 2 * factor
        v, _, foretold, before = dense_trial(model, residuals, damping)
    assert damping > 1e-8
    opt.step(residuals)
    torch.testing.assert_close(flat(parameters) - start, v, rtol=1e-6, atol=1e-9)
    gain = (before - rows(residuals).detach().square().sum()) / (before - foretold)
    assert opt.damping == pytest.approx(damping * max(1 / 3, 1 - (2 * float(gain) - 1) ** 3), rel=1e-5)


def test_the_second_derivative_is_that_of_the_residuals():
    """By the difference of a tenth of the step, against two jvps."""
    torch.manual_seed(0)
    model, x, y = mlp(2, 8, 1), points(12, 2), points(12)
    v, _, _, _ = dense_trial(model, lambda: model(x).squeeze(1) - y, 30.0)
    theta = flat(model.parameters())

    def along(t):
        names = [name for name, _ in model.named_parameters()]
        parts = (theta + t * v).split([p.numel() for p in model.parameters()])
        shaped = {n: part.view(p.shape) for n, part, p in zip(names, parts, model.parameters(), strict=True)}
        return torch.func.functional_call(model, shaped, (x,)).squeeze(1) - y

    zero, one = torch.zeros(()).double(), torch.ones(()).double()
    exact = torch.func.jvp(lambda t: torch.func.jvp(along, (t,), (one,))[1], (zero,), (one,))[1]
    jv = torch.func.jvp(along, (zero,), (one,))[1]
    difference = 2 / 0.1 * ((along(0.1) - along(0.0)) / 0.1 - jv)
    assert (difference - exact).norm() < 0.2 * exact.norm()
