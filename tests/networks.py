"""Small networks that exercise one kind of layer each, and their per-sample gradients from autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sequence(nn.Module):
    """Tokens (N, T) to logits (N, 3) through an embedding, layer norm and linear layers over positions."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.norm(self.embedding(x))))).mean(1)


class Reused(nn.Module):
    """One linear layer and one convolution, each called twice; the convolution on images of two sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.conv(x))
        x = F.avg_pool2d(x, 2)
        x = torch.tanh(self.conv(x))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(torch.tanh(self.linear(torch.tanh(self.linear(x)))))


class Transformer(nn.Module):
    """torch's encoder and decoder on (N, T, 4): attention of a sequence to itself and to another one."""

    def __init__(self, batch_first):
        super().__init__()
        options = {"dim_feedforward": 5, "dropout": 0.0, "batch_first": batch_first}
        encoder = nn.TransformerEncoderLayer(4, 2, norm_first=True, **options)
        decoder = nn.TransformerDecoderLayer(4, 2, **options)
        self.encoder = nn.TransformerEncoder(encoder, 1, nn.LayerNorm(4), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, 1)
        self.head = nn.Linear(4, 3)
        self.batch_first = batch_first

    def forward(self, x):
        source, target = x if self.batch_first else x.transpose(0, 1), x[:, :2].sin()
        target = target if self.batch_first else target.transpose(0, 1)
        y = self.decoder(target, self.encoder(source))
        return self.head(y.mean(1 if self.batch_first else 0))


def _conv(module, positions):
    return nn.Sequential(module, nn.Tanh(), nn.Flatten(), nn.Linear(module.out_channels * positions, 3))


def _images(*shape):
    return lambda n: torch.randn(n, *shape)


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), _images(6)),
    "no-bias": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), _images(6)),
    "4-d-linear": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)),
        _images(2, 3, 4),
    ),
    "sequence": (Sequence, lambda n: torch.randint(0, 7, (n, 6))),
    "conv1d": (lambda: _conv(nn.Conv1d(3, 4, 3, stride=2, dilation=2, padding=1), 4), _images(3, 10)),
    "conv2d-groups-reflect": (
        lambda: _conv(nn.Conv2d(4, 6, (3, 2), groups=2, padding=(1, 1), padding_mode="reflect"), 30),
        _images(4, 5, 5),
    ),
    "conv2d-same-even-kernel": (lambda: _conv(nn.Conv2d(2, 3, 2, padding="same"), 20), _images(2, 4, 5)),
    "conv2d-same-circular": (
        lambda: _conv(nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), 20),
        _images(2, 4, 5),
    ),
    "conv2d-depthwise-valid": (
        lambda: _conv(nn.Conv2d(3, 6, 3, groups=3, padding="valid", bias=False), 6),
        _images(3, 4, 5),
    ),
    "conv3d": (
        lambda: _conv(nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), 5 * 3 * 4),
        _images(2, 4, 4, 3),
    ),
    "group-norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        _images(2, 5, 5),
    ),
    "rms-norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 3)), _images(6)),
    "reused": (Reused, _images(2, 4, 4)),
    "transformer": (lambda: Transformer(batch_first=True), _images(3, 4)),
    "transformer-time-first": (lambda: Transformer(batch_first=False), _images(3, 4)),
}


def make(name: str, samples: int, dtype=torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """Return (network, inputs, class labels)."""
    build, inputs = NETWORKS[name]
    x = inputs(samples)
    return build().to(dtype), x.to(dtype) if x.is_floating_point() else x, torch.randint(0, 3, (samples,))


def sample_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return {parameter: (N, *shape)}: the gradient of each sample's own loss, one backward a sample."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [
        torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), parameters)
        for n in range(len(x))
    ]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def blocks(model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return {module: (N, D)}: the per-sample gradients of each module's parameters side by side."""
    result: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        result.setdefault(name.rpartition(".")[0], []).append(gradient.flatten(1))
    return {name: torch.cat(parts, dim=1) for name, parts in result.items()}
