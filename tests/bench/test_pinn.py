"""The least-squares problems, the methods that train on them, and the command that compares them."""

import io
import json
import math
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bench.peers import PEERS, PINN_NAMES, Peer, Pinn, lbfgs, pinn_of, ssbroyden
from bench.pinn import __main__ as comparison
from bench.pinn import demo, figures, gauss_newton, problems, published, scale, study
from bench.pinn import run as training
from bench.pinn import table as tables
from bench.pinn.problems import Equation, base, cavity
from bench.pinn.problems.spectral import evolve
from bench.pinn.run import Record, Run
from bench.pinn.study import Final
from bench.pinn.task import Task

EQUATIONS = [
    name for name in problems.NAMES if name != "california" and isinstance(problems.load(name), Equation)
]


# Residuals of computed solutions: their derivatives are less accurate than they are.
SPECTRAL = {"allen-cahn": 1e-6, "kdv": 1e-5, "kuramoto-sivashinsky": 1e-4, "cavity": 1e-9}
# The reference does not know the pressure.
PRESSURE = ("momentum along x", "momentum along y")


class Exact(nn.Module):
    """The exact solution in the place of a network; a pressure of 0 where there is one."""

    def __init__(self, problem):
        super().__init__()
        self.problem, self.coefficient = problem, problem.coefficient

    def forward(self, x):
        values = self.problem.solution(x)
        if values.ndim == 1:
            return values.unsqueeze(-1)
        return torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)


@pytest.mark.parametrize("name", EQUATIONS)
def test_exact_solution_leaves_no_residual_and_no_error(name):
    problem = problems.load(name)
    exact = Exact(problem)
    blocks = problem.residuals(exact, problem.points(3))
    network_blocks = problem.residuals(problem.network(), problem.points(3))
    for block, (residuals, weight) in blocks.items():
        assert residuals.ndim == 1
        assert weight > 0
        if block not in PRESSURE:
            # rounding, relative to what a network leaves
            bound = SPECTRAL.get(name, 1e-12) * max(1, network_blocks[block][0].abs().max())
            assert residuals.abs().max() < bound, block
    assert base.relative_error(exact, problem.validation) == 0
    assert base.relative_error(exact, problem.test) == 0


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_wrong_solution_leaves_a_residual_in_every_block(name):
    problem = problems.load(name)

    class Wrong(Exact):
        def forward(self, x):
            return super().forward(x) + 0.1 * torch.exp(x.sum(dim=1, keepdim=True))

    for residuals, _ in problem.residuals(Wrong(problem), problem.points(0)).values():
        assert residuals.abs().min() > 1e-3 or residuals.square().mean() > 1e-3


@pytest.mark.parametrize("name", [*SPECTRAL, "wave", "convection"])
def test_initial_and_wall_values(name):
    """From the formulas, where computed solutions do not use the reference."""
    problem = problems.load(name)
    along = torch.linspace(0, 1, 41, dtype=torch.float64)[1:-1]
    x = problem.low[0] + along * (problem.high[0] - problem.low[0])

    def at(*columns):
        return problem.solution(torch.stack([torch.zeros_like(x) + column for column in columns], dim=1))

    def near(values, expected):
        assert (values - expected).abs().max() < 1e-6

    if name == "cavity":
        near(at(x, 1), torch.tensor([1.0, 0.0]))
        near(
            problem.solution(torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)),
            torch.tensor([1, 0]),
        )
        for wall in (at(x, 0), at(0, x), at(1, x)):
            near(wall, 0)
        return
    start = {
        "allen-cahn": x**2 * torch.cos(math.pi * x),
        "kdv": torch.cos(math.pi * x),
        "kuramoto-sivashinsky": torch.cos(x) * (1 + torch.sin(x)),
        "wave": torch.sin(math.pi * x) + torch.sin(4 * math.pi * x) / 2,
        "convection": torch.sin(x),
    }
    near(at(x, 0), start[name])
    times = problem.high[1] * along
    walls = (problem.low[0], problem.high[0])
    low, high = (problem.solution(torch.stack([torch.full_like(x, z), times], dim=1)) for z in walls)
    near(low, high)


def test_evolution_agrees_with_the_cole_hopf_transform():
    problem = problems.load("burgers")
    series = evolve(
        lambda x: -np.sin(math.pi * x),
        lambda k: -problem.viscosity * k**2,
        lambda u: (np.zeros_like(u), -u * u / 2),
        start=-1.0,
        period=2.0,
        end=1.0,
        points=256,
        step=5e-3,
        nodes=48,
    )
    assert (series(problem.test.x) - problem.test.u).abs().max() < 1e-7


def test_evolution_agrees_with_a_soliton():
    """3 c sech^2(sqrt(c / d) (x - c t) / 2) of u_t + u u_x + d u_xxx = 0, in a period that is long for it."""
    speed, dispersion = 0.8, 0.0025

    def soliton(x, t):
        return 3 * speed / np.cosh(math.sqrt(speed / dispersion) * (x - speed * t) / 2) ** 2

    series = evolve(
        lambda x: soliton(x, 0.0),
        lambda k: 1j * dispersion * k**3,
        lambda u: (np.zeros_like(u), -u * u / 2),
        start=-2.0,
        period=5.0,
        end=0.5,
        points=512,
        step=5e-4,
        nodes=96,
    )
    x = torch.rand(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.tensor([4.0, 0.5]) - torch.tensor([1.5, 0.0])
    exact = torch.from_numpy(soliton(x[:, 0].numpy(), x[:, 1].numpy()))
    assert (series(x) - exact).abs().max() < 1e-7


@pytest.mark.parametrize(
    ("name", "finer", "bound"),
    [
        ("allen-cahn", {"points": 4096, "step": 1.25e-3, "nodes": 60}, 1e-8),
        ("kdv", {"points": 320, "step": 2.5e-4, "nodes": 240}, 1e-8),
        ("kuramoto-sivashinsky", {"points": 640, "step": 5e-5, "nodes": 100}, 1e-8),
    ],
)
def test_finer_references_are_the_same(name, finer, bound):
    problem = problems.load(name)
    x, u = problem.test.x[:500], problem.test.u[:500]
    offset = 1 if name == "allen-cahn" else 0
    change = problem.reference(**finer)(x) - offset - u
    assert change.norm() / u.norm() < bound
    assert change.abs().max() < 10 * bound


def test_cavity_agrees_with_the_literature():
    flow = cavity.solve(100.0)
    half = torch.full((4001,), 0.5, dtype=torch.float64)
    along = torch.linspace(0, 1, 4001, dtype=torch.float64)
    u = flow(torch.stack([half, along], dim=1))[:, 0]
    v = flow(torch.stack([along, half], dim=1))[:, 1]
    # Botella and Peyret 1998, Re 100: extreme velocities on the centre lines, and where
    for value, index, extreme, place in (
        (u.min(), u.argmin(), -0.2140424, 0.4581),
        (v.max(), v.argmax(), 0.1795728, 0.2370),
        (v.min(), v.argmin(), -0.2538030, 0.8104),
    ):
        assert value.item() == pytest.approx(extreme, abs=1e-6)
        assert along[index].item() == pytest.approx(place, abs=3e-4)
    # Ghia, Ghia and Shin 1982, Re 100, second order on 129 x 129 points
    ghia_u = {0.1719: -0.10150, 0.2813: -0.15662, 0.5: -0.20581, 0.7344: 0.00332, 0.9531: 0.68717}
    ghia_v = {0.0938: 0.12317, 0.2344: 0.17527, 0.5: 0.05454, 0.8047: -0.24533, 0.9453: -0.10313}
    for values, expected in ((u, ghia_u), (v, ghia_v)):
        found = np.interp(list(expected), along, values)
        assert np.abs(found - list(expected.values())).max() < 1e-2


def test_cavity_changes_little_with_its_degree_and_conserves_vorticity():
    problem = problems.load("cavity")
    x, u = problem.test.x[:1000], problem.test.u[:1000]
    change = cavity.solve(100.0, 26)(x) - u
    assert change.norm() / u.norm() < 1e-4
    # Without the pressure the forces are a gradient: their curl vanishes, away from the lid's corners.
    seen = []

    def recording(y):
        seen.append(y)
        return Exact(problem)(y)

    inner = 0.05 + 0.9 * torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = problem.residuals(recording, problem.points(0) | {"interior": inner})
    force_x, force_y = (blocks[name][0] for name in PRESSURE)
    across, along = base.gradient(force_x, seen[0])[:, 1], base.gradient(force_y, seen[0])[:, 0]
    assert (along - across).norm() < 1e-2 * across.norm()


def test_networks_are_periodic_and_anchored():
    for name in ("kdv", "kuramoto-sivashinsky", "convection"):
        problem = problems.load(name)
        x = problem.draw(20, 0)
        shifted = x + torch.tensor([problem.high[0] - problem.low[0], 0.0])
        network = problem.network()
        assert torch.allclose(network(x), network(shifted), atol=1e-12)
        assert (network(x) - network(x + 0.1)).abs().max() > 1e-3
    problem = problems.load("allen-cahn")
    network = problem.network()
    for axis, value in ((1, 0.0), (0, -1.0), (0, 1.0)):
        x = problem.draw(20, 0)
        x[:, axis] = value
        assert torch.allclose(network(x).squeeze(-1), x[:, 0] ** 2 * torch.cos(math.pi * x[:, 0]))


def test_errors_of_systems_are_of_what_is_known():
    pairs = base.Pairs(torch.zeros(2, 2), torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    assert base.relative_error(
        lambda x: torch.tensor([[3.0, 0.0, 9.0], [0.0, 1.0, 9.0]]), pairs
    ) == pytest.approx(0.6)


def test_fields_of_a_system_are_drawn(tmp_path):
    problem = problems.load("cavity")
    figures.save_fields(tmp_path / "fields.png", "cavity", problem, {"adam": problem.network()})
    assert (tmp_path / "fields.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_coefficient_shows_in_the_equation_alone():
    problem = problems.load("inverse-diffusion")
    exact = Exact(problem)
    exact.coefficient = 2 * problem.coefficient
    sizes = {
        name: r.abs().max().item() for name, (r, _) in problem.residuals(exact, problem.points(0)).items()
    }
    assert sizes.pop("interior") > 0.1
    assert max(sizes.values()) < 1e-12


def test_burgers_solution_agrees_with_finite_differences():
    """Central differences in space, Euler steps in time, from the initial values on."""
    problem = problems.load("burgers")
    n, steps, end = 400, 8000, 0.5
    x = torch.linspace(-1, 1, n + 1, dtype=torch.float64)
    u, h, dt = -torch.sin(math.pi * x), 2 / n, end / steps
    for _ in range(steps):
        flux = (u[2:] ** 2 - u[:-2] ** 2) / (4 * h)
        second = (u[2:] - 2 * u[1:-1] + u[:-2]) / h**2
        u = torch.cat([u[:1], u[1:-1] + dt * (problem.viscosity * second - flux), u[-1:]])
    exact = problem.solution(torch.stack([x, torch.full_like(x, end)], dim=1))
    assert (u - exact).abs().max() < 2e-3
    assert exact.abs().max() > 0.5


@pytest.mark.parametrize("name", EQUATIONS)
def test_points_lie_in_the_box_and_follow_the_seed(name):
    problem = problems.load(name)
    points, other, again = problem.points(1), problem.points(2), problem.points(1)
    low, high = torch.tensor(problem.low), torch.tensor(problem.high)
    for block, x in points.items():
        if x.ndim == 2:
            assert ((x >= low) & (x <= high)).all()
            assert not torch.equal(x, other[block])
        assert torch.equal(x, again[block])
    if "initial" in points:
        assert (points["initial"][:, 1] == 0).all()


@pytest.mark.parametrize(
    ("name", "block", "axes"),
    [
        ("poisson-2d", "boundary", 2),
        ("poisson-5d", "boundary", 5),
        ("poisson-10d", "boundary", 10),
        ("helmholtz", "boundary", 2),
        ("heat", "walls", 1),
        ("burgers", "walls", 1),
        ("inverse-diffusion", "walls", 1),
        ("wave", "walls", 1),
        ("cavity", "walls", 2),
    ],
)
def test_boundary_points_spread_over_every_wall(name, block, axes):
    problem = problems.load(name)
    x = problem.points(1)[block]
    low, high = torch.tensor(problem.low), torch.tensor(problem.high)
    for axis in range(axes):
        for wall in (low[axis], high[axis]):
            rows = x[x[:, axis] == wall]
            assert len(rows) >= len(x) // (2 * axes)
            along = torch.arange(len(low)) != axis
            relative = ((rows - low) / (high - low))[:, along]
            assert relative.min(dim=0).values.max() < 0.25
            assert relative.max(dim=0).values.min() > 0.75
            assert (relative.mean(dim=0) - 0.5).abs().max() < 0.1


def test_tables_are_split_and_standardised():
    problem = problems.load("diabetes")
    points = problem.points(0)
    assert points["x"].shape == (265, 10)
    assert (len(problem.validation.u), len(problem.test.u)) == (88, 89)
    assert torch.allclose(points["x"].mean(dim=0), torch.zeros(10, dtype=torch.float64), atol=1e-12)
    assert points["y"].std(correction=0).item() == pytest.approx(1)
    rows = torch.cat([points["x"], problem.validation.x, problem.test.x])
    assert len(rows.unique(dim=0)) == 442


def archive_of(folder, table, member="CaliforniaHousing/cal_housing.data"):
    text = io.StringIO()
    np.savetxt(text, table, delimiter=",")
    content = text.getvalue().encode()
    with tarfile.open(folder / "cal_housing.tgz", "w:gz") as tar:
        entry = tarfile.TarInfo(member)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))


def test_california_is_read_from_its_archive(tmp_path):
    table = np.random.default_rng(0).uniform(1, 2, (50, 9))
    archive_of(tmp_path, table)
    problem = problems.load("california", data_dir=tmp_path)
    assert problem.points(0)["x"].shape == (30, 8)
    parts = [problem.points(0)["y"], problem.validation.u, problem.test.u]
    prices = torch.cat(parts).sort().values.numpy()
    expected = np.sort(table[:, -1])
    # the same values up to the affine standardisation
    assert np.corrcoef(prices, expected)[0, 1] == pytest.approx(1)


def test_bad_california_archives_are_named(tmp_path):
    with pytest.raises(ValueError, match="data_dir: california needs the folder"):
        problems.load("california")
    with pytest.raises(ValueError, match=r"data_dir: expected cal_housing.tgz in"):
        problems.load("california", data_dir=tmp_path)
    archive_of(tmp_path, np.ones((3, 8)))
    with pytest.raises(ValueError, match="expected 9 columns, got 8"):
        problems.load("california", data_dir=tmp_path)
    archive_of(tmp_path, np.ones((3, 9)), member="other")
    with pytest.raises(ValueError, match=r"expected the table CaliforniaHousing/cal_housing\.data"):
        problems.load("california", data_dir=tmp_path)
    (tmp_path / "cal_housing.tgz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not a complete"):
        problems.load("california", data_dir=tmp_path)
    with pytest.raises(ValueError, match="problem: expected one of fit-1d"):
        problems.load("navier-stokes")


def test_every_method_tries_equally_many_settings():
    assert {len(pinn_of(name).settings) for name in PINN_NAMES} == {4}


@pytest.mark.parametrize("problem", ["poisson-2d", "inverse-diffusion", "diabetes", "kdv", "cavity"])
@pytest.mark.parametrize("name", PINN_NAMES)
def test_every_method_lowers_the_loss(name, problem):
    loaded = problems.load(problem)
    method = pinn_of(name)
    obstacle = study.obstacle(name, loaded)
    if obstacle is not None:
        pytest.skip(obstacle)
    task = Task.of(loaded, 0)
    step = method.build(task, **method.settings[1])
    before = base.mean_squares(task.residuals()).item()
    done = sum(step(share) for share in (0.0, 0.3, 0.6))
    assert done >= 3
    assert base.mean_squares(task.residuals()).item() < before


@pytest.mark.parametrize("name", ["adam", "muon", "soap"])
def test_first_order_methods_end_with_a_small_rate(name):
    task = Task.of(problems.load("fit-1d"), 0)
    step = pinn_of(name).build(task, lr=0.1)
    # the first step of some makes their state
    step(0.5)
    start = [p.detach().clone() for p in task.parameters]
    step(1.0)
    assert all(torch.equal(p, q) for p, q in zip(task.parameters, start, strict=True))
    step(0.5)
    assert not any(torch.equal(p, q) for p, q in zip(task.parameters, start, strict=True))


def test_methods_hand_over():
    task = Task.of(problems.load("fit-1d"), 0)
    both = pinn_of("adam-lbfgs").build(task, lr=0.01, adam_share=0.4)
    assert both(0.39) == 1
    assert both(0.41) > 1
    task = Task.of(problems.load("fit-1d"), 0)
    both = pinn_of("ssbroyden").build(task, adam_share=0.1, broyden=1.0)
    before = base.mean_squares(task.residuals()).item()
    both(0.05)
    adam_moved = max(
        (p - q).abs().max().item()
        for p, q in zip(task.parameters, Task.of(task.problem, 0).parameters, strict=True)
    )
    # a first step of Adam has the size of its rate
    assert adam_moved == pytest.approx(ssbroyden.ADAM_LR * (1 + math.cos(math.pi / 2)) / 2, rel=1e-3)
    for _ in range(20):
        both(0.5)
    assert base.mean_squares(task.residuals()).item() < 0.5 * before


def test_obstacles_are_named(monkeypatch):
    part = Pinn(({},), lambda task: lambda spent: 1)
    nowhere = Peer("Nowhere", pinn=part, module="no_such_package_anywhere")
    monkeypatch.setitem(PEERS, "nowhere", nowhere)
    monkeypatch.setitem(PEERS, "dense", Peer("Dense", pinn=replace(part, regression_only=True)))
    assert study.obstacle("nowhere", problems.load("diabetes")) == "no_such_package_anywhere is not installed"
    assert study.obstacle("dense", problems.load("fit-1d")) is None
    assert "torch.func" in study.obstacle("dense", problems.load("heat"))


def sabotaged(monkeypatch, at_step):
    """Adam whose loss stops being finite."""

    def build(task, *, lr):
        count = 0

        def step(share):
            nonlocal count
            count += 1
            if count == at_step:
                with torch.no_grad():
                    task.parameters[0].fill_(math.nan)
            return 1

        return step

    monkeypatch.setitem(PEERS, "adam", Peer("Adam", pinn=Pinn(({"lr": 0.1}, {"lr": 0.2}), build)))


def test_records_come_at_the_start_the_marks_and_the_end():
    problem = problems.load("fit-1d")
    run = Run("fit-1d", "adam", {"lr": 0.01}, 0, 0.2)
    task = Task.of(problem, 0)
    history = list(training.train(run, problem, task))
    assert (history[0].step, history[0].seconds) == (0, 0)
    assert [entry.step for entry in history] == sorted({entry.step for entry in history})
    assert history[-1].seconds >= 0.2 > history[-2].seconds
    assert history[-1].test_error == base.relative_error(task.network, problem.test)
    assert history[-1].loss < history[0].loss
    assert not study.diverged(run, history)


def test_a_diverged_run_ends_early_and_is_not_chosen(monkeypatch, tmp_path, capsys):
    sabotaged(monkeypatch, at_step=3)
    assert cli(tmp_path, "--method", "adam", "--problem", "fit-1d") == 0
    assert "Adam left out: it diverged with every setting" in capsys.readouterr().err
    rows = stored(tmp_path)
    assert len(rows) == 2
    assert all(row["history"][-1]["seconds"] < row["run"]["seconds"] for row in rows)


def test_early_stopping_takes_the_lowest_validation_error():
    history = [record(1, validation=0.9, test=0.8), record(2, validation=0.5, test=0.7), record(3, 0.6, 0.4)]
    assert study.outcome(problems.load("diabetes"), history) is history[1]
    assert study.outcome(problems.load("fit-1d"), history) is history[2]


def record(seconds, validation, test, loss=1.0, coefficient=None):
    return Record(10 * seconds, float(seconds), loss, validation, test, coefficient)


def final(method, setting, tried, errors):
    """One run for each list of test errors, one record a second."""
    histories = tuple(
        [record(second, error, error) for second, error in enumerate(run_errors, start=1)]
        for run_errors in errors
    )
    seconds = max(len(run_errors) for run_errors in errors)
    made = tuple(Run("poisson-2d", method, setting, seed, float(seconds)) for seed in range(len(errors)))
    return Final(tried, made, histories)


def test_table_from_known_runs():
    grid = ({"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3})
    pairs = ({"lr": 0.1, "adam_share": 0.1}, {"lr": 0.1, "adam_share": 0.4})
    finals = {
        "adam": final("adam", grid[2], grid, [[9, 5, 4], [9, 3, 2], [9, 9, 8]]),
        "adam-lbfgs": final("adam-lbfgs", pairs[0], pairs, [[9, 4, 2], [9, 4, 2], [9, 4, 2]]),
        "gauss-newton": final("gauss-newton", grid[1], grid, [[4, 1, 0.01], [9, 4, 0.02], [9, 9]]),
        "lbfgs": final("lbfgs", grid[0], grid, [[9, 9], [9, 9, 9]]),
    }
    lines = tables.table(problems.load("poisson-2d"), finals).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
    assert table["Adam"]["setting"] == "lr 0.3*"
    assert table["Adam"]["error"] == "4 (2 to 8)"
    assert table["Adam"]["seconds to Adam's error"] == "2.5 (2 to 3), 1 never"
    assert table["Adam, then L-BFGS"]["setting"] == "lr 0.1, adam share 0.1"
    newton = table["GaussNewton"]
    assert newton["setting"] == "lr 0.2"
    assert newton["error"] == "0.015 (0.01 to 0.02)"
    assert newton["Adam / it"] == "2.7e+02"
    assert newton["Adam, then L-BFGS / it"] == "1.3e+02"
    assert newton["seconds to Adam's error"] == "1.5 (1 to 2), 1 never"
    assert newton["steps"] == "30 (30 to 30)"
    assert table["L-BFGS"]["seconds to Adam's error"] == "never"


def cli(folder, *arguments):
    small = ["--seconds", "0.15", "--settings", "2", "--seed", "5", "--seed", "6"]
    return comparison.main([*small, "--output", str(folder), *arguments])


def stored(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_command_line_from_tuning_to_pictures(tmp_path, capsys, monkeypatch):
    arguments = ["--problem", "inverse-diffusion", "--method", "adam", "--method", "lbfgs"]
    assert cli(tmp_path, *arguments) == 0
    out = capsys.readouterr().out
    rows = stored(tmp_path)
    assert len(rows) == 8
    for method in ("adam", "lbfgs"):
        mine = [row for row in rows if row["run"]["method"] == method]
        assert [row["run"]["seed"] for row in mine] == [0, 0, 5, 6]
        tuning = {row["history"][-1]["validation_error"]: row["run"]["setting"] for row in mine[:2]}
        assert mine[2]["run"]["setting"] == mine[3]["run"]["setting"] == tuning[min(tuning)]
        assert PEERS[method].label in out
    assert {"commit", "torch", "cpu", "threads", "load"} <= rows[0].keys()
    assert "coefficient's error" in out
    for name in ("inverse-diffusion.png", "inverse-diffusion-fields.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "Adam" in (tmp_path / "inverse-diffusion.md").read_text()

    def train_again(*_, **__):
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(study, "train", train_again)
    assert cli(tmp_path, *arguments) == 0
    assert capsys.readouterr().out == out
    assert stored(tmp_path) == rows


def test_interrupted_command_tells_how_to_go_on(tmp_path, capsys, monkeypatch):
    arguments = ["--problem", "fit-1d", "--method", "adam"]
    train, started = study.train, 0

    def interrupted(*rest):
        nonlocal started
        started += 1
        if started == 3:
            raise KeyboardInterrupt
        return train(*rest)

    monkeypatch.setattr(study, "train", interrupted)
    assert cli(tmp_path, *arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    before = stored(tmp_path)
    assert len(before) == 2
    assert cli(tmp_path, *arguments) == 0
    assert stored(tmp_path)[:2] == before
    assert len(stored(tmp_path)) == 4


def test_half_a_line_is_named(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text('{"run": {"prob')
    assert cli(tmp_path, "--problem", "fit-1d", "--method", "adam") == 2
    assert "output: line 1 of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "5"], "settings: expected 1 to 4, got 5"),
        (["--problem", "california"], "data_dir: california needs the folder"),
    ],
)
def test_bad_arguments_are_named(tmp_path, capsys, arguments, message):
    assert cli(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (comparison.main, ["--seconds", "0"], "--seconds: expected a number above 0, got 0"),
        (comparison.main, ["--threads", "0"], "--threads: expected 1 or more, got 0"),
        (demo.main, ["--seconds", "-1"], "--seconds: expected a number above 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_named(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_demo_trains_both_and_leaves_the_picture(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    assert demo.main(["--seconds", "0.5", "--output", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "Adam" in out
    assert "GaussNewton" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_settings_are_among_those_tried():
    for name, setting in demo.CONTENDERS.items():
        assert setting in pinn_of(name).settings
    assert lbfgs.ITERATIONS > 1


def test_published_figures_stand_beside_ours(capsys):
    assert published.main(["--problem", "heat", "--seconds", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "network 2 - 64 - 1, points: 900 interior, 60 initial, 60 walls" in out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if "|" in line]
    assert ["ENGD (full)", "RTX 6000", "1000", "3.05e-08", "arXiv 2405.15603, run ruxdkxho"] in rows
    (ours,) = [row for row in rows if row[0] == "GaussNewton"]
    assert 0 < float(ours[3]) < 1
    assert "exp13_reproduce_heat1d" in out


@pytest.mark.parametrize("name", published.SETUPS)
def test_published_problems_have_the_sources_solutions(name):
    setup = published.SETUPS[name]
    problem = setup.problem()
    exact = Exact(problem)
    for residuals, weight in problem.residuals(exact, problem.points(3)).values():
        assert residuals.abs().max() < 1e-11
        assert weight <= 1
    assert {row.setup for row in published.PUBLISHED} == set(published.SETUPS)
    # D of the sources
    sizes = {"poisson-2d": 257, "heat": 257, "poisson-5d": 449, "poisson-5d-deep": 10065}
    assert sum(p.numel() for p in problem.network().parameters()) == sizes[name]
    rows = sum(len(x) for block, x in problem.points(0).items() if x.ndim == 2)
    assert rows == (1020 if problem.low == (0.0, 0.0) else 3500)


def test_the_table_over_sizes(tmp_path):
    path = tmp_path / "rows.jsonl"
    scale.main(["--points", "20", "60", "--width", "4", "--steps", "2", f"--output={path}"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["points"], row["parameters"], row["solver"]) for row in rows] == [
        (20, 57, "sample"),
        (60, 57, "parameter"),
    ]
    for row in rows:
        assert row["loss_after_2_steps"] < row["loss_before"]
        assert row["loss_after_lbfgs"] < row["loss_before"]
        assert row["peak_bytes"] > 8 * min(row["points"], 57) ** 2


def test_phases_of_a_gauss_newton_step_are_recorded(tmp_path):
    path = tmp_path / "rows.jsonl"
    gauss_newton.main(
        ["--points", "20", "--dimensions", "2", "--width", "8", "--rounds", "1", f"--output={path}"]
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    phases = ["step", "residuals and Jacobian", "Gram", "factor", "solve"]
    assert [row["contender"] for row in rows] == 2 * phases
    assert all(row["median_s"] > 0 for row in rows)
