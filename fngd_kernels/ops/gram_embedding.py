"""The Gram matrix of an embedding's contributions, and its diagonal; properties as in `gram`."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks
from ..arguments import flag
from ..backends.torch import gram_embedding_linear as embedding_linear
from ..backends.torch.gram_embedding import gram_embedding as gram_embedding_sorted
from ..backends.torch.ids import check_ids
from ..backends.torch.squared_norms import embedding_norms
from ..sketch import INPUTS, Sketch, as_sketch
from ..workspace import default_workspace
from . import choose, devices
from .gram import empty_diagonal, empty_gram, with_positions
from .registration import call, register
from .sketch import sketched

Implementation = Callable[[Tensor, Tensor, int | None, int, str | None], Tensor]


def _torch_diagonal(
    ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int, precision: str | None
) -> Tensor:
    check_ids(ids)
    return embedding_norms(ids, e, padding_idx, workspace)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "torch": lambda ids, e, padding_idx, workspace, precision: gram_embedding_sorted(
        ids, e, padding_idx, workspace
    ),
}
"""By backend; for ids (N,T) and e (N,T,D)."""

DIAGONALS: dict[str, Implementation] = {"torch": _torch_diagonal}
"""By backend; for ids (N,T) and e (N,T,D)."""


def gram_embedding(
    ids: Tensor,
    e: Tensor,
    *,
    padding_idx: int | None = None,
    diag: bool = False,
    workspace: int | None = None,
    precision: str | None = None,
    sketch: int | Sketch | None = None,
) -> Tensor:
    """Return the Gram matrix of an embedding's contributions.

    K_ij = sum_{t,u} [ids_it = ids_ju] <e_it, e_ju>, over positions whose id is not padding_idx

    Source: the Gram form of the empirical Fisher, Ou et al. 2024 (arXiv 2403.03473).

    Args:
        ids: (N,) or (N,T) int64 or int32, 0 or more and below 2**63 / N. Not checked on a GPU, because the
            host would have to wait for it; there, ids out of range count like all others.
        e: (N,D) or (N,T,D) float, gradient at the layer output.
        padding_idx: Id that contributes nothing.
        diag: Whether to return only the diagonal, the squared norms ||C_n||^2.
        workspace: Upper bound of scratch memory in bytes, by default 64 MiB.
        precision: How float32 is multiplied on a GPU: "ieee", "tf32" or "tf32x3" (default), which is about
            as exact as "ieee" and runs on tensor cores. On a CPU it is always "ieee".
        sketch: A Sketch, or its size alone, to compress the D columns of the contributions;
            None for the exact K.

    Returns:
        K, (N,N) float32 or float64; with diag (N,).

    Raises:
        ValueError: Shapes or devices do not fit, or a number is out of range.
        TypeError: Dtypes do not fit, or an argument has the wrong type.
    """
    checks.check_embedding(ids, e)
    padding_idx = checks.check_padding_idx(padding_idx, ids)
    flag("diag", diag)
    workspace = checks.workspace_bytes(workspace)
    checks.check_precision(precision)
    e = sketched(e, INPUTS, as_sketch(sketch))
    op = torch.ops.fngd.gram_embedding_diag if diag else torch.ops.fngd.gram_embedding
    return call(op.default, ids, e, padding_idx, workspace, precision)


def gram_embedding_linear(
    ids: Tensor, g: Tensor, a: Tensor, e: Tensor, workspace: int | None = None
) -> Tensor:
    """Return inner products of contributions of an embedding and a linear layer with one weight (V, D).

    X_ij = <C_i of the embedding, C_j of the linear layer> = sum_{t,u} E_ju[ids_it] <g_it, A_ju>

    Args:
        ids: (N, T) int, input of the embedding.
        g: (N, T, D) float, gradient at the embedding's output.
        a: (N, U, D) float, input of the linear layer.
        e: (N, U, V) float, gradient at the linear layer's output.
        workspace: Upper bound of two scratch matrices in bytes if those of a single sample fit, by default
            64 MiB.

    Returns:
        X, (N, N) of the common dtype of g and e, at least float32.
    """
    workspace = default_workspace() if workspace is None else workspace
    return embedding_linear.gram_embedding_linear(ids, g, a, e, workspace)


def _gram_embedding(
    ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int, precision: str | None = None
) -> Tensor:
    if not e.numel():
        return empty_gram(e).zero_()
    run = IMPLEMENTATIONS[choose.gram_embedding(devices.triton_serves(e))]
    return run(*with_positions(ids, e), padding_idx, workspace, precision)


def _gram_embedding_diag(
    ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int, precision: str | None = None
) -> Tensor:
    if not e.numel():
        return empty_diagonal(e).zero_()
    run = DIAGONALS[choose.gram_embedding(devices.triton_serves(e))]
    return run(*with_positions(ids, e), padding_idx, workspace, precision)


register(
    "gram_embedding(Tensor ids, Tensor e, int? padding_idx, int workspace, str? precision=None) -> Tensor",
    _gram_embedding,
    lambda ids, e, *_: empty_gram(e),
)
register(
    "gram_embedding_diag(Tensor ids, Tensor e, int? padding_idx, int workspace, str? precision=None) "
    "-> Tensor",
    _gram_embedding_diag,
    lambda ids, e, *_: empty_diagonal(e),
)
