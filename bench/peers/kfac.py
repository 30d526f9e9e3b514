"""K-FAC of the kfac-pytorch package: a preconditioner in front of SGD."""

import re
from typing import Any

import torch
from torch import nn

from bench.peers.base import MOMENTUM, SGD_LRS, SGD_WEIGHT_DECAY, Peer, Settings, Training

PERIOD = 10
DAMPING = 0.003
# A factor of this order takes longer to decompose than an epoch of everything else.
LARGEST_FACTOR = 8192


class Preconditioned:
    """Kronecker-factored preconditioning, then SGD with momentum.

    Source: the package's CIFAR-10 example: factors every step with decay 0.95, new eigenvectors every 10,
    damping 0.003, KL clip 0.001; its language-model example leaves embeddings and the decoder's head out.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        from kfac.preconditioner import KFACPreconditioner

        # It takes views of the gradients that only this memory format has.
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self._sgd = torch.optim.SGD(
            model.parameters(), lr=settings.lr, momentum=MOMENTUM, weight_decay=SGD_WEIGHT_DECAY
        )
        self.param_groups = self._sgd.param_groups
        too_large = [
            f"^{re.escape(name)}$"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and max(module.weight.shape) > LARGEST_FACTOR
        ]
        self._preconditioner = KFACPreconditioner(
            model,
            factor_update_steps=1,
            inv_update_steps=PERIOD,
            damping=settings.damping or DAMPING,
            factor_decay=0.95,
            kl_clip=0.001,
            lr=lambda _: self._sgd.param_groups[0]["lr"],
            skip_layers=too_large,
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._sgd.zero_grad()

    def step(self) -> None:
        """Precondition the gradients and step along them."""
        self._preconditioner.step()
        self._sgd.step()

    def state_dict(self) -> dict[str, Any]:
        """Return both states; eigenvectors are not among them, the package computes them anew when loaded."""
        return {"sgd": self._sgd.state_dict(), "kfac": self._preconditioner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        self._sgd.load_state_dict(state_dict["sgd"])
        self._preconditioner.load_state_dict(state_dict["kfac"])
        self.param_groups = self._sgd.param_groups


PEERS = {
    "kfac": Peer(
        "K-FAC",
        Training(
            SGD_LRS,
            Preconditioned,
            {"color": "#7A3EB1", "linestyle": ":"},
            damping=DAMPING,
            period=PERIOD,
            warmup=PERIOD,
        ),
        module="kfac",
        source="github.com/gpauloski/kfac-pytorch",
    )
}
