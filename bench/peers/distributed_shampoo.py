"""Meta's Distributed Shampoo, on one device."""

import torch
from torch import nn

from bench.peers.base import MOMENTUM, SGD_LRS, SGD_WEIGHT_DECAY, Peer, Settings, Training, Update

PERIOD = 100


def _build(model: nn.Module, settings: Settings) -> Update:
    # Example 1 of its README, "SGD with momentum": grafted onto SGD, refreshed every 100 steps.
    import distributed_shampoo as library
    from distributed_shampoo.shampoo_types import ClassicMomentumConfig

    # It takes views of the weights that only this memory format has.
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return library.DistributedShampoo(
        model.parameters(),
        lr=settings.lr,
        betas=(0.0, 0.999),
        epsilon=1e-12,
        weight_decay=SGD_WEIGHT_DECAY,
        max_preconditioner_dim=8192,
        precondition_frequency=PERIOD,
        grafting_config=library.SGDPreconditionerConfig(),
        # As in example 6: matrices stay matrices, where small ones would become vectors with one factor of
        # order up to max_preconditioner_dim, minutes a step here.
        distributed_config=library.SingleDeviceDistributedConfig(target_parameter_dimensionality=2),
        iterate_averaging_config=ClassicMomentumConfig(momentum=MOMENTUM),
    )


PEERS = {
    "distributed-shampoo": Peer(
        "Distributed Shampoo",
        Training(
            SGD_LRS,
            _build,
            {"color": "#999999", "linestyle": "--"},
            period=PERIOD,
            warmup=PERIOD,
            resumes=False,
        ),
        module="distributed_shampoo",
        source="github.com/facebookresearch/optimizers, Python 3.12",
    )
}
