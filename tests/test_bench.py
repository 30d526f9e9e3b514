import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fngd
from bench import contenders, environment, gate, gauss_newton, oracle, record, solves, steps
from bench.memory import peak_memory
from bench.networks import Network
from bench.timing import Timing, round_robin
from fngd_kernels import native

CPU = torch.device("cpu")
SMALL = Network(
    name="small",
    model=lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ),
    batch=lambda: (torch.randn(6, 2, 4, 4), torch.randint(3, (6,))),
    loss=F.cross_entropy,
    gate=("0", "1", "4"),
)


def test_gate_passes_correct_figures():
    torch.manual_seed(0)
    gate.check(SMALL, SMALL.batch())


@pytest.mark.parametrize(
    ("layer", "a"),
    [
        (nn.Linear(4, 3), torch.randn(5, 4)),
        (nn.Linear(4, 3, bias=False), torch.randn(5, 2, 3, 4)),
        (nn.Conv2d(2, 3, 3, padding=1, stride=2, dilation=2), torch.randn(5, 2, 9, 8)),
        (nn.Embedding(6, 3), torch.randint(6, (5, 4))),
        (nn.LayerNorm((2, 3)), torch.randn(5, 4, 2, 3)),
        (nn.BatchNorm2d(2), torch.randn(5, 2, 3, 3)),
    ],
)
def test_contributions_are_the_gradients_of_single_samples(layer, a):
    e = torch.randn_like(layer(a))
    parts = oracle.contributions(layer, a, e)
    assert parts.keys() == dict(layer.named_parameters()).keys()
    layer = layer.double()
    for n in range(len(a)):
        out = layer(a.double() if a.is_floating_point() else a)
        gradients = torch.autograd.grad((out[n] * e[n].double()).sum(), layer.parameters())
        for rows, expected in zip(parts.values(), gradients, strict=True):
            assert rows.dtype == torch.float64
            torch.testing.assert_close(rows[n], expected)
    with pytest.raises(TypeError, match="layer: expected one that the oracle has a formula for"):
        oracle.contributions(nn.GroupNorm(1, 2), torch.ones(2, 2), torch.ones(2, 2))


class Noise(nn.Module):
    """Two passes differ, more than tolerances allow."""

    def forward(self, x):
        return x + 0.2 * torch.randn_like(x)


def test_the_gate_compares_each_pass_with_itself():
    noisy = dataclasses.replace(SMALL, model=lambda: SMALL.model().insert(2, Noise()), gate=("0", "1", "5"))
    torch.manual_seed(0)
    batch = noisy.batch()
    gate.check(noisy, batch)
    gate.check_mode(noisy, batch, "graphed")


@pytest.mark.parametrize("share", ["sample", "none"])
def test_gate_stops_a_graph_with_weights_of_other_samples(share, monkeypatch):
    batch = SMALL.draw(CPU)
    make_step = gate.make_step

    def stale(network, batch, model, optimizer, mode):
        step = make_step(network, batch, model, optimizer, mode)

        def run():
            step()
            if optimizer.share == share:
                optimizer.state[model[4].weight]["momentum_buffer"][0] *= 1.001

        return run

    gate.check_mode(SMALL, batch, "graphed")
    monkeypatch.setattr(gate, "make_step", stale)
    message = f"weighted gradient of 4, graphed, share='{share}', weight: relative deviation"
    with pytest.raises(AssertionError, match=message):
        gate.check_mode(SMALL, batch, "graphed")


def test_gate_stops_wrong_figures(monkeypatch):
    torch.manual_seed(0)
    batch = SMALL.batch()
    layer_grams = fngd.layer_grams
    with monkeypatch.context() as patch:
        patch.setattr(fngd, "layer_grams", lambda *a: {k: 1.0001 * v for k, v in layer_grams(*a).items()})
        with pytest.raises(AssertionError, match=r"Gram matrix of 0: relative deviation 1\.0e-04"):
            gate.check(SMALL, batch)
        patch.setattr(fngd, "layer_grams", lambda *a: {"0": layer_grams(*a)["0"]})
        with pytest.raises(AssertionError, match=r"layers without a Gram matrix: \['1', '4'\]"):
            gate.check(SMALL, batch)
    with monkeypatch.context() as patch:
        patch.setattr(gate, "DAMPING", 0.1 + 1e-3)
        patch.setattr(gate.fngd, "FNGD", lambda *a, damping, **k: fngd_class(*a, damping=0.1, **k))
        with pytest.raises(AssertionError, match="coefficients of 0: relative deviation"):
            gate.check(SMALL, batch)
    with monkeypatch.context() as patch:
        patch.setattr(gate.fngd, "FNGD", lambda *a, **k: fngd_class(*a, **k, skip=("4",)))
        with pytest.raises(AssertionError, match=r"layers with the plain gradient: \['4'\]"):
            gate.check(SMALL, batch)
    with monkeypatch.context() as patch:
        patch.setattr(fngd_class, "zero_grad", lambda *_: None)
        with pytest.raises(AssertionError, match="weighted gradient of 0, weight: relative deviation"):
            gate.check(SMALL, batch)


fngd_class = fngd.FNGD


def test_rows_are_appended(tmp_path):
    path = tmp_path / "results" / "rows.jsonl"
    record.append(path, [{"a": 1}, {"a": 2.5}])
    record.append(path, [{"a": None, **environment.describe(CPU)}])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["a"] for row in rows] == [1, 2.5, None]
    assert rows[2]["torch"] == torch.__version__
    assert rows[2]["gpu"] is None


def test_the_environment_says_which_commit_was_copied(monkeypatch):
    row = environment.describe(CPU)
    assert row["extension"] == ("cpu" if native.AVAILABLE else None)
    assert {"triton", "cuda", "uncommitted_changes"} <= row.keys()
    monkeypatch.setenv("FNGD_COMMIT", "0123456789ab")
    for said, dirty in (("0", False), ("1", True)):
        monkeypatch.setenv("FNGD_DIRTY", said)
        row = environment.describe(CPU)
        assert (row["commit"], row["uncommitted_changes"]) == ("0123456789ab", dirty)
    monkeypatch.delenv("FNGD_COMMIT")
    monkeypatch.setattr(environment, "_git", lambda *_: None)
    row = environment.describe(CPU)
    assert (row["commit"], row["uncommitted_changes"]) == (None, None)


@pytest.mark.parametrize(
    ("here", "cuda", "status"), [("cuda", "13.0", 0), ("cpu", "13.0", 1), ("cpu", None, 0)]
)
def test_the_environment_fails_where_the_extension_lacks_cuda(here, cuda, status, monkeypatch, capsys):
    monkeypatch.setattr(environment, "_extension", lambda: here)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert environment.main() == status
    assert json.loads(capsys.readouterr().out)["extension"] == here


def test_round_robin_lets_everyone_run_once_a_round():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = round_robin(contenders, rounds=5, warmup=2, device=CPU)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 7
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert all(len(timing.samples) == 5 for timing in timings.values())
    with pytest.raises(ValueError, match="rounds: expected 1 or more, got 0"):
        round_robin(contenders, rounds=0, warmup=0, device=CPU)


def test_timing_percentiles():
    timing = Timing(tuple(float(i) for i in range(1, 12)))
    assert (timing.p20, timing.median, timing.p80) == (3.0, 6.0, 9.0)
    assert Timing((2.0,)).p80 == 2.0


def test_peak_memory_counts_what_is_held_at_once():
    kept = torch.ones(1000)

    def step():
        a = torch.empty(1 << 20)
        b = torch.empty(1 << 20)
        del a
        c = torch.empty(1 << 18)
        del b, c
        return kept.sum()

    expected = 4 * 2 * (1 << 20)
    assert expected <= peak_memory(step, CPU) <= expected + 1024


@pytest.mark.parametrize("network", ["resnet", "transformer"])
def test_steps_on_the_cpu(network, tmp_path):
    path = tmp_path / "rows.jsonl"
    arguments = ["--device=cpu", "--mode=eager", "--rounds=2", f"--network={network}", f"--output={path}"]
    assert steps.main(arguments) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for base in ("sgd", "adamw"):
        mine = {row["contender"]: row for row in rows if row["base"] == base}
        assert list(mine) == [base, f"{base} fused", "fngd steady", "fngd solving"]
        fastest = min(mine[base]["median_s"], mine[f"{base} fused"]["median_s"])
        for row in mine.values():
            assert row["ratio"] == row["median_s"] / fastest
            assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
            assert row["extra_bytes"] == row["peak_bytes"] - mine[row["baseline"]]["peak_bytes"]


def test_graphed_steps_without_a_device(monkeypatch, tmp_path):
    # off CUDA, GraphedStep runs every step as it is; so does this stand-in for the base optimizer's graph
    monkeypatch.setattr(contenders, "capture", lambda step, _: step)
    path = tmp_path / "rows.jsonl"
    arguments = ["--device=cpu", "--mode=graphed", "--base=sgd", "--network=transformer", "--rounds=1"]
    assert steps.main([*arguments, f"--output={path}"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["contender"] for row in rows] == ["sgd", "sgd fused", "fngd steady", "fngd solving"]
    assert {row["peak_bytes"] for row in rows} == {None}


def test_a_contender_that_fails_is_left_out(monkeypatch, tmp_path, capsys):
    def refuse(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fngd_class, "__init__", refuse)
    monkeypatch.setattr(steps.gate, "check", lambda *_: None)
    path = tmp_path / "rows.jsonl"
    arguments = ["--device=cpu", "--mode=eager", "--base=sgd", "--network=transformer", "--rounds=1"]
    assert steps.main([*arguments, f"--output={path}"]) == 2
    assert "eager, sgd, fngd steady: RuntimeError: no such kernel" in capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["contender"] for row in rows] == ["sgd", "sgd fused"]


def test_a_mode_that_fails_its_gate_has_figures_of_the_base_alone(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise AssertionError("graphed step: weighted gradient of head.weight is 100% off")

    monkeypatch.setattr(contenders, "capture", lambda step, _: step)
    monkeypatch.setattr(steps.gate, "check_mode", fail)
    path = tmp_path / "rows.jsonl"
    arguments = ["--device=cpu", "--mode=graphed", "--base=sgd", "--network=transformer", "--rounds=1"]
    assert steps.main([*arguments, f"--output={path}"]) == 2
    assert "graphed, gate: AssertionError: graphed step" in capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["contender"] for row in rows] == ["sgd", "sgd fused"]


def test_no_gate_no_figures(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise AssertionError("coefficients of 0: relative deviation 1")

    monkeypatch.setattr(steps.gate, "check", fail)
    path = tmp_path / "rows.jsonl"
    assert steps.main(["--device=cpu", f"--output={path}"]) == 2
    assert capsys.readouterr().out.count("gate: AssertionError: coefficients of 0") == 2
    assert not path.exists()


def test_gate_compares_modes_by_what_fngd_changes(monkeypatch):
    batch = SMALL.draw(CPU)
    changes = gate._changes
    eager = changes(SMALL, batch, "eager")
    assert list(eager) == ["0.weight", "0.bias", "4.weight", "4.bias"]
    assert all(change.norm() > 0 for change in eager.values())
    monkeypatch.setattr(gate, "_changes", lambda network, batch, _: changes(network, batch, "eager"))
    gate.check_mode(SMALL, batch, "compiled")
    # a layer that lost its weights keeps the plain gradient
    lost = {"eager": eager, "compiled": eager | {"4.bias": torch.zeros(3)}}
    monkeypatch.setattr(gate, "_changes", lambda *arguments: lost[arguments[2]])
    with pytest.raises(AssertionError, match=r"compiled step: weighted gradient of 4.bias is 100% off"):
        gate.check_mode(SMALL, batch, "compiled")


def test_solves_on_the_cpu(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    arguments = ["--device=cpu", "--batches", "3", "--orders", "17", "--rounds=2", f"--output={path}"]
    assert solves.main(arguments) == 0
    assert solves.main([*arguments, "--dtypes", "float64"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all("float64" in row["network"] for row in rows[8:])
    rows = rows[:8]
    names = [f"{kind} 3 x 17 {dtype}" for kind in solves.NAMES for dtype in solves.DTYPES for _ in range(2)]
    assert [row["network"] for row in rows] == names
    assert all(row["residual"] <= 32 * torch.finfo(torch.float32).eps for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["contender"] == row["baseline"])


@pytest.mark.parametrize("kind", solves.NAMES)
def test_wrong_solves_get_no_figure(kind, tmp_path, monkeypatch, capsys):
    right = {"solve": solves.fk.solve, "coefficients": solves.coefficients}
    monkeypatch.setattr(solves.fk, "solve", lambda *a: right["solve"](*a) * (1 + 1e-4))
    monkeypatch.setattr(solves, "coefficients", lambda k, *a: right["coefficients"](1.001 * k + 0.001, *a))
    path = tmp_path / "rows.jsonl"
    assert solves.main(["--device=cpu", "--batches", "2", "--orders", "8", f"--output={path}"]) == 4
    assert f"FAILED {kind} 2 x 8 float32: AssertionError" in capsys.readouterr().out
    assert not path.exists()


def test_phases_of_a_gauss_newton_step_are_recorded(tmp_path):
    path = tmp_path / "rows.jsonl"
    gauss_newton.main(
        ["--points", "20", "--dimensions", "2", "--width", "8", "--rounds", "1", f"--output={path}"]
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    phases = ["step", "residuals and capture", "Gram", "solve", "combine"]
    assert [row["contender"] for row in rows] == 2 * phases
    assert all(row["median_s"] > 0 for row in rows)
