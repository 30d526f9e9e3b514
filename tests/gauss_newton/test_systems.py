"""Every form of a damped Gauss-Newton step is the dense step, and the cheaper one is chosen."""

import pytest
import torch
from least_squares import dense_step, flat
from residual_problems import PROBLEMS

import fngd
from fngd.gauss_newton import jacobian as jacobian_module

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
