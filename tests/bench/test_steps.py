import json

import pytest

import fngd
from bench.steps import __main__ as steps
from bench.steps import contenders


@pytest.mark.parametrize("network", ["resnet", "transformer"])
def test_steps_on_the_cpu(network, tmp_path):
    path = tmp_path / "rows.jsonl"
    arguments = ["--device=cpu", "--mode=eager", "--rounds=2", f"--network={network}", f"--output={path}"]
    assert steps.main(arguments) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for base in ("sgd", "adamw"):
        mine = {row["contender"]: row for row in rows if row["base"] == base}
        assert list(mine) == [base, f"{base} fused", "fngd steady", "fngd solving", "fngd sketched"]
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
    assert [row["contender"] for row in rows] == [
        "sgd",
        "sgd fused",
        "fngd steady",
        "fngd solving",
        "fngd sketched",
    ]
    assert {row["peak_bytes"] for row in rows} == {None}


def test_a_contender_that_fails_is_left_out(monkeypatch, tmp_path, capsys):
    def refuse(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fngd.FNGD, "__init__", refuse)
    monkeypatch.setattr(steps.gate, "check", lambda *_: None)
    path = tmp_path / "rows.jsonl"
    arguments = ["--device=cpu", "--mode=eager", "--base=sgd", "--network=transformer", "--rounds=1"]
    assert steps.main([*arguments, f"--output={path}"]) == 3
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
    assert steps.main([*arguments, f"--output={path}"]) == 3
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
