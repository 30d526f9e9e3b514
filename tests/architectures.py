"""Small networks of the kinds that users bring, each with a batch of four samples."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

N = 4


def floats(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def mlp(*sizes):
    layers = [nn.Linear(i, o) for i, o in pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1]).double()


class UNet(nn.Module):
    """Skip connections, transposed convolutions, activations in place after a convolution."""

    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(6, 1, 1)

    def forward(self, x):
        skip = F.relu_(self.down(x))
        y = self.up(F.relu(self.middle(F.max_pool2d(skip, 2)), inplace=True))
        return self.out(torch.cat([skip, y], 1)).flatten(1)


class SqueezeExcite(nn.Module):
    """Depthwise and pointwise convolutions, gated by channel."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 4, 1, bias=False)
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        y = self.pointwise(self.depthwise(x)).relu_()
        gate = self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head((y * gate).mean((2, 3)))


class Autoencoder(nn.Module):
    """A variational autoencoder; its noise comes with the samples."""

    def __init__(self):
        super().__init__()
        self.encoder, self.mean, self.spread = nn.Linear(5, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 5))

    def forward(self, x, noise):
        hidden = torch.tanh(self.encoder(x))
        mean, spread = self.mean(hidden), self.spread(hidden)
        divergence = (mean.square() + spread.exp() - spread - 1).sum(1, keepdim=True)
        return torch.cat([self.decoder(mean + noise * (spread / 2).exp()) - x, divergence], 1)


class Triplet(nn.Module):
    """One encoder for anchor, positive and negative."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))

    def forward(self, anchor, positive, negative):
        a, p, n = (F.normalize(self.encoder(x)) for x in (anchor, positive, negative))
        return F.softplus((a - p).square().sum(1) - (a - n).square().sum(1)).unsqueeze(1)


class Translator(nn.Module):
    """Encoder and decoder over one embedding, which also reads out."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.encoder, self.decoder = nn.GRU(4, 4, batch_first=True), nn.GRU(4, 4, batch_first=True)
        self.readout = nn.Linear(4, 9)
        self.readout.weight = self.embedding.weight

    def forward(self, source, target):
        _, state = self.encoder(self.embedding(source))
        return self.readout(self.decoder(self.embedding(target), state)[0]).mean(1)


class Experts(nn.Module):
    """Every sample goes to one of two experts."""

    def __init__(self):
        super().__init__()
        self.router, self.head = nn.Linear(4, 2), nn.Linear(5, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 5) for _ in range(2))

    def forward(self, x, route):
        gate, y = self.router(x).softmax(1), x.new_zeros(len(x), 5)
        for k, expert in enumerate(self.experts):
            chosen = (route == k).nonzero().flatten()
            y = y.index_copy(0, chosen, gate[chosen, k : k + 1] * expert(x[chosen]))
        return self.head(torch.tanh(y))


class DeepSet(nn.Module):
    """Elements of a set are positions; so are the points on the rays of a radiance field."""

    def __init__(self):
        super().__init__()
        self.element = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        pooled = self.element(x)
        while pooled.ndim > 2:
            pooled = pooled.mean(1)
        return self.head(pooled)


class ConvLSTM(nn.Module):
    """A convolution over images and state, at every time."""

    def __init__(self):
        super().__init__()
        self.gates, self.head = nn.Conv2d(4, 12, 3, padding=1), nn.Linear(3, 3)

    def forward(self, x):
        h = c = x.new_zeros(len(x), 3, *x.shape[3:])
        for t in range(x.shape[1]):
            i, f, o, g = self.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * torch.tanh(g)
            h = o.sigmoid() * torch.tanh(c)
        return self.head(h.mean((2, 3)))


class Highway(nn.Module):
    """Gated layers, one of them run again in backward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2))

    def block(self, x, k):
        gate = self.layers[k][0](x).sigmoid()
        return gate * torch.tanh(self.layers[k][1](x)) + (1 - gate) * x

    def forward(self, x):
        return checkpoint(self.block, self.block(x, 0), 1, use_reentrant=False)


class Normed(nn.Module):
    """Weights computed from other parameters before every forward."""

    def __init__(self):
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv1d(2, 3, 3))
        self.second = parametrizations.spectral_norm(nn.Linear(6, 5))
        self.third = parametrizations.orthogonal(nn.Linear(5, 5))
        self.head = nn.Linear(5, 3)

    def train(self, mode=True):
        super().train(mode)
        self.second.parametrizations.eval()  # its vectors stay as they are
        return self

    def forward(self, x):
        return self.head(torch.tanh(self.third(torch.tanh(self.second(self.first(x).flatten(1))))))


class Adapted(nn.Module):
    """A frozen layer with a trained correction of low rank."""

    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(5, 6).requires_grad_(False), nn.Linear(6, 3)
        self.a, self.b = nn.Linear(5, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.base(x) + self.b(self.a(x))))


class Pair(nn.Module):
    """Two inputs to one module, and a slope that is learned."""

    def __init__(self):
        super().__init__()
        self.mix, self.slope, self.head = nn.Bilinear(3, 2, 4), nn.PReLU(4), nn.Linear(4, 3)

    def forward(self, *inputs):
        return self.head(self.slope(self.mix(*inputs)))


class Bag(nn.Module):
    """A bag of words for each sample."""

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(8, 4, mode="mean"), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.bag(x)))


class Straight(torch.autograd.Function):
    """Rounds; its gradient goes straight through."""

    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, e):
        return e


class QuantizedLinear(nn.Linear):
    """A linear layer that computes with rounded weights."""

    def forward(self, x):
        return F.linear(Straight.apply(x), Straight.apply(self.weight), self.bias)


class Raw(nn.Module):
    """Parameters in lists, dictionaries and of its own, between layers."""

    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
        self.named = nn.ParameterDict({"scale": nn.Parameter(torch.randn(4))})
        self.first, self.head, self.shift = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.head(
            torch.tanh(self.first(x) * self.list[0] + self.list[1]) * self.named["scale"] + self.shift
        )


@dataclass
class Output:
    """What a model may return."""

    logits: Tensor
    hidden: Tensor


class Structured(nn.Module):
    """Returns a dataclass, and a dictionary from within."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def encode(self, batch):
        return {"hidden": torch.tanh(self.first(batch["x"]))}

    def answer(self, batch):
        hidden = self.encode(batch)["hidden"]
        return Output(self.head(hidden), hidden)

    def forward(self, x):
        return self.answer({"x": x}).logits


class MultiTask(nn.Module):
    """One trunk and two heads, one of which takes a list of tensors."""

    def __init__(self):
        super().__init__()
        self.trunk, self.first = nn.Linear(4, 5), nn.Linear(5, 3)
        self.second = Joined()

    def forward(self, x):
        y = torch.tanh(self.trunk(x))
        return torch.cat([self.first(y), self.second([y, x])["y"]], 1)


class Joined(nn.Module):
    """Takes a list of tensors, returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(4, 2))

    def forward(self, parts):
        return {"y": torch.tanh(parts[0] @ self.a) * (parts[1] @ self.b)}


class Spectral(nn.Module):
    """A learned filter in the frequency domain: complex parameters."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, dtype=torch.complex128))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=x.shape[-1])


class Filtered(nn.Module):
    """A spectral layer between linear ones."""

    def __init__(self):
        super().__init__()
        self.first, self.spectral, self.head = nn.Linear(4, 4), Spectral(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.spectral(self.first(x))))
