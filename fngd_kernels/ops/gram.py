"""Gram matrices of per-sample contributions C_n to a layer's gradient.

K_ij = <C_i, C_j> is (N,N), float64 for float64 input and float32 otherwise, in which every sum is kept.
K is exactly symmetric, and not differentiable: `fngd_kernels.reference` is. Scratch memory stays under
`workspace` bytes wherever the chunk of one input and one output fits, beside matrices of K's size and the
buffers of the library's matrix product (about 256 KiB for each thread).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cost_model
from ..arguments import flag
from ..backends.torch.gram_conv_explicit import gram_conv_explicit
from ..backends.torch.gram_conv_pairs import gram_conv_pairs
from ..backends.torch.gram_embedding import gram_embedding as gram_embedding_sorted
from ..backends.torch.gram_explicit import gram_explicit
from ..backends.torch.gram_hadamard import gram_hadamard
from ..backends.torch.gram_pairs import gram_pairs
from ..backends.torch.gram_rows import gram_rows as gram_rows_chunked
from ..backends.torch.products import accumulation_dtype
from . import checks, gram_diag  # noqa: F401 - registers the operators of diag=True
from .registration import LIBRARY, call, register

LIBRARY.define("gram(Tensor a, Tensor e, bool bias, int workspace, str? precision=None) -> Tensor")
LIBRARY.define(
    "gram_conv(Tensor x, Tensor e, int[] weight_shape, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool bias, int workspace, str? precision=None) -> Tensor"
)
LIBRARY.define(
    "gram_embedding(Tensor ids, Tensor e, int? padding_idx, int workspace, str? precision=None) -> Tensor"
)
LIBRARY.define("gram_rows(Tensor g, int workspace) -> Tensor")


def gram(
    a: Tensor,
    e: Tensor,
    *,
    bias: bool = False,
    diag: bool = False,
    workspace: int | None = None,
    precision: str | None = None,
) -> Tensor:
    """Return the Gram matrix of a linear layer's contributions.

    K_ij = <E_i^T A_i, E_j^T A_j> + bias <sum_t E_it, sum_t E_jt>

    a: (N,I) or (N,T,I) float, layer input
    e: (N,O) or (N,T,O) float, gradient at the layer output, of a's dtype
    bias: whether the bias belongs to the block (a column of ones on A)
    diag: whether to return the diagonal alone, the squared norms ||C_n||^2
    workspace: upper bound of scratch memory in bytes, by default 64 MiB
    precision: of float32 products on a GPU, "ieee", "tf32" or "tf32x3"; by default what
        torch.set_float32_matmul_precision says. The CPU's are always "ieee"

    Returns: (N,N) float32 or float64, K; with diag (N,)
    Raises: ValueError, TypeError when shapes, devices or dtypes do not fit.
    Source: the Gram form of the empirical Fisher, Ou et al. 2024 (arXiv 2403.03473).
    """
    checks.check_linear(a, e)
    flag("bias", bias)
    flag("diag", diag)
    workspace = checks.workspace_bytes(workspace)
    checks.check_precision(precision)
    op = torch.ops.fngd.gram_diag if diag else torch.ops.fngd.gram
    return call(op.default, a, e, bias, workspace, precision)


def gram_conv(
    x: Tensor,
    e: Tensor,
    weight_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
    diag: bool = False,
    workspace: int | None = None,
    precision: str | None = None,
) -> Tensor:
    """Return the Gram matrix of a 1-3 d convolution's contributions, without a patch tensor.

    K_ij = <E_i^T P_i, E_j^T P_j> + bias <sum_p E_ip, sum_p E_jp>, with P_n the patches of sample n

    x: (N,C,*space) float, layer input, in any memory format
    e: (N,O,*space_out) float, gradient at the layer output, of x's dtype
    weight_shape: (O,C/groups,*kernel)
    stride, padding, dilation, groups: as in torch.conv2d, padding with zeros
    bias: whether the bias belongs to the block
    diag: whether to return the diagonal alone, the squared norms ||C_n||^2
    workspace: upper bound of scratch memory in bytes, by default 64 MiB
    precision: of float32 products on a GPU, "ieee", "tf32" or "tf32x3"; by default what
        torch.set_float32_matmul_precision says. The CPU's are always "ieee"

    Returns: (N,N) float32 or float64, K; with diag (N,)
    Raises: ValueError, TypeError when shapes, devices or dtypes do not fit.
    Source: the Gram form of the empirical Fisher, Ou et al. 2024 (arXiv 2403.03473).
    """
    geometry = checks.check_conv(x, e, weight_shape, stride, padding, dilation, groups)
    flag("bias", bias)
    flag("diag", diag)
    workspace = checks.workspace_bytes(workspace)
    checks.check_precision(precision)
    op = torch.ops.fngd.gram_conv_diag if diag else torch.ops.fngd.gram_conv
    return call(op.default, x, e, *geometry, bias, workspace, precision)


def gram_embedding(
    ids: Tensor,
    e: Tensor,
    *,
    padding_idx: int | None = None,
    diag: bool = False,
    workspace: int | None = None,
    precision: str | None = None,
) -> Tensor:
    """Return the Gram matrix of an embedding's contributions.

    K_ij = sum_{t,u} [ids_it = ids_ju] <e_it, e_ju>, over positions whose id is not padding_idx

    ids: (N,) or (N,T) int64 or int32, 0 or more and below 2**63 / N; not checked on a GPU, which would have
        to be waited for, and where equal ids meet whatever they are
    e: (N,D) or (N,T,D) float, gradient at the layer output
    padding_idx: id that contributes nothing
    diag: whether to return the diagonal alone, the squared norms ||C_n||^2
    workspace: upper bound of scratch memory in bytes, by default 64 MiB
    precision: of float32 products on a GPU, "ieee", "tf32" or "tf32x3"; by default what
        torch.set_float32_matmul_precision says. The CPU's are always "ieee"

    Returns: (N,N) float32 or float64, K; with diag (N,)
    Raises: ValueError, TypeError when shapes, devices or dtypes do not fit.
    Source: the Gram form of the empirical Fisher, Ou et al. 2024 (arXiv 2403.03473).
    """
    checks.check_embedding(ids, e)
    padding_idx = checks.check_padding_idx(padding_idx, ids)
    flag("diag", diag)
    workspace = checks.workspace_bytes(workspace)
    checks.check_precision(precision)
    op = torch.ops.fngd.gram_embedding_diag if diag else torch.ops.fngd.gram_embedding
    return call(op.default, ids, e, padding_idx, workspace, precision)


def gram_rows(g: Tensor, *, diag: bool = False, workspace: int | None = None) -> Tensor:
    """Return the Gram matrix of contributions that are already formed.

    K_ij = <g_i, g_j>

    g: (N,...) float, contribution of each sample
    diag: whether to return the diagonal alone, the squared norms ||C_n||^2
    workspace: upper bound of scratch memory in bytes, by default 64 MiB

    Returns: (N,N) float32 or float64, K; with diag (N,)
    Raises: ValueError, TypeError when g is no batch or not floating.
    Source: the Gram form of the empirical Fisher, Ou et al. 2024 (arXiv 2403.03473).
    """
    checks.check_rows(g)
    flag("diag", diag)
    workspace = checks.workspace_bytes(workspace)
    op = torch.ops.fngd.gram_rows_diag if diag else torch.ops.fngd.gram_rows
    return call(op.default, g, workspace)


def library_gram(a: Tensor, e: Tensor, bias: bool, workspace: int, precision: str | None = None) -> Tensor:
    """Return K of a linear layer, on library products."""
    if not e.numel() or not (a.numel() or bias):
        return _empty_gram(a).zero_()
    if not a.numel():
        a = a.new_zeros((*a.shape[:-1], 1))  # the bias alone
    plan = cost_model.plan(a.shape, e.shape, bias=bias, itemsize=a.itemsize, workspace=workspace)
    if a.ndim == 2:
        a, e = a.unsqueeze(1), e.unsqueeze(1)
    if plan.algorithm == "hadamard":
        return gram_hadamard(a, e, bias)
    algorithm = gram_pairs if plan.algorithm == "pairs" else gram_explicit
    return algorithm(a, e, bias, plan)


def library_gram_conv(
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
    """Return K of a convolution, on library products."""
    if not x.shape[0]:
        return _empty_gram(x)
    plan = cost_model.plan(
        x.shape,
        e.shape,
        weight_shape=weight_shape,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        itemsize=x.itemsize,
        workspace=workspace,
    )
    algorithm = gram_conv_pairs if plan.algorithm == "pairs" else gram_conv_explicit
    return algorithm(x, e, weight_shape, stride, padding, dilation, groups, bias, plan)


def library_gram_embedding(
    ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int, precision: str | None = None
) -> Tensor:
    """Return K of an embedding, on library products."""
    if not e.numel():
        return _empty_gram(e).zero_()
    if ids.ndim == 1:
        ids, e = ids.unsqueeze(1), e.unsqueeze(1)
    return gram_embedding_sorted(ids, e, padding_idx, workspace)


def library_gram_rows(g: Tensor, workspace: int) -> Tensor:
    """Return K of contributions already formed, on library products."""
    if not g.numel():
        return _empty_gram(g).zero_()
    return gram_rows_chunked(g.reshape(len(g), -1), workspace)


def _empty_gram(a: Tensor, *_: object) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[0]), dtype=accumulation_dtype(a.dtype))


def _fake_gram_embedding(
    ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int, precision: str | None = None
) -> Tensor:
    return _empty_gram(e)


register("gram", library_gram, _empty_gram)
register("gram_conv", library_gram_conv, _empty_gram)
register("gram_embedding", library_gram_embedding, _fake_gram_embedding)
register("gram_rows", library_gram_rows, _empty_gram)
