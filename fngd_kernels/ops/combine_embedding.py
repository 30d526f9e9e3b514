"""The weighted gradient of an embedding; properties as in `combine`."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks
from ..arguments import integer
from ..backends.torch.combine_embedding import combine_embedding as torch_combine_embedding
from . import choose, devices
from .registration import call, register

IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, int, int | None], Tensor]] = {
    "torch": torch_combine_embedding,
}
"""By backend."""


def combine_embedding(
    ids: Tensor, e: Tensor, s: Tensor, num_embeddings: int, *, padding_idx: int | None = None
) -> Tensor:
    """Return the weighted gradient of an embedding.

    W_v = sum_n s_n sum_t [ids_nt = v] e_nt, and zero for v = padding_idx

    Source: the natural gradient as a weighted sum, Ou et al. 2024 (arXiv 2403.03473).

    Args:
        ids: (N,) or (N,T) int64 or int32, in [0, num_embeddings). Not checked on a GPU, because the host
            would have to wait for it; there, other ids contribute nothing, and fail on the device if e is
            float64.
        e: (N,D) or (N,T,D) float, gradient at the layer output.
        s: (N,) float, coefficients.
        num_embeddings: Rows of the weight.
        padding_idx: Id that contributes nothing.

    Returns:
        W, (num_embeddings,D).

    Raises:
        ValueError: Shapes or devices do not fit, or a number is out of range.
        TypeError: Dtypes do not fit, or an argument has the wrong type.
    """
    checks.check_embedding(ids, e)
    checks.check_coefficients(s, "e", e)
    num_embeddings = integer("num_embeddings", num_embeddings, 1)
    padding_idx = checks.check_padding_idx(padding_idx, ids)
    return call(torch.ops.fngd.combine_embedding.default, ids, e, s, num_embeddings, padding_idx)


def _combine_embedding(
    ids: Tensor, e: Tensor, s: Tensor, num_embeddings: int, padding_idx: int | None
) -> Tensor:
    run = IMPLEMENTATIONS[choose.combine_embedding(devices.triton_serves(e))]
    return run(ids, e, s, num_embeddings, padding_idx)


def _fake(ids: Tensor, e: Tensor, s: Tensor, num_embeddings: int, padding_idx: int | None) -> Tensor:
    return e.new_empty((num_embeddings, e.shape[-1]))


register(
    "combine_embedding(Tensor ids, Tensor e, Tensor s, int num_embeddings, int? padding_idx) -> Tensor",
    _combine_embedding,
    _fake,
)
