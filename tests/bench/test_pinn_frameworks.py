"""The command that compares frameworks by their own ways and by GaussNewton."""

import math

import pytest
import torch

from bench.pinn import frameworks


@pytest.fixture(autouse=True)
def _defaults(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("framework", frameworks.EXAMPLES)
def test_a_run(framework, capsys):
    pytest.importorskip(framework)
    assert frameworks.main(["--seconds", "0.3", "--framework", framework]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("error")[0].split(maxsplit=1)[1].strip() for line in lines] == list(frameworks.METHODS)
    errors = [float(line.split("error")[1].split()[0]) for line in lines]
    assert all(map(math.isfinite, errors))


def test_a_framework_that_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(frameworks.importlib.util, "find_spec", lambda name: None)
    assert frameworks.main([]) == 0
    assert capsys.readouterr().out.count("not installed") == len(frameworks.EXAMPLES)
