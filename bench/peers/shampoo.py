"""Shampoo and SOAP of the pytorch_optimizer package."""

from __future__ import annotations

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

SOURCE = "pip install pytorch_optimizer"
# SOAP's default; Shampoo's documentation calls 1 ideal and 1000 fast, so that 10 sides with neither
PERIOD = 10
# ScalableShampoo's default
FIRST_PRECONDITIONING = 25


def _shampoo(model: nn.Module, settings: Settings) -> Update:
    # defaults of the documentation: blocks of 512, grafted onto SGD, whose learning rates it takes over
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(
        model.parameters(),
        lr=settings.lr,
        betas=(MOMENTUM, 0.999),
        weight_decay=SGD_WEIGHT_DECAY,
        start_preconditioning_step=FIRST_PRECONDITIONING,
        preconditioning_compute_steps=PERIOD,
    )


def _soap(model: nn.Module, settings: Settings) -> Update:
    # defaults of the documentation and of its authors: betas 0.95, a new basis every 10 steps, lr about 3e-3
    from pytorch_optimizer import SOAP as Optimizer

    return Optimizer(
        model.parameters(),
        lr=settings.lr,
        weight_decay=ADAMW_WEIGHT_DECAY,
        precondition_frequency=PERIOD,
    )


SHAMPOO = Method(
    "Shampoo",
    SGD_LRS,
    _shampoo,
    module="pytorch_optimizer",
    source=SOURCE,
    period=PERIOD,
    warmup=FIRST_PRECONDITIONING + PERIOD,
    resumes=False,
)
SOAP = Method(
    "SOAP", ADAMW_LRS, _soap, module="pytorch_optimizer", source=SOURCE, period=PERIOD, warmup=PERIOD
)
