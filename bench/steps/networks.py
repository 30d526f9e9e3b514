"""The networks whose steps are timed: two small ones for a CPU thread, and those of the GPU figures."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.images import ResNet18
from bench.models.transformer import EncoderDecoder, LanguageModel

Batch = tuple[Tensor, ...]
"""The model's inputs, then the targets."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A model, one batch for it and its loss; `gate` names the layers to check before timing."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    gate: tuple[str, ...]
    autocast: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    def build(self, device: torch.device) -> nn.Module:
        """Return the model with its weights of seed 0."""
        torch.manual_seed(0)
        model = self.model().to(device)
        return model.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def draw(self, device: torch.device) -> Batch:
        """Return the batch of seed 0."""
        torch.manual_seed(0)
        return tuple(
            x.to(device, memory_format=self.memory_format) if x.ndim == 4 else x.to(device)
            for x in self.batch()
        )

    def objective(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Return the loss of one batch, under autocast if the network asks for it."""
        *inputs, targets = batch
        with torch.autocast(targets.device.type, self.autocast, enabled=self.autocast is not None):
            return self.loss(model(*inputs), targets)


def _resnet(*, width: int, batch: int, gate: tuple[str, ...]) -> Network:
    return Network(
        name=f"ResNet-18, width {width}, 32 x 32, batch {batch}",
        model=lambda: ResNet18(3, 10, width=width),
        batch=lambda: (torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))),
        loss=F.cross_entropy,
        gate=gate,
    )


def _mixed(network: Network, memory_format: torch.memory_format = torch.contiguous_format) -> Network:
    """Return the network as it is trained on a GPU."""
    name = f"{network.name}, bf16 autocast"
    return dataclasses.replace(network, name=name, autocast=torch.bfloat16, memory_format=memory_format)


def _translation(*, layers: int, dimension: int, batch: int, length: int, vocabulary: int) -> Network:
    def draw() -> Batch:
        return tuple(torch.randint(vocabulary, (batch, length)) for _ in range(3))

    return Network(
        name=f"Transformer {layers}+{layers}, d {dimension}, T {length}, batch {batch}",
        model=lambda: EncoderDecoder(
            vocabulary=vocabulary,
            length=length,
            layers=layers,
            dimension=dimension,
            heads=8,
            hidden=4 * dimension,
        ),
        batch=draw,
        loss=_token_loss,
        gate=("source", "encoder.0.qkv", "decoder.0.cross_kv", f"decoder.{layers - 1}.down", "norm"),
    )


def _token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


_RESNET_GATE = ("conv", "blocks.2.conv1", "blocks.2.shortcut.0", "blocks.7.conv2", "norm", "linear")
RESNET = _resnet(width=16, batch=64, gate=_RESNET_GATE)
TRANSFORMER = Network(
    name="Transformer, 2 layers, d 128, T 32, batch 64",
    model=lambda: LanguageModel(vocabulary=1000, length=32, layers=2, dimension=128, heads=4, hidden=512),
    batch=lambda: (torch.randint(1000, (64, 32)), torch.randint(1000, (64, 32))),
    loss=_token_loss,
    gate=("embedding", "blocks.0.qkv", "blocks.1.down", "norm", "head"),
)

MIXED = {
    "resnet": {
        "small": _mixed(_resnet(width=8, batch=16, gate=_RESNET_GATE), torch.channels_last),
        "gpu": _mixed(_resnet(width=64, batch=128, gate=_RESNET_GATE), torch.channels_last),
    },
    "transformer": {
        "small": _mixed(_translation(layers=1, dimension=64, batch=16, length=10, vocabulary=100)),
        "gpu": _mixed(_translation(layers=6, dimension=512, batch=128, length=30, vocabulary=10_000)),
    },
}
"""By name and size: `gpu` is what is timed on a device, `small` the same in miniature."""
