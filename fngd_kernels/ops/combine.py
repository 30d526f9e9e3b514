"""Weighted sums of per-sample contributions C_n: the gradient sum_n s_n C_n, without forming any C_n.

With s = 1 each function returns the ordinary gradient of the layer's parameters. The result has the dtype of
the inputs and is not differentiable: `fngd_kernels.reference` is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import flag, integer
from ..backends.torch import combine as library
from . import checks
from .registration import LIBRARY, call, register

LIBRARY.define("combine(Tensor a, Tensor e, Tensor s, bool bias) -> Tensor[]")
LIBRARY.define(
    "combine_conv(Tensor x, Tensor e, Tensor s, int[] weight_shape, int[] stride, int[] padding, "
    "int[] dilation, int groups, bool bias) -> Tensor[]"
)
LIBRARY.define(
    "combine_embedding(Tensor ids, Tensor e, Tensor s, int num_embeddings, int? padding_idx) -> Tensor"
)
LIBRARY.define("combine_rows(Tensor g, Tensor s) -> Tensor")


def combine(a: Tensor, e: Tensor, s: Tensor, *, bias: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Return the weighted gradient of a linear layer.

    W = sum_n s_n E_n^T A_n, b = sum_n s_n sum_t E_nt

    a: (N,I) or (N,T,I) float, layer input
    e: (N,O) or (N,T,O) float, gradient at the layer output, of a's dtype
    s: (N,) float, coefficients
    bias: whether to return b as well

    Returns: (O,I), W; with bias the pair of W and (O,), b
    Raises: ValueError, TypeError when shapes, devices or dtypes do not fit.
    Source: the natural gradient as a weighted sum, Ou et al. 2024 (arXiv 2403.03473).
    """
    checks.check_linear(a, e)
    flag("bias", bias)
    checks.check_coefficients(s, "a", a)
    sums = call(torch.ops.fngd.combine.default, a, e, s, bias)
    return (sums[0], sums[1]) if bias else sums[0]


def combine_conv(
    x: Tensor,
    e: Tensor,
    s: Tensor,
    weight_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the weighted gradient of a 1-3 d convolution.

    W = sum_n s_n E_n^T P_n with P_n the patches of sample n, b = sum_n s_n sum_p E_np

    x: (N,C,*space) float, layer input, in any memory format
    e: (N,O,*space_out) float, gradient at the layer output, of x's dtype
    s: (N,) float, coefficients
    weight_shape: (O,C/groups,*kernel)
    stride, padding, dilation, groups: as in torch.conv2d, padding with zeros
    bias: whether to return b as well

    Returns: weight_shape, W; with bias the pair of W and (O,), b
    Raises: ValueError, TypeError when shapes, devices or dtypes do not fit.
    Source: the natural gradient as a weighted sum, Ou et al. 2024 (arXiv 2403.03473).
    """
    geometry = checks.check_conv(x, e, weight_shape, stride, padding, dilation, groups)
    flag("bias", bias)
    checks.check_coefficients(s, "x", x)
    op = torch.ops.fngd.combine_conv.default
    sums = call(op, x, e, s, *geometry, bias)
    return (sums[0], sums[1]) if bias else sums[0]


def combine_embedding(
    ids: Tensor, e: Tensor, s: Tensor, num_embeddings: int, *, padding_idx: int | None = None
) -> Tensor:
    """Return the weighted gradient of an embedding.

    W_v = sum_n s_n sum_t [ids_nt = v] e_nt, and zero for v = padding_idx

    ids: (N,) or (N,T) int64 or int32, in [0, num_embeddings); not checked on a GPU, which would have to be
        waited for: others contribute nothing there, and fail on the device where e is float64
    e: (N,D) or (N,T,D) float, gradient at the layer output
    s: (N,) float, coefficients
    num_embeddings: rows of the weight
    padding_idx: id that contributes nothing

    Returns: (num_embeddings,D), W
    Raises: ValueError, TypeError when shapes, devices or dtypes do not fit.
    Source: the natural gradient as a weighted sum, Ou et al. 2024 (arXiv 2403.03473).
    """
    checks.check_embedding(ids, e)
    checks.check_coefficients(s, "e", e)
    num_embeddings = integer("num_embeddings", num_embeddings, 1)
    padding_idx = checks.check_padding_idx(padding_idx, ids)
    return call(torch.ops.fngd.combine_embedding.default, ids, e, s, num_embeddings, padding_idx)


def combine_rows(g: Tensor, s: Tensor) -> Tensor:
    """Return the weighted sum of contributions that are already formed.

    G = sum_n s_n g_n

    g: (N,...) float, contribution of each sample
    s: (N,) float, coefficients

    Returns: g.shape[1:], G
    Raises: ValueError, TypeError when shapes, devices or dtypes do not fit.
    Source: the natural gradient as a weighted sum, Ou et al. 2024 (arXiv 2403.03473).
    """
    checks.check_rows(g)
    checks.check_coefficients(s, "g", g)
    return call(torch.ops.fngd.combine_rows.default, g, s)


def _fake_combine(a: Tensor, e: Tensor, s: Tensor, bias: bool) -> list[Tensor]:
    outputs = e.shape[-1]
    return [a.new_empty((outputs, a.shape[-1])), *([e.new_empty(outputs)] if bias else [])]


def _fake_combine_conv(
    x: Tensor,
    e: Tensor,
    s: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> list[Tensor]:
    return [x.new_empty(weight_shape), *([e.new_empty(e.shape[1])] if bias else [])]


def _fake_combine_embedding(
    ids: Tensor, e: Tensor, s: Tensor, num_embeddings: int, padding_idx: int | None
) -> Tensor:
    return e.new_empty((num_embeddings, e.shape[-1]))


def _fake_combine_rows(g: Tensor, s: Tensor) -> Tensor:
    return g.new_empty(g.shape[1:])


register("combine", library.combine, _fake_combine)
register("combine_conv", library.combine_conv, _fake_combine_conv)
register("combine_embedding", library.combine_embedding, _fake_combine_embedding)
register("combine_rows", library.combine_rows, _fake_combine_rows)
