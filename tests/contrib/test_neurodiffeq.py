"""neurodiffeq's solvers by Gauss-Newton steps."""

import pytest
import torch
from independent import assert_at, dense_step, derivatives, run_section
from torch import nn
from torch.func import functional_call

pytest.importorskip("neurodiffeq")

from neurodiffeq import diff
from neurodiffeq.conditions import IVP, BundleIVP, DirichletBVP2D
from neurodiffeq.generators import PredefinedGenerator
from neurodiffeq.networks import FCNN
from neurodiffeq.solvers import BundleSolver1D, Solver1D, Solver2D

from fngd.contrib.neurodiffeq import GaussNewton


def laplace(c, **options):
    """c times the Laplacian minus what makes x + x y (1 - y) its solution for c = 2."""
    points = torch.rand(15), torch.rand(15)
    generator = PredefinedGenerator(*points)
    edges = DirichletBVP2D(
        x_min=0.0,
        x_min_val=lambda y: 0 * y,
        x_max=1.0,
        x_max_val=lambda y: 1 + y * (1 - y),
        y_min=0.0,
        y_min_val=lambda x: x,
        y_max=1.0,
        y_max_val=lambda x: x,
    )
    net = FCNN(2, 1, hidden_units=(6, 6))
    solver = Solver2D(
        lambda u, x, y: [c * (diff(u, x, order=2) + diff(u, y, order=2)) + 4 * x],
        [edges],
        nets=[net],
        train_generator=generator,
        valid_generator=generator,
        **options,
    )
    return solver, net, torch.stack(points, 1)


def plain_residuals(net, points):
    def residuals(named):
        weights = {name: p for name, p in named.items() if name != "c"}

        def u(z):
            x, y = z
            network = functional_call(net, weights, (z[None],))[0, 0]
            edges = x * (1 + y * (1 - y))
            return edges + x * (1 - x) * y * (1 - y) * network

        _, _, hessian = derivatives(u)
        return [(named["c"] * hessian(points).diagonal(dim1=1, dim2=2).sum(1) + 4 * points[:, 0], 1.0)]

    return residuals


def test_the_example_of_the_page(capsys):
    solver = run_section("neurodiffeq", capsys)["solver"]
    assert solver.optimizer.stats()["given_up_steps"] == 0
    assert set(solver.optimizer.coverage().values()) == {"linear"}


@pytest.mark.parametrize("loss_fn", [None, "l2", nn.MSELoss()], ids=str)
def test_a_step_is_the_dense_one_and_the_losses_are_neurodiffeqs(loss_fn):
    c = nn.Parameter(torch.tensor(1.0))
    solver, net, points = laplace(c, loss_fn=loss_fn)
    solver.optimizer = GaussNewton(solver, damping=0.01, params=[*net.parameters(), c])
    parameters = dict(net.named_parameters()) | {"c": c}
    residuals = plain_residuals(net, points)
    loss, expected = dense_step(residuals, parameters, 0.01)
    solver.fit(1, tqdm_file=None)
    assert_at(parameters, expected)
    history = solver.metrics_history
    assert history["train_loss"] == [pytest.approx(loss, rel=1e-12)]
    ((after, _),) = residuals(parameters)
    assert history["valid_loss"] == [pytest.approx(float(after.detach().square().mean()), rel=1e-12)]


def test_what_is_logged_is_from_before_the_step_also_with_trial_steps():
    c = torch.tensor(1.0)
    solver, net, points = laplace(c, metrics={"mean": lambda u, x, y: u.mean()})
    solver.optimizer = GaussNewton(solver, initial_damping=1e-9)
    x, y = (p[:, None] for p in points.T)
    for epoch in range(5):
        u = solver.conditions[0].enforce(net, x, y)
        ((r, _),) = plain_residuals(net, points)(dict(net.named_parameters()) | {"c": c})
        solver.fit(1, tqdm_file=None)
        history = solver.metrics_history
        assert history["train__mean"][epoch] == pytest.approx(float(u.detach().mean()), rel=1e-12)
        assert history["train_loss"][epoch] == pytest.approx(float(r.detach().square().mean()), rel=1e-10)
    assert solver.optimizer.stats()["undone_trials"] > 0


def test_an_unknown_coefficient():
    """u'' = -c u with measurements as an equation: no more than parameters in the equations."""
    c = nn.Parameter(torch.tensor(0.5))
    net = FCNN(1, 1, hidden_units=(12,))
    solver = Solver1D(
        lambda u, t: [diff(u, t, order=2) + c * u, 10 * (u - torch.sin(2 * t))],
        [IVP(t_0=0.0, u_0=0.0, u_0_prime=2.0)],
        t_min=0.0,
        t_max=2.0,
        nets=[net],
    )
    solver.optimizer = GaussNewton(solver, params=[*net.parameters(), c])
    solver.fit(40, tqdm_file=None)
    assert abs(float(c.detach()) - 4) < 0.02


def test_a_bundle_and_a_net_for_two_functions():
    bundle = BundleSolver1D(
        lambda u, t, rate: [diff(u, t) + rate * u],
        [BundleIVP(t_0=0.0, u_0=1.0)],
        t_min=0.0,
        t_max=1.0,
        theta_min=(0.5,),
        theta_max=(1.5,),
        eq_param_index=(0,),
        nets=[FCNN(2, 1, hidden_units=(8, 8))],
    )
    bundle.optimizer = GaussNewton(bundle)
    bundle.fit(25, tqdm_file=None)
    t, rate = torch.rand(50, 1), 0.5 + torch.rand(50, 1)
    u = bundle.get_solution()(t, rate)
    assert float((u - torch.exp(-rate * t)).abs().max()) < 1e-2

    net = FCNN(1, 1, hidden_units=(12,))
    circle = Solver1D(
        lambda u, v, t: [diff(u, t) - v, diff(v, t) + u],
        [IVP(0.0, 0.0), IVP(0.0, 1.0)],
        t_min=0.0,
        t_max=1.0,
        nets=[net, FCNN(1, 1, hidden_units=(12,))],
        n_batches_train=2,
    )
    circle.optimizer = GaussNewton(circle)
    circle.fit(20, tqdm_file=None)
    t = torch.linspace(0, 1, 20)
    u, v = circle.get_solution()(t)
    assert float((u - t.sin()).abs().max()) < 1e-3
    assert float((v - t.cos()).abs().max()) < 1e-3
    assert circle.optimizer.stats()["steps"] > 20  # one for each batch


def test_weights_of_points():
    """A loss that weighs squares by place, beside its weighted residuals."""
    solver, net, points = laplace(torch.tensor(2.0), loss_fn=lambda r, f, x: (x[0] * r**2).sum())
    solver.optimizer = GaussNewton(solver, damping=0.01)
    parameters = dict(net.named_parameters())

    def residuals(named):
        ((r, _),) = plain_residuals(net, points)(named | {"c": torch.tensor(2.0)})
        return [(points[:, 0].sqrt() * r, float(len(r)))]

    _, expected = dense_step(residuals, parameters, 0.01)
    solver.fit(1, tqdm_file=None)
    assert_at(parameters, expected)


@pytest.mark.parametrize(
    "loss_fn", ["l1", "infinity", "h1", nn.SmoothL1Loss(), lambda r, f, x: (r**4).mean()]
)
def test_other_losses_are_refused(loss_fn):
    solver, net, _ = laplace(2.0, loss_fn=loss_fn)
    solver.optimizer = GaussNewton(solver)
    before = [p.clone() for p in net.parameters()]
    given = solver.loss_fn
    with pytest.raises(ValueError, match="expected None, 'l2' or MSELoss"):
        solver.fit(1, tqdm_file=None)
    assert all(map(torch.equal, before, net.parameters()))
    assert solver.loss_fn is given


def test_an_additional_loss_is_refused():
    solver, net, _ = laplace(2.0)
    solver.additional_loss = lambda residuals, funcs, coords: 1e-9 * net.NN[0].weight.square().sum()
    solver.optimizer = GaussNewton(solver)
    with pytest.raises(ValueError, match="a part of it is no mean square"):
        solver.fit(1, tqdm_file=None)
    solver.additional_loss = lambda residuals, funcs, coords: funcs[0].abs().mean()
    with pytest.raises(ValueError, match="loss: "):
        solver.fit(1, tqdm_file=None)
