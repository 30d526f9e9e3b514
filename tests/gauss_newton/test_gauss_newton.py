"""Gauss-Newton steps against dense ones, whose Jacobian autograd gives residual by residual."""

import copy
import itertools
import math

import pytest
import torch
from least_squares import N, dense_step, derivative, flat, mlp, points, rows
from residual_problems import PROBLEMS, laplacian, regression, two_blocks, weight_used_outside
from torch.func import functional_call, hessian

import fngd


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_step_is_the_dense_gauss_newton_step(problem):
    model, parameters, residuals = problem()
    expected = dense_step(residuals, parameters, 0.1)
    loss_before = float(rows(residuals).square().sum())
    before = flat(parameters)
    opt = fngd.GaussNewton(model, lr=0.5, damping=0.1, params=parameters)
    loss = opt.step(residuals)
    step = (before - flat(parameters)) / 0.5
    assert float((step - expected).norm() / expected.norm()) < 1e-8
    assert float(loss) == pytest.approx(loss_before, rel=1e-12)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_function_of_one_sample_gives_the_same_step():
    model, parameters, _ = laplacian()
    other = copy.deepcopy(model)
    x = points(N, 2)

    def residual(params, point):
        def u(z):
            return functional_call(model, params, (z,)).squeeze(0)

        return torch.trace(hessian(u)(point)) - point[0]

    def by_autograd():
        z = x.clone().requires_grad_()
        du = derivative(other(z), z)
        return {"r": sum(derivative(du[:, i], z)[:, i] for i in range(2)) - x[:, 0], "data": (other(x), 2.0)}

    expected = dense_step(by_autograd, list(other.parameters()), 0.1)
    before = flat(parameters)
    opt = fngd.GaussNewton(model, damping=0.1)
    opt.step(lambda: {"r": fngd.PerSample(residual, x), "data": (model(x), 2.0)})
    assert float((before - flat(parameters) - expected).norm() / expected.norm()) < 1e-8


def test_momentum_is_spring():
    model, parameters, residuals = two_blocks()
    opt = fngd.GaussNewton(model, lr=0.3, damping=0.05, momentum=0.9)
    phi = torch.zeros_like(flat(parameters))
    for _ in range(3):
        expected = dense_step(residuals, parameters, 0.05, phi, 0.9)
        before = flat(parameters)
        opt.step(residuals)
        phi = (before - flat(parameters)) / 0.3
        assert float((phi - expected).norm() / expected.norm()) < 1e-8


def test_levenberg_marquardt_lowers_the_loss_at_every_step_by_orders_of_magnitude():
    model, _, residuals = laplacian()
    opt = fngd.GaussNewton(model)
    losses = [float(opt.step(residuals)) for _ in range(40)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 1e-8 * losses[0]


def test_a_trial_that_does_not_lower_the_loss_is_undone():
    model, parameters, residuals = regression()
    opt = fngd.GaussNewton(model, lr=1e30, initial_damping=1e-6)
    before = flat(parameters)
    opt.step(residuals)
    assert torch.equal(flat(parameters), before)
    assert opt.stats()["undone_trials"] == 12
    assert opt.stats()["given_up_steps"] == 1
    assert opt.stats()["damping"] == 1e8


def test_line_search_halves_until_the_loss_is_lower():
    model, _, residuals = regression()
    opt = fngd.GaussNewton(model, lr=64.0, damping=1.0, line_search=True)
    losses = [float(opt.step(residuals)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert opt.stats()["steps"] == 5
    assert opt.stats()["undone_trials"] > 0


def test_single_precision_solves_in_double():
    model, parameters, residuals = regression()
    expected = dense_step(residuals, parameters, 1e-3)
    single = copy.deepcopy(model).float()
    x = residuals.__closure__
    cells = {name: cell.cell_contents for name, cell in zip(residuals.__code__.co_freevars, x, strict=True)}
    inputs, targets = cells["x"].float(), cells["y"].float()
    before = flat(single.parameters())
    fngd.GaussNewton(single, damping=1e-3).step(lambda: single(inputs).squeeze(1) - targets)
    step = before - flat(single.parameters())
    assert float((step.double() - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-2)])
def test_a_step_on_a_device(dtype, tolerance):
    reference, x = mlp(2, 32, 32, 1), points(100, 2)

    def step(model, x):
        def residuals():
            z = x.clone().requires_grad_()
            du = derivative(model(z), z)
            return sum(derivative(du[:, i], z)[:, i] for i in range(2)) - x[:, 0]

        before = flat(model.parameters())
        fngd.GaussNewton(model, damping=0.1).step(residuals)
        return (before - flat(model.parameters())).double().cpu()

    on_device = step(copy.deepcopy(reference).to("cuda", dtype), x.to("cuda", dtype))
    expected = step(reference, x)
    assert float((on_device - expected).norm() / expected.norm()) < tolerance


def test_groups_have_learning_rates_and_schedulers_change_them():
    model, parameters, residuals = regression()
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": [*model[2].parameters(), *model[4].parameters()]},
    ]
    opt = fngd.GaussNewton(model, lr=0.5, damping=0.1, params=groups)
    expected = dense_step(residuals, parameters, 0.1)
    before = flat(parameters)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    opt.step(residuals)
    scheduler.step()
    first = sum(p.numel() for p in model[0].parameters())
    step = before - flat(parameters)
    assert not step[:first].any()
    torch.testing.assert_close(step[first:], 0.5 * expected[first:], rtol=1e-8, atol=1e-12)
    assert [group["lr"] for group in opt.param_groups] == [0.0, 0.25]


def test_frozen_parameters_stay():
    model, _, residuals = regression()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = dense_step(residuals, trained, 0.1)
    before = flat(trained)
    fngd.GaussNewton(model, damping=0.1).step(residuals)
    assert float((before - flat(trained) - expected).norm() / expected.norm()) < 1e-8


@pytest.mark.parametrize("options", [{}, {"damping": 0.01, "momentum": 0.9, "lr": 0.3}])
def test_a_resumed_run_is_the_same_bit_for_bit(options, tmp_path):
    model, parameters, residuals = two_blocks()
    opt = fngd.GaussNewton(model, **options)
    for _ in range(3):
        opt.step(residuals)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "state.pt")
    for _ in range(3):
        opt.step(residuals)
    finished = flat(parameters)

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    resumed = fngd.GaussNewton(model, **options)
    resumed.load_state_dict(state["opt"])
    for _ in range(3):
        resumed.step(residuals)
    assert torch.equal(flat(parameters), finished)
    assert resumed.stats() == opt.stats()
    with pytest.raises(ValueError, match="'gauss_newton' is missing"):
        resumed.load_state_dict(torch.optim.SGD(parameters, lr=0.1).state_dict())


def test_coverage_names_how_each_jacobian_is_found():
    model, _, residuals = weight_used_outside()
    opt = fngd.GaussNewton(model)
    opt.step(residuals)
    covered = opt.coverage()
    assert covered["2.weight"] == "linear"
    assert covered["0.weight"].startswith("generic: its parameters are used outside")


def test_a_step_that_is_not_finite_is_left_out():
    model, parameters, residuals = regression()
    opt = fngd.GaussNewton(model)
    before = flat(parameters)
    loss = opt.step(lambda: residuals() * math.nan)
    assert math.isnan(loss)
    assert torch.equal(flat(parameters), before)
    assert opt.stats()["skipped_steps"] == 1


def test_an_exception_in_a_trial_puts_the_parameters_back():
    model, parameters, residuals = regression()
    calls = []

    def fails_in_the_trial():
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return residuals()

    before = flat(parameters)
    with pytest.raises(KeyboardInterrupt):
        fngd.GaussNewton(model).step(fails_in_the_trial)
    assert torch.equal(flat(parameters), before)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"damping": "newton"}, ValueError, "damping: expected 'lm'"),
        ({"damping": 0.0}, ValueError, "damping: expected a finite number > 0"),
        ({"damping": None}, TypeError, "damping: expected a number"),
        ({"lr": -1.0}, ValueError, "lr: expected a finite number > 0"),
        ({"momentum": 1.0}, ValueError, "momentum: expected"),
        ({"line_search": True}, ValueError, "line_search: expected False"),
        ({"initial_damping": "big"}, TypeError, "initial_damping: expected a number"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        fngd.GaussNewton(mlp(2, 1), **options)
