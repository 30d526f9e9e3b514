"""Shampoo of the pytorch_optimizer package."""

from torch import nn

from bench.peers.base import MOMENTUM, SGD_LRS, SGD_WEIGHT_DECAY, Peer, Settings, Training, Update

# SOAP's default; Shampoo's documentation calls 1 ideal and 1000 fast, so that 10 sides with neither.
PERIOD = 10
# ScalableShampoo's default.
FIRST_PRECONDITIONING = 25


def _build(model: nn.Module, settings: Settings) -> Update:
    # Defaults of the documentation: blocks of 512, grafted onto SGD, whose learning rates it takes over.
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(
        model.parameters(),
        lr=settings.lr,
        betas=(MOMENTUM, 0.999),
        weight_decay=SGD_WEIGHT_DECAY,
        start_preconditioning_step=FIRST_PRECONDITIONING,
        preconditioning_compute_steps=PERIOD,
    )


PEERS = {
    "shampoo": Peer(
        "Shampoo",
        Training(
            SGD_LRS,
            _build,
            {"color": "#A6761D", "linestyle": "-."},
            period=PERIOD,
            warmup=FIRST_PRECONDITIONING + PERIOD,
            resumes=False,
        ),
        module="pytorch_optimizer",
        source="pip install pytorch_optimizer",
    )
}
