"""The two reference networks whose steps are timed: a small ResNet-18 and a small Transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import ResNet18

BATCH = 64


@dataclass(frozen=True)
class Network:
    """A model, one batch for it and its loss; `gate` names the layers to check before timing."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    gate: tuple[str, ...]


class Transformer(nn.Module):
    """Causal pre-norm language model; its positions are fixed sinusoids, which have no parameters."""

    def __init__(
        self, *, vocabulary: int, length: int, layers: int, dimension: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dimension)
        self.register_buffer("positions", sinusoids(length, dimension))
        self.blocks = nn.Sequential(*(Block(dimension, heads, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(dimension)
        self.head = nn.Linear(dimension, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N,T) token ids -> (N,T,vocabulary) logits."""
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.positions)))


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each on the normalised sum of what came before."""

    def __init__(self, dimension: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dimension)
        self.qkv = nn.Linear(dimension, 3 * dimension)
        self.out = nn.Linear(dimension, dimension)
        self.norm2 = nn.LayerNorm(dimension)
        self.up = nn.Linear(dimension, hidden)
        self.down = nn.Linear(hidden, dimension)

    def forward(self, x: Tensor) -> Tensor:
        """(N,T,D) -> (N,T,D)."""
        x = x + self.out(self.attend(self.qkv(self.norm1(x))))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, qkv: Tensor) -> Tensor:
        """(N,T,3D) queries, keys and values -> (N,T,D)."""
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def sinusoids(length: int, dimension: int) -> Tensor:
    """Position codes (T,D).

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.5.
    """
    frequencies = torch.exp(torch.arange(0, dimension, 2) * (-math.log(10_000) / dimension))
    angles = torch.arange(length).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _images() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))


def _tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(1000, (BATCH, 32)), torch.randint(1000, (BATCH, 32))


def _token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


RESNET = Network(
    name="ResNet-18, width 16, 32 x 32, batch 64",
    model=lambda: ResNet18(3, 10, width=16),
    batch=_images,
    loss=F.cross_entropy,
    gate=("conv", "blocks.2.conv1", "blocks.2.shortcut.0", "blocks.7.conv2", "norm", "linear"),
)
TRANSFORMER = Network(
    name="Transformer, 2 layers, d 128, T 32, batch 64",
    model=lambda: Transformer(vocabulary=1000, length=32, layers=2, dimension=128, heads=4, hidden=512),
    batch=_tokens,
    loss=_token_loss,
    gate=("embedding", "blocks.0.qkv", "blocks.1.down", "norm", "head"),
)
