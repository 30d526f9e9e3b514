"""Inner products of the contributions of an embedding and of a linear layer to a weight that both share."""

import torch
from torch import Tensor


def gram_embedding_linear(ids: Tensor, g: Tensor, a: Tensor, e: Tensor, workspace: int) -> Tensor:
    """Return X_ij = sum_{t,u} E_ju[ids_it] <g_it, A_ju>, in chunks of i and j that fit the workspace."""
    dtype = torch.promote_types(torch.promote_types(g.dtype, e.dtype), torch.float32)
    (samples, t), u = ids.shape, e.shape[1]
    x = g.new_empty((samples, samples), dtype=dtype)
    chunk = max(1, int((workspace / max(1, 2 * dtype.itemsize * t * u)) ** 0.5))
    for i in range(0, samples, chunk):
        rows = slice(i, i + chunk)
        g_rows, ids_rows = g[rows].to(dtype).flatten(0, 1), ids[rows].flatten()
        for j in range(0, samples, chunk):
            columns = slice(j, j + chunk)
            inner = a[columns].to(dtype).flatten(0, 1) @ g_rows.T  # (J U, I T)
            inner *= e[columns].flatten(0, 1).index_select(1, ids_rows)
            x[rows, columns] = inner.view(-1, u, len(g_rows) // t, t).sum((1, 3)).T
    return x
