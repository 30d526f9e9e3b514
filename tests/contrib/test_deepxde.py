"""DeepXDE's Model.train by Gauss-Newton steps."""

import numpy as np
import pytest
import torch
from independent import assert_at, dense_step, derivatives, run_section
from torch.func import functional_call

dde = pytest.importorskip("deepxde")

from fngd.contrib.deepxde import GaussNewton  # noqa: E402


@pytest.fixture(autouse=True)
def _double():
    dde.config.set_default_float("float64")
    dde.config.set_random_seed(0)
    yield
    dde.config.set_default_float("float32")


def forcing(x):
    return torch.exp(-x[:, 1:]) * (1 - np.pi**2) * torch.sin(np.pi * x[:, :1])


def solution(x):
    return np.sin(np.pi * x[:, :1]) * np.exp(-x[:, 1:])


def diffusion(c, **data):
    """Unknown diffusivity, conditions of four kinds."""

    def equation(x, y):
        u_t, u_xx = dde.grad.jacobian(y, x, i=0, j=1), dde.grad.hessian(y, x, i=0, j=0)
        return u_t - c * u_xx + forcing(x)

    domain = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 1))
    measured = np.stack([np.linspace(-0.9, 0.9, 5), np.full(5, 0.8)], 1)
    conditions = [
        dde.icbc.PeriodicBC(domain, 0, lambda _, on_boundary: on_boundary),
        dde.icbc.IC(domain, solution, lambda _, on_initial: on_initial),
        dde.icbc.PointSetBC(measured, solution(measured)),
        dde.icbc.OperatorBC(
            domain, lambda x, y, _: dde.grad.jacobian(y, x, i=0, j=1) + y, lambda x, on: on and x[0] > 0
        ),
    ]
    counts = {"num_domain": 20, "num_boundary": 8, "num_initial": 6, "anchors": measured} | data
    net = dde.nn.FNN([2, 6, 6, 1], "tanh", "Glorot uniform")
    return dde.Model(dde.data.TimePDE(domain, equation, conditions, **counts), net)


WEIGHTS = [1, 2, 3, 4, 0.5]


def plain_residuals(model):
    """Return the residuals written out, by {name: parameter}, in DeepXDE's order of losses."""
    x = torch.as_tensor(model.data.train_x)
    periodic, initial, measured, operator, inside = x.split(
        [*model.data.num_bcs, len(x) - sum(model.data.num_bcs)]
    )
    left, right = periodic.chunk(2)

    def residuals(named):
        net = {name: p for name, p in named.items() if name != "c"}
        u, gradient, hessian = derivatives(lambda z: functional_call(model.net, net, (z[None],))[0, 0])
        errors = [
            gradient(inside)[:, 1] - named["c"] * hessian(inside)[:, 0, 0] + forcing(inside)[:, 0],
            u(left) - u(right),
            u(initial) - torch.sin(np.pi * initial[:, 0]),
            u(measured) - torch.sin(np.pi * measured[:, 0]) * torch.exp(-measured[:, 1]),
            gradient(operator)[:, 1] + u(operator),
        ]
        return list(zip(errors, WEIGHTS, strict=True))

    return residuals


def test_the_example_of_the_page(capsys):
    defined = run_section("DeepXDE", capsys)
    model = defined["model"]
    assert model.opt.stats()["given_up_steps"] == 0
    assert {how for name, how in model.opt.coverage().items() if "linears" in name} == {"linear"}
    assert len(defined["history"].loss_train) == 3


def test_a_step_is_the_dense_one_and_the_losses_are_deepxdes():
    c = dde.Variable(2.0, dtype=torch.float64)
    model = diffusion(c)
    model.compile(GaussNewton(model, damping=0.01), loss_weights=WEIGHTS, external_trainable_variables=c)
    parameters = dict(model.net.named_parameters()) | {"c": c}
    loss, expected = dense_step(plain_residuals(model), parameters, 0.01)
    losses = []
    step = model.opt.step
    model.opt.step = lambda closure: losses.append(float(step(closure)))
    history, _ = model.train(iterations=1, verbose=0)
    assert_at(parameters, expected)
    assert losses == [pytest.approx(loss, rel=1e-12)]
    assert history.loss_train[0].sum() == pytest.approx(loss, rel=1e-12)
    after = [w * float(r.detach().square().mean()) for r, w in plain_residuals(model)(parameters)]
    assert list(history.loss_train[1]) == pytest.approx(after, rel=1e-12)


def test_points_drawn_anew_callbacks_and_a_schedule():
    c = dde.Variable(2.0, dtype=torch.float64)
    model = diffusion(c, train_distribution="pseudo")
    optimizer = GaussNewton(model, damping=0.01, lr=0.5)
    model.compile(optimizer, decay=("step", 2, 0.1), external_trainable_variables=[c])
    points = []

    class Notes(dde.callbacks.Callback):
        def on_batch_end(self):
            points.append(self.model.data.train_x.copy())

    model.train(iterations=5, callbacks=[dde.callbacks.PDEPointResampler(period=2), Notes()], verbose=0)
    assert np.array_equal(points[0], points[1])
    assert not np.array_equal(points[1], points[3])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    assert optimizer.stats()["steps"] == 5
    assert float(c.detach()) != 2.0


def test_a_system_of_equations_takes_one_block_each():
    def equation(x, y):
        return [dde.grad.jacobian(y, x, i=0) - y[:, 1:], dde.grad.jacobian(y, x, i=1) + y[:, :1]]

    interval = dde.geometry.TimeDomain(0, 3)
    start = [
        dde.icbc.IC(interval, lambda x: 0 * x, lambda _, on: on, component=0),
        dde.icbc.IC(interval, lambda x: 0 * x + 1, lambda _, on: on, component=1),
    ]
    data = dde.data.PDE(
        interval, equation, start, 30, 2, solution=lambda x: np.hstack([np.sin(x), np.cos(x)])
    )
    model = dde.Model(data, dde.nn.FNN([1, 12, 12, 2], "tanh", "Glorot uniform"))
    model.compile(GaussNewton(model), metrics=["l2 relative error"])
    history, state = model.train(iterations=30, verbose=0)
    assert history.metrics_test[-1][0] < 1e-3
    assert state.loss_train.sum() < 1e-6


@pytest.mark.parametrize(
    "loss", ["MAE", ["MSE", "MSE", "MAE", "MSE", "MSE"], lambda y, p: (y - p).abs().mean()]
)
def test_other_losses_are_refused(loss):
    model = diffusion(1.0)
    model.compile(GaussNewton(model), loss=loss)
    before = [p.clone() for p in model.net.parameters()]
    with pytest.raises(ValueError, match="expected 'MSE', got"):
        model.train(iterations=1, verbose=0)
    assert all(map(torch.equal, before, model.net.parameters()))
    assert "losses_train" not in vars(model.data)


def test_a_regularizer_is_refused():
    model = diffusion(1.0)
    model.net.regularizer = ["l2", 1e-4]
    model.compile(GaussNewton(model))
    with pytest.raises(ValueError, match="regularizer"):
        model.train(iterations=1, verbose=0)


def test_mse_of_torch_and_data_alone():
    data = dde.data.DataSet(*2 * (np.linspace(0, 1, 20)[:, None], np.linspace(0, 1, 20)[:, None] ** 2))
    model = dde.Model(data, dde.nn.FNN([1, 8, 1], "tanh", "Glorot uniform"))
    model.compile(GaussNewton(model), loss=torch.nn.MSELoss())
    history, _ = model.train(iterations=20, verbose=0)
    assert history.loss_train[-1] < 1e-5
