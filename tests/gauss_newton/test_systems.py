"""Every form of a damped Gauss-Newton step is the dense step, and the cheaper one is chosen."""

import copy

import pytest
import torch
from least_squares import dense_jacobian, dense_step, flat, mlp, points
from residual_problems import PROBLEMS

import fngd
from fngd.gauss_newton import jacobian as jacobian_module
from fngd.gauss_newton import systems
from fngd.gauss_newton.iterative import IterativeSystem, Preconditioner
from fngd.gauss_newton.ranks import Ranks

TOLERANCE = 1e-8


@pytest.mark.parametrize("formed", [True, False], ids=["formed", "unformed"])
@pytest.mark.parametrize("solver", ["sample", "parameter", "iterative"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda f: f.__name__)
def test_every_form_is_the_dense_step(problem, solver, formed, monkeypatch):
    if not formed:
        monkeypatch.setattr(jacobian_module, "FORMED_BYTES", 0)
    torch.manual_seed(0)
    model, parameters, residuals = problem()
    expected = dense_step(residuals, parameters, 0.01)
    before = flat(parameters)
    opt = fngd.GaussNewton(model, damping=0.01, params=parameters, solver=solver, tolerance=1e-10)
    opt.step(residuals)
    assert float((before - flat(parameters) - expected).norm() / expected.norm()) < TOLERANCE
    assert opt.stats()["solver"] == solver


@pytest.mark.parametrize(
    ("rows", "limit", "expected"),
    [(20, 6000, "sample"), (60, 6000, "parameter"), (20, 19, "iterative"), (60, 32, "iterative")],
)
def test_the_cheaper_side_is_chosen_up_to_an_order(rows, limit, expected, monkeypatch):
    monkeypatch.setattr(systems, "EXACT_LIMIT", limit)
    model, x = mlp(2, 8, 1), points(rows, 2)  # 33 parameters
    opt = fngd.GaussNewton(model)
    opt.step(lambda: model(x) - 1)
    assert opt.stats()["solver"] == expected
    assert (opt.stats()["iterations"] > 0) == (expected == "iterative")


def test_the_preconditioner_saves_iterations():
    """Eigenvalues that fall by decades: conjugate gradients alone need many more iterations."""
    q = torch.linalg.qr(points(200, 200)).Q
    matrix = q * torch.logspace(0, -10, 200).double() @ q.T
    right, lam = points(200), 1e-8
    exact = torch.linalg.solve(matrix + lam * torch.eye(200).double(), right)

    class Given:
        residuals, rounding, shape = right, 1e-16, (200, 201)

        def squared_norm(self):
            return matrix.trace()

        def times(self, x):
            return x

        def transposed_times(self, y):
            return matrix @ y

    preconditioner = Preconditioner()
    iterations = []
    for _ in range(12):
        system = IterativeSystem(Given(), Ranks(None), 1e-6, preconditioner)
        found = system.damped(lam)(right)
        iterations.append(system.iterations)
    assert (found - matrix @ exact).norm() < 1e-5 * (matrix @ exact).norm()
    assert iterations[0] > 100
    assert iterations[-1] <= 30


def test_a_tolerance_is_a_change_of_the_damping():
    """With residual r of the system, x solves the one with lam x - r in the place of lam x exactly."""
    torch.manual_seed(0)
    model, parameters, residuals = PROBLEMS[2]()
    jacobian, rho = dense_jacobian(residuals, parameters)
    lam = 0.01 * jacobian.square().sum(1).mean()
    opt = fngd.GaussNewton(model, damping=0.01, solver="iterative", tolerance=0.1)
    start = flat(parameters)
    opt.step(residuals)
    d = start - flat(parameters)
    normal, right = jacobian.T @ jacobian, jacobian.T @ rho
    y = torch.linalg.lstsq(jacobian.T, d.unsqueeze(1)).solution.squeeze(1)
    rest = rho - jacobian @ jacobian.T @ y - lam * y
    assert 0 < rest.norm() <= 0.1 * lam * y.norm() * (1 + 1e-6)
    assert (normal @ d + lam * d - right).norm() > 1e-8 * right.norm()


@pytest.mark.parametrize("solver", ["sample", "parameter", "iterative"])
def test_single_precision(solver):
    torch.manual_seed(0)
    model, x, y = mlp(2, 8, 1), points(30, 2), points(30, 1)
    expected = dense_step(lambda: model(x) - y, list(model.parameters()), 0.01)
    single = copy.deepcopy(model).float()
    before = flat(single.parameters())
    opt = fngd.GaussNewton(single, damping=0.01, solver=solver, tolerance=1e-3)
    opt.step(lambda: single(x.float()) - y.float())
    assert float((before - flat(single.parameters()) - expected).norm() / expected.norm()) < 1e-3
