import json

import pytest
import torch

from bench.kernels import solves


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
