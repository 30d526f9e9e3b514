"""The methods compared: how each optimizer is built, and the learning rates tried for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

import fngd

MOMENTUM = 0.9
SGD_WEIGHT_DECAY = 5e-4
ADAMW_WEIGHT_DECAY = 1e-2


@dataclass(frozen=True)
class FNGDSettings:
    """What the command line leaves open about FNGD."""

    share: str
    damping: float


@dataclass(frozen=True)
class Method:
    """One line of the comparison; `solves` says in which epochs coefficients are solved for."""

    label: str
    lrs: tuple[float, ...]
    solves: Literal["never", "first epoch", "always"]
    build: Callable[[nn.Module, float, FNGDSettings], Optimizer]


def _sgd(model: nn.Module, lr: float, settings: FNGDSettings) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=SGD_WEIGHT_DECAY)


def _adamw(model: nn.Module, lr: float, settings: FNGDSettings) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=ADAMW_WEIGHT_DECAY)


def _fngd(model: nn.Module, lr: float, settings: FNGDSettings) -> Optimizer:
    return fngd.FNGD(
        model,
        lr=lr,
        momentum=MOMENTUM,
        weight_decay=SGD_WEIGHT_DECAY,
        damping=settings.damping,
        share=settings.share,
    )


def _fngd_exact(model: nn.Module, lr: float, settings: FNGDSettings) -> Optimizer:
    return _fngd(model, lr, FNGDSettings(share="none", damping=settings.damping))


# equally many rates each, in equal ratios, so that no method is tuned more finely than another
SGD_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAMW_LRS = (0.0003, 0.001, 0.003, 0.01, 0.03)

METHODS = {
    "sgd": Method("SGD", SGD_LRS, "never", _sgd),
    "adamw": Method("AdamW", ADAMW_LRS, "never", _adamw),
    "fngd": Method("FNGD shared", SGD_LRS, "first epoch", _fngd),
    "fngd-exact": Method("FNGD exact", SGD_LRS, "always", _fngd_exact),
}
