"""FNGD: coefficients shared with later epochs or solved for at every step, over SGD or AdamW."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from torch import nn

import fngd
from bench.peers.base import (
    ADAMW_LRS,
    ADAMW_WEIGHT_DECAY,
    MOMENTUM,
    SGD_LRS,
    SGD_WEIGHT_DECAY,
    Peer,
    Settings,
    Style,
    Training,
    Update,
)

DAMPING = 0.1


def _shared(model: nn.Module, settings: Settings) -> Update:
    return fngd.FNGD(
        model,
        lr=settings.lr,
        momentum=MOMENTUM,
        weight_decay=SGD_WEIGHT_DECAY,
        damping=settings.damping or DAMPING,
        share=settings.share,
    )


def _exact(model: nn.Module, settings: Settings) -> Update:
    return _shared(model, replace(settings, share="none"))


def _over_adamw(model: nn.Module, settings: Settings) -> Update:
    return fngd.FNGD(
        model,
        base="adamw",
        lr=settings.lr,
        weight_decay=ADAMW_WEIGHT_DECAY,
        damping=settings.damping or DAMPING,
        share=settings.share,
    )


def _training(
    lrs: tuple[float, ...],
    build: Callable[[nn.Module, Settings], Update],
    style: Style,
    solves: Literal["first epoch", "always"] = "first epoch",
) -> Training:
    return Training(lrs, build, style, solves=solves, damping=DAMPING)


PEERS = {
    "fngd": Peer("FNGD shared", _training(SGD_LRS, _shared, {"color": "#0072B2", "linestyle": "-."})),
    "fngd-exact": Peer(
        "FNGD exact", _training(SGD_LRS, _exact, {"color": "#D55E00", "linestyle": ":"}, "always")
    ),
    "fngd-adamw": Peer(
        "FNGD shared, AdamW", _training(ADAMW_LRS, _over_adamw, {"color": "#56B4E9", "linestyle": "-."})
    ),
}
