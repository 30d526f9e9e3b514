"""Diagonals of the Gram matrices: the operators behind `diag=True`."""

from collections.abc import Sequence

from torch import Tensor

from ..backends.torch import squared_norms as library
from ..backends.torch.ids import check_ids
from ..backends.torch.products import accumulation_dtype
from .registration import LIBRARY, register

LIBRARY.define("gram_diag(Tensor a, Tensor e, bool bias, int workspace, str? precision=None) -> Tensor")
LIBRARY.define(
    "gram_conv_diag(Tensor x, Tensor e, int[] weight_shape, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool bias, int workspace, str? precision=None) -> Tensor"
)
LIBRARY.define(
    "gram_embedding_diag(Tensor ids, Tensor e, int? padding_idx, int workspace, str? precision=None) "
    "-> Tensor"
)
LIBRARY.define("gram_rows_diag(Tensor g, int workspace) -> Tensor")


def library_gram_diag(
    a: Tensor, e: Tensor, bias: bool, workspace: int, precision: str | None = None
) -> Tensor:
    """Return the diagonal of K of a linear layer, on library products."""
    if not e.numel():
        return _empty(e).zero_()
    if a.ndim == 2:
        a, e = a.unsqueeze(1), e.unsqueeze(1)
    return library.linear_norms(a, e, bias, workspace)


def library_gram_conv_diag(
    x: Tensor,
    e: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    workspace: int,
    precision: str | None = None,
) -> Tensor:
    """Return the diagonal of K of a convolution, on library products."""
    if not x.shape[0]:
        return _empty(x)
    return library.conv_norms(x, e, weight_shape, stride, padding, dilation, groups, bias, workspace)


def library_gram_embedding_diag(
    ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int, precision: str | None = None
) -> Tensor:
    """Return the diagonal of K of an embedding, on library products."""
    if not e.numel():
        return _empty(e).zero_()
    check_ids(ids)
    if ids.ndim == 1:
        ids, e = ids.unsqueeze(1), e.unsqueeze(1)
    return library.embedding_norms(ids, e, padding_idx, workspace)


def library_gram_rows_diag(g: Tensor, workspace: int) -> Tensor:
    """Return the diagonal of K of contributions already formed, on library products."""
    return library.rows_norms(g.reshape(len(g), -1)) if g.numel() else _empty(g).zero_()


def _empty(a: Tensor, *_: object) -> Tensor:
    return a.new_empty(a.shape[0], dtype=accumulation_dtype(a.dtype))


def _fake_embedding(
    ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int, precision: str | None = None
) -> Tensor:
    return _empty(e)


register("gram_diag", library_gram_diag, _empty)
register("gram_conv_diag", library_gram_conv_diag, _empty)
register("gram_embedding_diag", library_gram_embedding_diag, _fake_embedding)
register("gram_rows_diag", library_gram_rows_diag, _empty)
