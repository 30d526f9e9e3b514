"""The Transformer for translation: with masks for padding and with dropout."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.transformer import sinusoids

LONGEST = 256


class Translator(nn.Module):
    """Pre-norm encoder-decoder over a shared vocabulary, with fixed sinusoidal positions.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3; normalised before each sublayer.
    Embeddings and the output layer are not tied: each has its own coefficients.
    """

    positions: Tensor

    def __init__(
        self,
        *,
        vocabulary: int,
        padding: int,
        layers: int,
        dimension: int,
        heads: int,
        hidden: int,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.scale = math.sqrt(dimension)
        self.source = nn.Embedding(vocabulary, dimension, padding_idx=padding)
        self.target = nn.Embedding(vocabulary, dimension, padding_idx=padding)
        for embedding in (self.source, self.target):
            nn.init.normal_(embedding.weight, std=dimension**-0.5)
        self.register_buffer("positions", sinusoids(LONGEST, dimension))
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(Layer(dimension, heads, hidden, dropout) for _ in range(layers))
        self.memory_norm = nn.LayerNorm(dimension)
        self.decoder = nn.ModuleList(DecoderLayer(dimension, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dimension)
        self.head = nn.Linear(dimension, vocabulary)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits (N,T,vocabulary) of the token after each position of the target."""
        return self.head(self.decode(self.encode(source), source, target))

    def encode(self, source: Tensor) -> Tensor:
        """Return (N,S,D) of ids (N,S)."""
        x = self._embed(self.source, source)
        for layer in self.encoder:
            x = layer(x, mask=self._mask(source))
        return self.memory_norm(x)

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Return what the head reads (N,T,D): encoded source (N,S,D), its ids (N,S), target ids (N,T)."""
        x = self._embed(self.target, target)
        for layer in self.decoder:
            x = layer(x, memory, memory_mask=self._mask(source))
        return self.norm(x)

    def _embed(self, embedding: nn.Module, ids: Tensor) -> Tensor:
        return self.dropout(embedding(ids) * self.scale + self.positions[: ids.shape[1]])

    def _mask(self, ids: Tensor) -> Tensor:
        """Return (N,1,1,S) of ids (N,S): which keys may be attended to."""
        return (ids != self.padding)[:, None, None]


class Attention(nn.Module):
    """Multi-head attention of linear layers around torch's kernel."""

    def __init__(self, dimension: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dimension, dimension)
        self.kv = nn.Linear(dimension, 2 * dimension)
        self.out = nn.Linear(dimension, dimension)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Return (N,T,D) of queries over `memory` (N,S,D); without a mask no position sees those after it."""
        k, v = self.kv(memory).chunk(2, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q(x), k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each on the normalised sum of what came before."""

    def __init__(self, dimension: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dimension)
        self.attention = Attention(dimension, heads)
        self.forward_norm = nn.LayerNorm(dimension)
        self.up = nn.Linear(dimension, hidden)
        self.down = nn.Linear(hidden, dimension)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (N,T,D) of (N,T,D)."""
        return self.feed_forward(self.attend(x, mask))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return x and what self-attention adds."""
        normed = self.attention_norm(x)
        return x + self.dropout(self.attention(normed, normed, mask))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return x and what the feed-forward network adds."""
        return x + self.dropout(self.down(F.relu(self.up(self.forward_norm(x)))))


class DecoderLayer(Layer):
    """A causal layer with attention to the encoder's output after its own."""

    def __init__(self, dimension: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__(dimension, heads, hidden, dropout)
        self.cross_norm = nn.LayerNorm(dimension)
        self.cross = Attention(dimension, heads)

    def forward(self, x: Tensor, memory: Tensor, *, memory_mask: Tensor) -> Tensor:  # type: ignore[override]
        """Return (N,T,D) of (N,T,D) with the encoder's output (N,S,D)."""
        x = self.attend(x, None)
        x = x + self.dropout(self.cross(self.cross_norm(x), memory, memory_mask))
        return self.feed_forward(x)
