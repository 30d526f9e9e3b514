"""torch's own SGD and AdamW."""

from __future__ import annotations

import torch
from torch import nn

from bench.peers.base import (
    ADAMW_LRS,
    ADAMW_WEIGHT_DECAY,
    MOMENTUM,
    SGD_LRS,
    SGD_WEIGHT_DECAY,
    Method,
    Settings,
    Update,
)


def _sgd(model: nn.Module, settings: Settings) -> Update:
    return torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=MOMENTUM, weight_decay=SGD_WEIGHT_DECAY
    )


def _adamw(model: nn.Module, settings: Settings) -> Update:
    return torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=ADAMW_WEIGHT_DECAY)


SGD = Method("SGD", SGD_LRS, _sgd)
ADAMW = Method("AdamW", ADAMW_LRS, _adamw)
