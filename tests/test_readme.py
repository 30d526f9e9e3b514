"""The README's examples run as written and print what their comments say."""

import re
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fngd

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_examples(capsys):
    examples = blocks("python")
    assert len(examples) >= 3
    namespace = {"fngd": fngd}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
        expected = re.findall(r"^print\(.*\)  # (.*)$", example, re.MULTILINE)
        assert capsys.readouterr().out.split("\n")[:-1] == expected


def test_the_changed_training_loop():
    (diff,) = blocks("diff")
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
