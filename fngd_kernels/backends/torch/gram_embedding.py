"""Gram matrix of an embedding: only positions with the same id are multiplied."""

import torch
from torch import Tensor

from .costs import embedding_chunk
from .products import accumulation_dtype, mirror


def gram_embedding(ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int) -> Tensor:
    """Return K_ij = sum_{t,u} [ids_it = ids_ju] <e_it, e_ju> for ids (N,T) and e (N,T,D).

    First, the positions of a sample that have one id are summed to a row. Rows are sorted by (id, sample),
    and each is multiplied with the rows 1, 2, ... places after it as long as their id is the same. The cost
    is proportional to the number of pairs with equal ids, not to (NT)^2.
    """
    n, t, dim = e.shape
    dtype = accumulation_dtype(e.dtype)
    k = e.new_zeros((n, n), dtype=dtype)
    samples = torch.arange(n, dtype=torch.int64, device=ids.device)
    padding = torch.zeros_like(ids, dtype=torch.bool) if padding_idx is None else ids == padding_idx
    low, high = (int(bound) for bound in ids.masked_fill(padding, 0).aminmax())
    largest = torch.iinfo(torch.int64).max // n - 1
    if low < 0 or high > largest:
        raise ValueError(f"ids: expected 0 to {largest}, got {low} to {high}")
    keys = (ids.long() * n + samples[:, None]).masked_fill(padding, -1)
    keys, row_of = keys.flatten().unique(return_inverse=True)
    # All padding is in one row, the first.
    first = int(keys[0] < 0)
    id_of, sample_of = keys[first:] // n, keys[first:] % n

    chunk = embedding_chunk(n * t, dim, e.itemsize, workspace)
    for columns in e.flatten(0, 1).split(chunk, 1):
        sums = columns.new_zeros((len(keys), columns.shape[1]), dtype=dtype)
        sums = sums.index_add_(0, row_of, columns.to(dtype))[first:]
        left = torch.arange(len(sums), dtype=torch.int64, device=ids.device)
        right = left
        while len(left):
            products = sums.index_select(0, left).mul_(sums.index_select(0, right)).sum(1)
            k.view(-1).index_add_(0, sample_of[left] * n + sample_of[right], products)
            # Only the last row has no row after it.
            left, right = left[right < len(sums) - 1], right[right < len(sums) - 1] + 1
            same = id_of[left] == id_of[right]
            left, right = left[same], right[same]
    return mirror(k)
