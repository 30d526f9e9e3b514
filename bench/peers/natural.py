"""FNGD: coefficients shared with later epochs or solved for at every step, over SGD or AdamW."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

import fngd
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


SHARED = Method("FNGD shared", SGD_LRS, _shared, solves="first epoch", damping=DAMPING)
EXACT = Method("FNGD exact", SGD_LRS, _exact, solves="always", damping=DAMPING)
OVER_ADAMW = Method("FNGD shared, AdamW", ADAMW_LRS, _over_adamw, solves="first epoch", damping=DAMPING)
