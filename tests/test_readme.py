"""The examples of the README and of the guide pages run as written and print what their comments say."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fngd
from paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_examples(page, capsys):
    examples = blocks(page, "python")
    assert examples
    namespace = {"fngd": fngd}
    for example in examples:
        exec(compile(example, page.name, "exec"), namespace)
        expected = re.findall(r"^print\(.*\)  # (.*)$", example, re.MULTILINE)
        assert capsys.readouterr().out.split("\n")[:-1] == expected


def test_the_changed_training_loop():
    (diff,) = blocks(ROOT / "README.md", "diff")
    changed = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    x, y = torch.randn(20, 4), torch.randint(0, 3, (20,))
    namespace = {
        "fngd": fngd,
        "model": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
        "loader": DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True),
        "loss_fn": nn.functional.cross_entropy,
    }
    exec(compile(changed, "README.md", "exec"), namespace)
    assert namespace["opt"].stats()["seen_samples"] == 20
