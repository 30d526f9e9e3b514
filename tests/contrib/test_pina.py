"""PINA's Trainer by Gauss-Newton steps."""

import pytest
import torch
from independent import assert_at, dense_step, derivatives, run_section
from torch.func import functional_call

pytest.importorskip("pina")

from pina import Condition, LabelTensor, Trainer
from pina.domain import CartesianDomain
from pina.equation import Equation, FixedValue
from pina.model import FeedForward
from pina.operator import laplacian
from pina.optim import TorchScheduler
from pina.problem import InverseProblem, SpatialProblem
from pina.solver import (
    PINN,
    RBAPINN,
    DeepEnsemblePINN,
    GradientPINN,
)
from pina.weighting import NeuralTangentKernelWeighting, ScalarWeighting

from fngd.contrib.pina import GaussNewton


def bump(points):
    return torch.sin(torch.pi * points.extract(["x"])) * torch.sin(torch.pi * points.extract(["y"]))


def equation(input_, output_, params_):
    return laplacian(output_, input_, components=["u"], d=["x", "y"]) - params_["source"] * bump(input_)


def poisson():
    measured = LabelTensor(torch.rand(7, 2), ["x", "y"])
    values = LabelTensor((-bump(measured) / torch.pi**2).as_subclass(torch.Tensor), ["u"])

    class Poisson(SpatialProblem, InverseProblem):
        output_variables = ["u"]  # noqa: RUF012
        spatial_domain = CartesianDomain({"x": [0, 1], "y": [0, 1]})
        unknown_parameter_domain = CartesianDomain({"source": [0, 5]})
        domains = {"edges": spatial_domain.partial(), "inside": spatial_domain}  # noqa: RUF012
        conditions = {  # noqa: RUF012
            "edges": Condition(domain="edges", equation=FixedValue(0.0)),
            "inside": Condition(domain="inside", equation=Equation(equation)),
            "data": Condition(input=measured, target=values),
        }

    problem = Poisson()
    problem.discretise_domain(4, "grid", domains="inside")
    problem.discretise_domain(12, "random", domains="edges")
    return problem


def network():
    return FeedForward(input_dimensions=2, output_dimensions=1, layers=[6, 6])


def train(solver, epochs=1, **options):
    trainer = Trainer(
        solver,
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        **options,
    )
    trainer.train()
    return trainer


WEIGHTS = {"edges": 10.0, "inside": 0.5, "data": 3.0}


def plain_residuals(problem, model):
    def points(name):
        return problem.discretised_domains[name].as_subclass(torch.Tensor).detach()

    edges, inside = points("edges"), points("inside")
    measured = problem.conditions["data"]
    x, y = (getattr(measured, name).as_subclass(torch.Tensor).detach() for name in ("input", "target"))

    def residuals(named):
        net = {name: p for name, p in named.items() if name != "source"}
        u, _, hessian = derivatives(lambda z: functional_call(model, net, (z[None],))[0, 0])
        curvature = hessian(inside).diagonal(dim1=1, dim2=2).sum(1)
        return [
            (u(edges), WEIGHTS["edges"]),
            (curvature - named["source"] * torch.sin(torch.pi * inside).prod(1), WEIGHTS["inside"]),
            (u(x) - y[:, 0], WEIGHTS["data"]),
        ]

    return residuals


def test_the_example_of_the_page(capsys):
    optimizer = run_section("PINA", capsys)["solver"].optimizer.instance
    assert optimizer.stats()["given_up_steps"] == 0
    how = set(optimizer.coverage().values())
    assert how == {"linear", "generic: it is outside of the model"}


def test_a_step_is_the_dense_one_and_the_losses_are_pinas():
    problem, model = poisson(), network()
    solver = PINN(
        problem,
        model,
        optimizer=GaussNewton(model, damping=0.01),
        weighting=ScalarWeighting(WEIGHTS),
    )
    parameters = dict(model.named_parameters()) | {"source": problem.unknown_parameters["source"]}
    residuals = plain_residuals(problem, model)
    before = {
        name: r.detach().square().mean() for name, (r, _) in zip(WEIGHTS, residuals(parameters), strict=True)
    }
    loss, expected = dense_step(residuals, parameters, 0.01)
    trainer = train(solver)
    assert_at(parameters, expected)
    logged = trainer.callback_metrics
    assert float(logged["train_loss"]) == pytest.approx(loss, rel=1e-6)  # logged in float32
    for name, value in before.items():
        assert float(logged[f"{name}_loss"]) == pytest.approx(float(value), rel=1e-6)


def test_what_is_logged_is_the_loss_before_the_step_also_with_trial_steps():
    problem, model = poisson(), network()
    solver = PINN(problem, model, optimizer=GaussNewton(model))
    losses = []
    for _ in range(3):
        parameters = dict(model.named_parameters()) | {"source": problem.unknown_parameters["source"]}
        with_weights = plain_residuals(problem, model)(parameters)
        losses.append(sum(float(r.detach().square().mean()) for r, _ in with_weights))
        logged = train(solver).callback_metrics["train_loss"]
        assert float(logged) == pytest.approx(losses[-1], rel=1e-6)
    assert losses[2] < losses[1] < losses[0]


def test_minibatches_and_a_schedule():
    problem, model = poisson(), network()
    schedule = TorchScheduler(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    optimizer = GaussNewton(model, damping=0.1, lr=0.4, momentum=0.9)
    solver = PINN(problem, model, optimizer=optimizer, scheduler=schedule)
    train(solver, epochs=2, batch_size=6)
    assert optimizer.instance.param_groups[0]["lr"] == pytest.approx(0.1)
    assert optimizer.instance.stats()["steps"] > 2


@pytest.mark.parametrize("kind", [GradientPINN, RBAPINN])
def test_other_solvers_of_one_model(kind):
    problem, model = poisson(), network()
    solver = kind(problem, model, optimizer=GaussNewton(model))
    trainer = train(solver)
    first = float(trainer.callback_metrics["train_loss"])
    trainer = train(solver, 5)
    assert float(trainer.callback_metrics["train_loss"]) < first or kind is RBAPINN  # its weights grow
    assert solver.optimizer.instance.stats()["given_up_steps"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"loss": torch.nn.L1Loss()},
        {"loss": torch.nn.SmoothL1Loss()},
        {"weighting": NeuralTangentKernelWeighting(alpha=0.5)},
    ],
    ids=["L1", "smooth", "NTK"],
)
def test_other_losses_are_refused(options):
    problem, model = poisson(), network()
    with pytest.raises(ValueError, match="loss: expected"):
        train(PINN(problem, model, optimizer=GaussNewton(model), **options))


def test_a_solver_that_steps_by_itself_is_refused():
    problem, models = poisson(), [network(), network()]
    solver = DeepEnsemblePINN(problem, models, optimizers=[GaussNewton(model) for model in models])
    with pytest.raises(ValueError, match="without a closure"):
        train(solver)


def test_gradients_of_several_batches_are_refused():
    problem, model = poisson(), network()
    solver = PINN(problem, model, optimizer=GaussNewton(model))
    with pytest.raises(ValueError, match="gradients of several batches"):
        train(solver, batch_size=6, accumulate_grad_batches=2)
