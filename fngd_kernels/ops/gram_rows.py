"""The Gram matrix of contributions that are already formed, and its diagonal; properties as in `gram`."""

from math import prod

import torch
from torch import Tensor

from .. import checks
from ..arguments import flag
from ..backends.torch.gram_rows import gram_rows as gram_rows_chunked
from ..backends.torch.squared_norms import rows_norms
from ..sketch import ROWS, Sketch, as_sketch
from .gram import empty_diagonal, empty_gram
from .registration import call, register
from .sketch import sketched


def gram_rows(
    g: Tensor,
    *,
    diag: bool = False,
    workspace: int | None = None,
    sketch: int | Sketch | None = None,
) -> Tensor:
    """Return the Gram matrix of contributions that are already formed.

    K_ij = <g_i, g_j>

    Source: the Gram form of the empirical Fisher, Ou et al. 2024 (arXiv 2403.03473).

    Args:
        g: (N,...) float, contribution of each sample.
        diag: Whether to return only the diagonal, the squared norms ||C_n||^2.
        workspace: Upper bound of scratch memory in bytes, by default 64 MiB.
        sketch: A Sketch, or its size r alone, to compress the columns of g to r^2; None for the exact K.

    Returns:
        K, (N,N) float32 or float64; with diag (N,).

    Raises:
        ValueError: g has no dimension of samples, or a number is out of range.
        TypeError: g is not floating, or an argument has the wrong type.
    """
    checks.check_rows(g)
    flag("diag", diag)
    workspace = checks.workspace_bytes(workspace)
    if (sketch := as_sketch(sketch)) is not None:
        g = sketched(g.reshape(len(g), prod(g.shape[1:])), ROWS, sketch)
    op = torch.ops.fngd.gram_rows_diag if diag else torch.ops.fngd.gram_rows
    return call(op.default, g, workspace)


def _gram_rows(g: Tensor, workspace: int) -> Tensor:
    if not g.numel():
        return empty_gram(g).zero_()
    return gram_rows_chunked(g.reshape(len(g), -1), workspace)


def _gram_rows_diag(g: Tensor, workspace: int) -> Tensor:
    return rows_norms(g.reshape(len(g), -1)) if g.numel() else empty_diagonal(g).zero_()


register("gram_rows(Tensor g, int workspace) -> Tensor", _gram_rows, empty_gram)
register("gram_rows_diag(Tensor g, int workspace) -> Tensor", _gram_rows_diag, empty_diagonal)
