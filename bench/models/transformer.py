"""Transformers of linear layers: a causal language model and an encoder-decoder."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LanguageModel(nn.Module):
    """Causal pre-norm language model; its positions are fixed sinusoids, which have no parameters."""

    positions: Tensor

    def __init__(
        self, *, vocabulary: int, length: int, layers: int, dimension: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dimension)
        self.register_buffer("positions", sinusoids(length, dimension))
        self.blocks = nn.Sequential(*(Block(dimension, heads, hidden, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(dimension)
        self.head = nn.Linear(dimension, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (N,T,vocabulary) of token ids (N,T)."""
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.positions)))


class EncoderDecoder(nn.Module):
    """Pre-norm translation model with as many encoder as decoder layers and fixed sinusoidal positions.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3; normalised before each sublayer.
    """

    positions: Tensor

    def __init__(
        self, *, vocabulary: int, length: int, layers: int, dimension: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.source = nn.Embedding(vocabulary, dimension)
        self.target = nn.Embedding(vocabulary, dimension)
        self.register_buffer("positions", sinusoids(length, dimension))
        self.encoder = nn.Sequential(*(Block(dimension, heads, hidden, causal=False) for _ in range(layers)))
        self.memory_norm = nn.LayerNorm(dimension)
        self.decoder = nn.ModuleList(DecoderBlock(dimension, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(dimension)
        self.head = nn.Linear(dimension, vocabulary)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits (N,T,vocabulary) of source (N,S) and target (N,T) token ids."""
        memory = self.encoder(self.source(source) + self.positions[: source.shape[1]])
        memory = self.memory_norm(memory)
        x = self.target(target) + self.positions[: target.shape[1]]
        for block in self.decoder:
            x = block(x, memory)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each on the normalised sum of what came before."""

    def __init__(self, dimension: int, heads: int, hidden: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(dimension)
        self.qkv = nn.Linear(dimension, 3 * dimension)
        self.out = nn.Linear(dimension, dimension)
        self.norm2 = nn.LayerNorm(dimension)
        self.up = nn.Linear(dimension, hidden)
        self.down = nn.Linear(hidden, dimension)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N,T,D) of (N,T,D)."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=2)
        x = x + self.out(attend(q, k, v, self.heads, causal=self.causal))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class DecoderBlock(Block):
    """A causal block with attention to the encoder's output after its own."""

    def __init__(self, dimension: int, heads: int, hidden: int) -> None:
        super().__init__(dimension, heads, hidden, causal=True)
        self.cross_norm = nn.LayerNorm(dimension)
        self.cross_q = nn.Linear(dimension, dimension)
        self.cross_kv = nn.Linear(dimension, 2 * dimension)
        self.cross_out = nn.Linear(dimension, dimension)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        """Return (N,T,D) of (N,T,D) with the encoder's output (N,S,D)."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=2)
        x = x + self.out(attend(q, k, v, self.heads, causal=True))
        k, v = self.cross_kv(memory).chunk(2, dim=2)
        x = x + self.cross_out(attend(self.cross_q(self.cross_norm(x)), k, v, self.heads, causal=False))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool) -> Tensor:
    """Return multi-head attention (N,T,D) of queries (N,T,D) over keys and values (N,S,D)."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def sinusoids(length: int, dimension: int) -> Tensor:
    """Return position codes (T,D).

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.5.
    """
    frequencies = torch.exp(torch.arange(0, dimension, 2) * (-math.log(10_000) / dimension))
    angles = torch.arange(length).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
