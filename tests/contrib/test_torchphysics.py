"""torchphysics' Solver by Gauss-Newton steps."""

import pytest
import torch
from independent import assert_at, dense_step, derivatives, run_section

tp = pytest.importorskip("torchphysics")
lightning = pytest.importorskip("pytorch_lightning")

from fngd.contrib.torchphysics import GaussNewton  # noqa: E402

X, U, K = (tp.spaces.R2("x"), tp.spaces.R1("u"), tp.spaces.R1("k"))


def forcing(x):
    return 2 * torch.pi**2 * torch.sin(torch.pi * x).prod(-1, keepdim=True)


class Poisson:
    """Unknown conductivity 2; conditions of five kinds."""

    def __init__(self, static=True, relative=False, batch=5):
        square = tp.domains.Parallelogram(X, [0, 0], [1, 0], [0, 1])
        self.model = tp.models.FCN(X, U, hidden=(6, 6))
        self.k = tp.models.Parameter(init=1.0, space=K)
        self.inside = tp.samplers.RandomUniformSampler(square, n_points=12)
        if static:
            self.inside = self.inside.make_static()
        self.edges = tp.samplers.GridSampler(square.boundary, n_points=8).make_static()
        self.x = torch.rand(10, 2)
        self.u = forcing(self.x) / (4 * torch.pi**2)
        points = tp.spaces.Points(self.x, X), tp.spaces.Points(self.u, U)
        self.relative = relative
        self.conditions = [
            tp.conditions.PINNCondition(
                self.model,
                self.inside,
                lambda u, x, k: k * tp.utils.laplacian(u, x) + forcing(x),
                parameter=self.k,
                name="inside",
            ),
            tp.conditions.PINNCondition(self.model, self.edges, lambda u: u, weight=10.0, name="edges"),
            tp.conditions.DataCondition(
                self.model,
                tp.utils.PointsDataLoader(points, batch_size=batch),
                relative=relative,
                use_full_dataset=batch == 5,
                weight=3.0,
                name="data",
            ),
            tp.conditions.ParameterCondition(
                self.k, lambda k: torch.sum((k - 1.5) ** 2), weight=0.1, name="prior"
            ),
        ]

    def parameters(self):
        return dict(self.model.named_parameters()) | {"k": self.k.as_tensor}

    def plain_residuals(self, named):
        net = {name: p for name, p in named.items() if name != "k"}
        linear = [net[f"sequential.{i}.{kind}"] for i in (0, 2, 4) for kind in ("weight", "bias")]

        def u(z):
            w0, b0, w1, b1, w2, b2 = linear
            return (w2 @ torch.tanh(w1 @ torch.tanh(w0 @ z + b0) + b1) + b2)[0]

        value, _, hessian = derivatives(u)
        inside, edges = self.inside.sample_points().as_tensor, self.edges.sample_points().as_tensor
        curvature = hessian(inside.detach()).diagonal(dim1=1, dim2=2).sum(1)
        data = value(self.x) - self.u[:, 0]
        if self.relative:
            data = data / (self.u[:, 0].square() + 1e-8).sqrt()
        return [
            (named["k"][0] * curvature + forcing(inside.detach())[:, 0], 1.0),
            (value(edges.detach()), 10.0),
            (data, 3.0),
            (named["k"] - 1.5, 0.1),
        ]


def train(conditions, steps=1, setting=None, **settings):
    solver = tp.solver.Solver(conditions, optimizer_setting=setting or GaussNewton(conditions, **settings))
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(solver)
    return trainer


def test_the_example_of_the_page(capsys):
    (optimizer,) = run_section("torchphysics", capsys)["trainer"].optimizers
    assert optimizer.stats()["given_up_steps"] == 0
    how = {name: how for name, how in optimizer.coverage().items() if "sequential" in name}
    assert set(how.values()) == {"linear"}


@pytest.mark.parametrize("relative", [False, True])
def test_a_step_is_the_dense_one_and_the_losses_are_torchphysics(relative):
    problem = Poisson(relative=relative)
    parameters = problem.parameters()
    loss, expected = dense_step(problem.plain_residuals, parameters, 0.01)
    before = [float(r.detach().square().mean()) for r, _ in problem.plain_residuals(parameters)]
    trainer = train(problem.conditions, damping=0.01)
    assert_at(parameters, expected, rtol=1e-6)  # k and its derivatives are of float32
    logged = trainer.callback_metrics
    assert float(logged["train/loss"]) == pytest.approx(loss, rel=1e-6)
    for name, value in zip(("inside", "edges", "data", "prior"), before, strict=True):
        assert float(logged[f"train/{name}"]) == pytest.approx(value, rel=1e-6)


def test_points_and_batches_are_drawn_once_in_a_step():
    problem = Poisson(static=False, batch=4)
    drawn = []
    sample, forward = problem.inside.sample_points, problem.model.forward
    sampled = []
    problem.inside.sample_points = lambda **kwargs: sampled.append(1) or sample(**kwargs)
    problem.model.forward = lambda points: drawn.append(points.as_tensor.detach()) or forward(points)
    trainer = train(problem.conditions, steps=6)
    (optimizer,) = trainer.optimizers
    assert len(sampled) == 6
    evaluations = len(drawn) // 3
    assert evaluations > 6
    insides = {tuple(x.flatten().tolist()) for x in drawn[0::3]}
    batches = [tuple(x.flatten().tolist()) for x in drawn[2::3]]
    assert len(insides) == 6
    changes = [a for a, b in zip([None, *batches], batches, strict=False) if a != b]
    assert len(changes) == 6  # 4, 4 and 2 rows, twice
    assert optimizer.stats()["steps"] > 0
    assert "forward" not in vars(problem.conditions[3])


def test_periodic_conditions_and_a_scheduler():
    line = tp.domains.Interval(tp.spaces.R1("t"), 0, 1)
    x, t = tp.spaces.R1("x"), tp.spaces.R1("t")
    model = tp.models.FCN(x * t, U, hidden=(6,))
    others = tp.samplers.GridSampler(line, n_points=6)
    conditions = [
        tp.conditions.PeriodicCondition(
            model,
            tp.domains.Interval(x, 0, 1),
            lambda u_left, u_right: u_left - u_right,
            others,
        ),
        tp.conditions.PINNCondition(
            model,
            tp.samplers.GridSampler(tp.domains.Interval(x, 0, 1), n_points=5) * others,
            lambda u, x: u - x,
        ),
    ]
    setting = GaussNewton(
        conditions,
        lr=0.8,
        scheduler_class=torch.optim.lr_scheduler.StepLR,
        scheduler_args={"step_size": 1, "gamma": 0.5},
        damping=0.01,
    )
    (optimizer,) = train(conditions, 3, setting).optimizers
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert optimizer.stats()["steps"] == 3


def test_other_norms_are_refused():
    problem = Poisson()
    energy = tp.conditions.DeepRitzCondition(problem.model, problem.inside, lambda u: u**2)
    absolute = tp.conditions.SingleModuleCondition(
        problem.model, problem.inside, lambda u: u, error_fn=torch.nn.L1Loss()
    )
    root = problem.conditions[2]
    root.root = 2.0
    for condition in (energy, absolute, root):
        with pytest.raises(ValueError, match="GaussNewton minimises mean squares"):
            train([problem.conditions[0], condition])


def test_learned_weights_and_roots_of_means_are_refused():
    problem = Poisson()
    learned = tp.conditions.AdaptiveWeightsCondition(problem.model, problem.inside, lambda u: u)
    with pytest.raises(ValueError, match="no mean square of residuals"):
        train([learned])
    root = tp.conditions.SingleModuleCondition(
        problem.model,
        problem.inside,
        lambda u: u + 1,
        error_fn=tp.conditions.condition.SquaredError(),
        reduce_fn=lambda x: torch.mean(x).sqrt(),
    )
    with pytest.raises(ValueError, match="expected a sum of weighted squares"):
        train([root])


def test_a_negative_penalty_is_refused():
    problem = Poisson()
    penalty = tp.conditions.ParameterCondition(problem.k, lambda k: -torch.sum(k), weight=1.0)
    with pytest.raises(ValueError, match="penalty >= 0"):
        train([problem.conditions[0], penalty])
