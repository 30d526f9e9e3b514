"""States that earlier versions of the package have saved."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fngd

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["checkpoint-before-capture.pt"])
def test_training_goes_on_from_an_older_state(name):
    """The state was saved in the second epoch; the parameters after one more step were saved beside it."""
    saved = torch.load(DATA / name, weights_only=True)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    model.load_state_dict(saved["model"])
    optimizer = fngd.FNGD(model, lr=0.5)
    optimizer.load_state_dict(saved["optimizer"])
    stats = optimizer.stats()
    assert (stats["epoch"], stats["solved_batches"], stats["seen_samples"]) == (2, 3, 12)

    optimizer.set_samples(range(8, 12))
    F.cross_entropy(model(saved["x"][8:]), saved["y"][8:]).backward()
    optimizer.step()

    for parameter, value in saved["after_next_step"].items():
        torch.testing.assert_close(model.state_dict()[parameter], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["checkpoint-before-capture.pt"])
def test_the_keys_of_a_state_have_stayed(name):
    saved = torch.load(DATA / name, weights_only=True)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    state = fngd.FNGD(model, momentum=0.9).state_dict()
    added = {"base", "missed", "datasets", "epoch_ended"}
    assert state["fngd"].keys() == saved["optimizer"]["fngd"].keys() | added
    assert state["param_groups"][0].keys() == saved["optimizer"]["param_groups"][0].keys() - {"fngd"}
