import json

import pytest
import torch

from bench.tools import environment, jsonl
from bench.tools.peak_memory import peak_memory
from bench.tools.timing import Timing, round_robin
from fngd_kernels import native

CPU = torch.device("cpu")


def test_rows_are_appended(tmp_path):
    path = tmp_path / "results" / "rows.jsonl"
    jsonl.append(path, [{"a": 1}, {"a": 2.5}])
    jsonl.append(path, [{"a": None, **environment.describe(CPU)}])
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
