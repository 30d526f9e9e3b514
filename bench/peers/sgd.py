"""torch's SGD with momentum."""

import torch
from torch import nn

from bench.peers.base import MOMENTUM, SGD_LRS, SGD_WEIGHT_DECAY, Peer, Settings, Training, Update


def _build(model: nn.Module, settings: Settings) -> Update:
    return torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=MOMENTUM, weight_decay=SGD_WEIGHT_DECAY
    )


PEERS = {"sgd": Peer("SGD", Training(SGD_LRS, _build, {"color": "#000000", "linestyle": "-"}))}
