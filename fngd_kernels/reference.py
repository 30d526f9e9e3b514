"""What every operator computes: its definition, in plain torch of any dtype and differentiable.

Arguments and errors are those of the operator of the same name; `diag`, `workspace`, `precision` and
`sketch` do not exist.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from . import checks
from .arguments import flag, integer
from .backends.torch.ids import check_ids
from .damping import alpha_beta


def contributions(a: Tensor, e: Tensor, *, bias: bool = False) -> Tensor:
    """Return C_n = E_n^T [A_n, 1] as rows (N, O (I + bias)), in at least float32."""
    checks.check_linear(a, e)
    flag("bias", bias)
    a, e = (_wide(t).unsqueeze(1) if t.ndim == 2 else _wide(t) for t in (a, e))
    if bias:
        a = torch.cat((a, a.new_ones((*a.shape[:-1], 1))), -1)
    return torch.einsum("nto,nti->noi", e, a).flatten(1)


def contributions_conv(
    x: Tensor,
    e: Tensor,
    weight_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
) -> Tensor:
    """Return C_n of a convolution as rows (N, O C/groups prod(kernel) + bias O), in at least float32."""
    geometry = checks.check_conv(x, e, weight_shape, stride, padding, dilation, groups)
    flag("bias", bias)
    _, stride, padding, dilation, groups = geometry
    kernel = geometry.kernel
    x, e = _wide(x), _wide(e).unflatten(1, (groups, -1)).flatten(3)
    dims = len(kernel)
    patches = torch.constant_pad_nd(x, [p for pad in reversed(padding) for p in (pad, pad)])
    for axis in range(dims):
        patches = patches.unfold(2 + axis, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])
        patches = patches[..., :: dilation[axis]]
    # (N,C,*space_out,*kernel) -> (N,groups,C/groups,P,prod(kernel))
    patches = patches.flatten(2 + dims).flatten(2, 1 + dims).unflatten(1, (groups, -1))
    weight = torch.einsum("ngop,ngcpk->ngock", e, patches).flatten(1)
    return torch.cat((weight, e.sum(3).flatten(1)), 1) if bias else weight


def contributions_embedding(
    ids: Tensor, e: Tensor, num_embeddings: int, *, padding_idx: int | None = None
) -> Tensor:
    """Return C_n of an embedding as rows (N, num_embeddings D), in at least float32."""
    checks.check_embedding(ids, e)
    num_embeddings = integer("num_embeddings", num_embeddings, 1)
    padding_idx = checks.check_padding_idx(padding_idx, ids)
    if ids.numel():
        check_ids(ids, num_embeddings)
    ids, e = (ids.unsqueeze(1), e.unsqueeze(1)) if ids.ndim == 1 else (ids, e)
    if padding_idx is not None:
        e = e.masked_fill((ids == padding_idx).unsqueeze(-1), 0)
    rows = torch.arange(num_embeddings, dtype=torch.int64, device=ids.device)
    one_hot = (ids.unsqueeze(-1) == rows).to(_wide(e).dtype)
    return torch.einsum("ntv,ntd->nvd", one_hot, _wide(e)).flatten(1)


def gram(a: Tensor, e: Tensor, *, bias: bool = False) -> Tensor:
    """Return K_ij = <C_i, C_j> of a linear layer."""
    return gram_rows(contributions(a, e, bias=bias))


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
) -> Tensor:
    """Return K_ij = <C_i, C_j> of a convolution."""
    c = contributions_conv(
        x, e, weight_shape, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias
    )
    return gram_rows(c)


def gram_embedding(ids: Tensor, e: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Return K_ij = <C_i, C_j> of an embedding."""
    checks.check_embedding(ids, e)
    padding_idx = checks.check_padding_idx(padding_idx, ids)
    if ids.numel():
        check_ids(ids)
    if padding_idx is not None:
        e = e.masked_fill((ids == padding_idx).unsqueeze(-1), 0)
    distinct, ids = ids.unique(return_inverse=True)
    return gram_rows(contributions_embedding(ids, e, max(1, len(distinct))))


def gram_rows(g: Tensor) -> Tensor:
    """Return K_ij = <g_i, g_j>."""
    checks.check_rows(g)
    g = _wide(g).unsqueeze(1).flatten(1)
    return g @ g.T


def combine(a: Tensor, e: Tensor, s: Tensor, *, bias: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Return sum_n s_n C_n of a linear layer: the weight's, with bias also the bias's."""
    total = combine_rows(contributions(a, e, bias=bias), s).view(e.shape[-1], a.shape[-1] + bias).to(e.dtype)
    return (total[:, :-1], total[:, -1]) if bias else total


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
    """Return sum_n s_n C_n of a convolution: the weight's, with bias also the bias's."""
    c = contributions_conv(
        x, e, weight_shape, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias
    )
    total = combine_rows(c, s).to(e.dtype)
    weight = total[: prod(weight_shape)].view(*weight_shape)
    return (weight, total[prod(weight_shape) :]) if bias else weight


def combine_embedding(
    ids: Tensor, e: Tensor, s: Tensor, num_embeddings: int, *, padding_idx: int | None = None
) -> Tensor:
    """Return sum_n s_n C_n of an embedding."""
    c = contributions_embedding(ids, e, num_embeddings, padding_idx=padding_idx)
    return combine_rows(c, s).view(num_embeddings, e.shape[-1]).to(e.dtype)


def combine_rows(g: Tensor, s: Tensor) -> Tensor:
    """Return sum_n s_n g_n."""
    checks.check_rows(g)
    checks.check_coefficients(s, "g", g)
    return torch.einsum("n,n...->...", s.to(_wide(g).dtype), _wide(g)).to(g.dtype)


def solve(k: Tensor, damping: float | Tensor, rhs: Tensor | None = None) -> Tensor:
    """Return (k + damping I)^-1 rhs for k (..., N, N), damping a number or (...), rhs (..., N) or ones."""
    damping = checks.check_solve(k, damping, rhs)
    rhs = k.new_ones(k.shape[:-1]) if rhs is None else rhs
    damped = k + damping[..., None, None] * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return torch.linalg.solve(damped, rhs[..., None])[..., 0]


def coefficients(k: Tensor, damping: float, damping_mode: str = "trace", normalize: str = "mean") -> Tensor:
    """Return the coefficients s (..., N) for k (..., N, N): v from (lam I + N K) v = 1, scaled."""
    damping = checks.check_coefficients_of(k, damping, damping_mode, normalize)
    n, trace = k.shape[-1], k.diagonal(dim1=-2, dim2=-1).sum(-1)
    alpha, beta = alpha_beta(damping, damping_mode, n)
    lam = n * (alpha * trace + beta)
    v = solve(n * k, lam)
    if normalize == "mean":
        return v / v.mean(-1, keepdim=True)
    if normalize == "lambda":
        return v * lam[..., None]
    if normalize == "graft":
        natural = torch.einsum("...i,...ij,...j->...", v, k, v)
        return v * (k.sum((-2, -1)) / natural).sqrt()[..., None]
    return v


def _wide(t: Tensor) -> Tensor:
    """Return t in at least float32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
