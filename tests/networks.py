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


class TiedLinear(nn.Module):
    """Two linear layers with one weight and a bias each; one of them on positions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)).mean(1))))


class LanguageModel(nn.Module):
    """Tokens (N, T) to logits (N, 3) of words, read out by the weight of the embedding."""

    def __init__(self, bias):
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        y = self.embedding(x)
        return self.head(y + torch.tanh(self.mix(y.cumsum(1)))).mean(1)[:, :3].clone()  # FSDP2 warns of views


class TiedConv(nn.Module):
    """Two convolutions with one weight, and two normalisations with one scale."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1, bias=False)
        self.second.weight = self.first.weight
        self.norm, self.norm_again = nn.LayerNorm(4), nn.LayerNorm(4)
        self.norm_again.weight = self.norm.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm_again(torch.tanh(self.second(self.norm(torch.tanh(self.first(x))))))
        return self.head(x.flatten(1))


class Recurrent(nn.Module):
    """A recurrent layer on (N, T, 3), or (T, N, 3), that is read out from its outputs and its last state."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(3, 3), layer, nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        y, state = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(y.mean(1 if self.layer.batch_first else 0)[:, :4] + hidden[-1])


class Scaled(nn.Module):
    """A module of one's own: parameters and no children with any."""

    def __init__(self, features):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(features)), nn.Parameter(torch.randn(features))
        self.activation = nn.Tanh()

    def forward(self, x, *, power):
        return {"y": self.activation(x * self.scale) ** power + self.shift}


class Own(nn.Module):
    """Linear layers around a module of one's own that is called twice, and one with a normed weight."""

    def __init__(self):
        super().__init__()
        self.first, self.scaled = nn.Linear(4, 5), Scaled(5)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5, bias=False))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        y = self.scaled(self.first(x), power=2)["y"]
        return self.head(self.normed(self.scaled(y, power=1)["y"]).mean(1))


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
    "transposed-conv1d": (
        lambda: _conv(nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, dilation=2), 9),
        _images(3, 4),
    ),
    "transposed-conv2d-groups": (
        lambda: _conv(
            nn.ConvTranspose2d(4, 6, (3, 2), (3, 2), groups=2, padding=1, output_padding=(2, 1)), 27
        ),
        _images(4, 3, 2),
    ),
    "transposed-conv3d": (
        lambda: _conv(nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1), bias=False), 3 * 4 * 3),
        _images(2, 2, 2, 2),
    ),
    "tied-linear": (TiedLinear, _images(5, 4)),
    "tied-conv": (TiedConv, _images(2, 4)),
    "language-model": (lambda: LanguageModel(bias=False), lambda n: torch.randint(0, 7, (n, 6))),
    "language-model-bias": (lambda: LanguageModel(bias=True), lambda n: torch.randint(0, 7, (n, 6))),
    "lstm": (lambda: Recurrent(nn.LSTM(3, 4, num_layers=2, batch_first=True)), _images(5, 3)),
    "gru-time-first": (lambda: Recurrent(nn.GRU(3, 4, bidirectional=True)), _images(5, 3)),
    "own": (Own, _images(2, 4)),
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
    """Return {layer: (N, D)}: the per-sample gradients of each layer's parameters side by side."""
    layers, result = layer_names(model), {}
    for name, gradient in gradients.items():
        result.setdefault(layers[name], []).append(gradient.flatten(1))
    return {name: torch.cat(parts, dim=1) for name, parts in result.items()}


def layer_names(model: nn.Module) -> dict[str, str]:
    """Return {parameter: layer}.

    A layer is a module, or several modules that share a parameter, their names joined by "+".
    """
    owners: dict[str, list[str]] = {}
    names = {p: name for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = name.rpartition(".")[0].partition(".parametrizations")[0]
        owners.setdefault(names[parameter], []).append(module)
    joined = {
        module: "+".join(modules) for modules in owners.values() if len(modules) > 1 for module in modules
    }
    return {name: joined.get(modules[0], modules[0]) for name, modules in owners.items()}
