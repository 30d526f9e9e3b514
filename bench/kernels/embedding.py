"""Cases of embeddings."""

from collections.abc import Iterator

import torch
from torch import Tensor

import fngd_kernels as fk
from bench.kernels import plain
from bench.kernels.case import Case, Contender, Inputs, Setting
from bench.kernels.roofline import Work
from bench.kernels.shapes import Embedding


def embedding_cases(setting: Setting, layer: Embedding) -> Iterator[Case]:
    """Yield the Gram matrix and the weighted gradient."""
    n, t, v, d = setting.batch, layer.positions, layer.num_embeddings, layer.dim

    def inputs() -> tuple[Tensor, ...]:
        # Zipf's law, as words have: id v comes about as often as 1 / (v + 1).
        ids = (v + 1) ** torch.rand(n, t, dtype=torch.float64, device=setting.device)
        return ids.long().sub_(1).clamp_(0, v - 1), setting.random(n, t, d)

    moved = n * t * (d * setting.dtype.itemsize + 8)
    yield _gram(setting, layer, inputs, moved + 4 * n * n)
    yield _combine(setting, layer, inputs, moved + v * d * setting.dtype.itemsize)


def _gram(setting: Setting, layer: Embedding, inputs: Inputs, moved: int) -> Case:
    n, t = setting.batch, layer.positions
    work = Work(((n * n // 2 * t * t * layer.dim, setting.arithmetic),), moved)
    contenders = {
        "fngd": Contender(lambda ids, e: fk.gram_embedding(ids, e), work),
        "plain pairs": Contender(plain.gram_embedding, work, "plain"),
    }
    if setting.fused:
        from fngd_kernels.backends.triton.gram_embedding import gram_embedding

        contenders["fused"] = Contender(lambda ids, e: gram_embedding(ids, e, None), work)
    return setting.case("gram_embedding", layer, inputs, plain.gram_embedding, contenders)


def _combine(setting: Setting, layer: Embedding, inputs: Inputs, moved: int) -> Case:
    v, work = layer.num_embeddings, Work((), moved)

    def index_add(ids: Tensor, e: Tensor, s: Tensor) -> Tensor:
        return plain.combine_embedding(ids, e, s, v)

    contenders = {
        "fngd": Contender(lambda ids, e, s: fk.combine_embedding(ids, e, s, v), work),
        "plain index_add": Contender(index_add, work, "plain"),
        "plain unweighted": Contender(
            lambda ids, e, s: plain.unweighted_embedding(ids, e, v), work, "unweighted"
        ),
    }
    if setting.fused:
        from fngd_kernels.backends.triton.combine_embedding import combine_embedding

        contenders["fused"] = Contender(lambda ids, e, s: combine_embedding(ids, e, s, v, None), work)
    return setting.case(
        "combine_embedding", layer, lambda: (*inputs(), setting.coefficients()), index_add, contenders
    )
