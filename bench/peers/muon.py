"""torch.optim.Muon for hidden weights, AdamW for the rest; on equations both without weight decay."""

from typing import Any

import torch
from torch import Tensor, nn

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
)


class Muon:
    """Muon on hidden weights as matrices, one row per output; AdamW on all other parameters.

    Source: torch.optim.Muon's documentation: two-dimensional hidden weights only, biases and embeddings by
    AdamW; adjust_lr_fn="match_rms_adamw" takes AdamW's learning rate and weight decay over as they are.
    Keller Jordan, "Muon", 2024: first and last layer by AdamW, convolutions as matrices.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, weight_decay: float = ADAMW_WEIGHT_DECAY
    ) -> None:
        hidden = hidden_weights(model)
        names = {id(weight) for weight in hidden}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in names]
        # Views share their weight's memory, so that a step on the matrix is a step on the weight.
        self._matrices = [(weight, nn.Parameter(as_matrix(weight.detach()))) for weight in hidden]
        self._adamw = torch.optim.AdamW(rest, lr=settings.lr, weight_decay=weight_decay)
        self._muon = torch.optim.Muon(
            [matrix for _, matrix in self._matrices],
            lr=settings.lr,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.param_groups = [*self._adamw.param_groups, *self._muon.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._adamw.zero_grad()
        for weight, _ in self._matrices:
            weight.grad = None

    def step(self) -> None:
        """Take both steps."""
        for weight, matrix in self._matrices:
            matrix.grad = None if weight.grad is None else as_matrix(weight.grad)
        self._adamw.step()
        self._muon.step()

    def state_dict(self) -> dict[str, Any]:
        """Return both states."""
        return {"adamw": self._adamw.state_dict(), "muon": self._muon.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        self._adamw.load_state_dict(state_dict["adamw"])
        self._muon.load_state_dict(state_dict["muon"])
        self.param_groups = [*self._adamw.param_groups, *self._muon.param_groups]


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all linear layers and convolutions but the first and the last layer."""
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    hidden = [layer for layer in layers[1:-1] if not isinstance(layer, nn.Embedding)]
    return [layer.get_parameter("weight") for layer in hidden]


def as_matrix(weight: Tensor) -> Tensor:
    """Return a view of (O,I,*kernel) as (O,I*kernel), its columns in the order of the memory."""
    if weight.ndim == 2:
        return weight
    if not weight.is_contiguous():
        weight = weight.movedim(1, -1)
    return weight.view(len(weight), -1)


def _fit(task: Fit, *, lr: float) -> Iterate:
    return along_a_cosine(task, Muon(task.network, Settings(lr=lr), weight_decay=0.0), lr)


PEERS = {
    "muon": Peer(
        "Muon",
        Training(ADAMW_LRS, Muon, {"color": "#009E73", "linestyle": "-"}),
        Pinn(
            tuple({"lr": lr} for lr in (3e-3, 1e-2, 3e-2, 1e-1)),
            _fit,
            {"color": "#009E73", "linestyle": "-"},
        ),
    )
}
