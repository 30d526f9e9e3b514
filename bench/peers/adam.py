"""torch's AdamW in training, and its Adam with half a cosine of the learning rate on equations."""

import math

import torch
from torch import nn

from bench.peers.base import (
    ADAMW_LRS,
    ADAMW_WEIGHT_DECAY,
    Fit,
    Iterate,
    Peer,
    Pinn,
    Settings,
    Training,
    Update,
)

STYLE = {"color": "#E69F00", "linestyle": "--"}


def _adamw(model: nn.Module, settings: Settings) -> Update:
    return torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=ADAMW_WEIGHT_DECAY)


def adam(task: Fit, *, lr: float) -> Iterate:
    """Return steps of Adam along the gradient of all points."""
    return along_a_cosine(task, torch.optim.Adam(task.parameters, lr=lr, fused=True), lr)


def along_a_cosine(task: Fit, optimizer: torch.optim.Optimizer | Update, lr: float) -> Iterate:
    """Return steps of `optimizer` whose learning rate falls from `lr` to 0 while the seconds are spent."""

    def step(spent: float) -> int:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * min(spent, 1.0))) / 2
        task.backward()
        optimizer.step()
        return 1

    return step


PEERS = {
    "adamw": Peer("AdamW", Training(ADAMW_LRS, _adamw, STYLE)),
    "adam": Peer("Adam", pinn=Pinn(tuple({"lr": lr} for lr in (3e-3, 1e-2, 3e-2, 1e-1)), adam, STYLE)),
}
