"""SOAP of the pytorch_optimizer package."""

from torch import nn

from bench.peers.adam import along_a_cosine
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

# The default of the package.
PERIOD = 10


def _build(model: nn.Module, settings: Settings) -> Update:
    # Defaults of the documentation and of its authors: betas 0.95, a new basis every 10 steps, lr about 3e-3.
    from pytorch_optimizer import SOAP

    return SOAP(
        model.parameters(),
        lr=settings.lr,
        weight_decay=ADAMW_WEIGHT_DECAY,
        precondition_frequency=PERIOD,
    )


def _fit(task: Fit, *, lr: float) -> Iterate:
    from pytorch_optimizer import SOAP

    return along_a_cosine(task, SOAP(task.parameters, lr=lr, weight_decay=0.0), lr)


PEERS = {
    "soap": Peer(
        "SOAP",
        Training(ADAMW_LRS, _build, {"color": "#CC79A7", "linestyle": "--"}, period=PERIOD, warmup=PERIOD),
        Pinn(
            tuple({"lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2)),
            _fit,
            {"color": "#CC79A7", "linestyle": ":"},
        ),
        module="pytorch_optimizer",
        source="pip install pytorch_optimizer",
    )
}
