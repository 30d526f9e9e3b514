"""Gram matrix of a convolution from its per-sample contributions, formed by chunks of the weight."""

import torch
from torch import Tensor

from ...geometry import ConvGeometry
from ...plans import Plan
from .conv_contributions import conv_contributions
from .products import accumulation_dtype, add_gram, mirror


def gram_conv_explicit(x: Tensor, e: Tensor, geometry: ConvGeometry, bias: bool, plan: Plan) -> Tensor:
    """Return K = sum over chunks of C C^T, for x (N,C,*space) and e (N,O,*space_out)."""
    n, groups = x.shape[0], geometry.groups
    dtype = accumulation_dtype(x.dtype)
    k = x.new_zeros((n, n), dtype=dtype)
    x, e = x.unflatten(1, (groups, -1)), e.unflatten(1, (groups, -1))
    for g in range(0, groups, plan.group_chunk):
        for o in range(0, e.shape[2], plan.out_chunk):
            e_chunk = e[:, g : g + plan.group_chunk, o : o + plan.out_chunk]
            for i in range(0, x.shape[2], plan.in_chunk):
                x_chunk = x[:, g : g + plan.group_chunk, i : i + plan.in_chunk]
                samples = zip(x_chunk.split(plan.sample_chunk), e_chunk.split(plan.sample_chunk), strict=True)
                parts = [conv_contributions(*pair, geometry, dtype) for pair in samples]
                c = parts[0] if len(parts) == 1 else torch.cat(parts)
                del parts
                add_gram(k, c)
                del c
    if bias:
        add_gram(k, e.flatten(3).sum(3, dtype=dtype).flatten(1))
    return mirror(k)
