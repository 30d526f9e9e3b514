"""Weighted sums of contributions: the gradient at the output is scaled, then the ordinary product follows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .convolution import Geometry, weight_gradient
from .ids import check_ids
from .products import accumulation_dtype


def _scaled(e: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """Return s_n e_n, rounded once to `dtype`."""
    return (e * s.view(-1, *[1] * (e.ndim - 1))).to(dtype)


def combine(a: Tensor, e: Tensor, s: Tensor, bias: bool) -> list[Tensor]:
    """Return [E^T diag(s) A] and with bias the weighted sum of the rows of E."""
    e = _scaled(e, s, e.dtype).flatten(0, -2)
    weight = e.T @ a.flatten(0, -2)
    return [weight, e.sum(0)] if bias else [weight]


def combine_conv(
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
    """Return the weight gradient of the convolution for diag(s) E, and with bias the bias gradient."""
    if not x.shape[0]:
        return [x.new_zeros(weight_shape), *([e.new_zeros(weight_shape[0])] if bias else [])]
    # On a CPU float16 is summed in float32 anyway: its weighted gradients need not be rounded before.
    dtype = torch.float32 if e.dtype == torch.float16 and e.device.type == "cpu" else e.dtype
    scaled = _scaled(e, s, dtype)
    weight = conv_weight_gradient(x.to(dtype), scaled, weight_shape, stride, padding, dilation, groups)
    # By itself, because torch adds it up in bfloat16 where oneDNN does not serve.
    bias_gradient = [scaled.sum([0, *range(2, e.ndim)]).to(e.dtype)] if bias else []
    return [weight.to(e.dtype), *bias_gradient]


def conv_weight_gradient(
    x: Tensor,
    e: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the ordinary gradient of a convolution's weight."""
    geometry = Geometry(stride, padding, dilation, False, [0] * len(stride), groups)
    return weight_gradient(e, x, x.new_zeros(()).expand(weight_shape), geometry).contiguous()


def combine_embedding(
    ids: Tensor, e: Tensor, s: Tensor, num_embeddings: int, padding_idx: int | None
) -> Tensor:
    """Return the sums of diag(s) E over the positions of each id."""
    if ids.numel():
        check_ids(ids, num_embeddings)
    dtype = accumulation_dtype(e.dtype)
    weight = e.new_zeros((num_embeddings, e.shape[-1]), dtype=dtype)
    rows = _scaled(e, s, dtype)
    if padding_idx is not None:
        rows.masked_fill_((ids == padding_idx).unsqueeze(-1), 0)
    return weight.index_add_(0, ids.flatten(), rows.flatten(0, -2)).to(e.dtype)


def combine_rows(g: Tensor, s: Tensor) -> Tensor:
    """Return sum_n s_n g_n."""
    dtype = accumulation_dtype(g.dtype)
    return torch.tensordot(s.to(dtype), g.to(dtype), 1).to(g.dtype)
