"""Weighted gradient of an embedding: scaled gradients are summed over the positions of each id."""

from torch import Tensor

from .ids import check_ids
from .products import accumulation_dtype
from .scaling import scaled


def combine_embedding(
    ids: Tensor, e: Tensor, s: Tensor, num_embeddings: int, padding_idx: int | None
) -> Tensor:
    """Return the sums of s_n e_nt over the positions of each id."""
    if ids.numel():
        check_ids(ids, num_embeddings)
    dtype = accumulation_dtype(e.dtype)
    weight = e.new_zeros((num_embeddings, e.shape[-1]), dtype=dtype)
    rows = scaled(e, s, dtype)
    if padding_idx is not None:
        rows.masked_fill_((ids == padding_idx).unsqueeze(-1), 0)
    return weight.index_add_(0, ids.flatten(), rows.flatten(0, -2)).to(e.dtype)
