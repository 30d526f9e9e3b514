"""The operators of CUDA tensors, on fused kernels; float64 and empty tensors stay on library products."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import cost_model
from ..backends.torch import combine as library
from ..backends.triton.combine import combine as fused_combine
from ..backends.triton.combine_embedding import combine_embedding as fused_combine_embedding
from ..backends.triton.common import capability
from ..backends.triton.gram_conv_explicit import gram_conv_explicit
from ..backends.triton.gram_embedding import gram_embedding as fused_gram_embedding
from ..backends.triton.gram_embedding import gram_embedding_diag as fused_gram_embedding_diag
from ..backends.triton.gram_explicit import gram_explicit
from ..backends.triton.gram_hadamard import gram_hadamard
from ..backends.triton.gram_pairs import gram_pairs, gram_pairs_diag
from .gram import library_gram, library_gram_conv, library_gram_embedding
from .gram_diag import library_gram_diag, library_gram_embedding_diag
from .registration import LIBRARY
from .scale_bias import scale_bias


def gram(a: Tensor, e: Tensor, bias: bool, workspace: int, precision: str | None = None) -> Tensor:
    """Return K of a linear layer."""
    if not _fused(a, e):
        return library_gram(a, e, bias, workspace)
    plan = cost_model.plan(
        a.shape,
        e.shape,
        bias=bias,
        itemsize=a.itemsize,
        workspace=workspace,
        capability=capability(a.device),
    )
    a, e = _with_positions(a, e)
    if plan.algorithm == "hadamard":
        return gram_hadamard([a], [e], [bias], _precision(precision))[0]
    if plan.algorithm == "pairs":
        return gram_pairs(a, e, bias, _precision(precision))
    return gram_explicit(a, e, bias, _contribution_precision(precision, a), workspace)


def gram_diag(a: Tensor, e: Tensor, bias: bool, workspace: int, precision: str | None = None) -> Tensor:
    """Return the diagonal of K of a linear layer."""
    positions = a.shape[1] if a.ndim == 3 else 1
    if not _fused(a, e) or positions * (a.shape[-1] + e.shape[-1]) >= a.shape[-1] * e.shape[-1]:
        return library_gram_diag(a, e, bias, workspace)
    return gram_pairs_diag(*_with_positions(a, e), bias, _precision(precision))


def gram_conv(
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
    """Return K of a convolution."""
    geometry = (weight_shape, stride, padding, dilation, groups, bias)
    if not _fused(x, e):
        return library_gram_conv(x, e, *geometry, workspace)
    if prod(weight_shape[2:]) == prod(stride) == groups == 1 and not any(padding):
        # A linear layer on pixels.
        return gram(x.flatten(2).mT, e.flatten(2).mT, bias, workspace, precision)
    return gram_conv_explicit(x, e, *geometry, _contribution_precision(precision, x), workspace)


def gram_embedding(
    ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int, precision: str | None = None
) -> Tensor:
    """Return K of an embedding."""
    if not _fused(e):
        return library_gram_embedding(ids, e, padding_idx, workspace)
    return fused_gram_embedding(*_with_positions(ids, e), padding_idx, _precision(precision))


def gram_embedding_diag(
    ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int, precision: str | None = None
) -> Tensor:
    """Return the diagonal of K of an embedding."""
    if not _fused(e):
        return library_gram_embedding_diag(ids, e, padding_idx, workspace)
    return fused_gram_embedding_diag(*_with_positions(ids, e), padding_idx, _precision(precision))


def combine(a: Tensor, e: Tensor, s: Tensor, bias: bool) -> list[Tensor]:
    """Return the weighted gradient of a linear layer; float32 products are the library's."""
    if not _fused(a, e) or a.dtype == torch.float32:
        return library.combine(a, e, s, bias)
    return fused_combine(a, e, s, bias)


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
    """Return the weighted gradient of a convolution: one fused pass, then the library's weight gradient."""
    geometry = (weight_shape, stride, padding, dilation, groups)
    if not _fused(x, e):
        return library.combine_conv(x, e, s, *geometry, bias)
    scaled, bias_gradient = scale_bias(e, s, 1, True, bias)
    weight = library.conv_weight_gradient(x, scaled, *geometry)
    return [weight] if bias_gradient is None else [weight, bias_gradient]


def combine_embedding(
    ids: Tensor, e: Tensor, s: Tensor, num_embeddings: int, padding_idx: int | None
) -> Tensor:
    """Return the weighted gradient of an embedding."""
    if not _fused(e):
        return library.combine_embedding(ids, e, s, num_embeddings, padding_idx)
    return fused_combine_embedding(ids, e, s, num_embeddings, padding_idx)


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with the device of its first tensor current: Triton launches on the current one."""

    def guarded(tensor: Tensor, *arguments: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return function(tensor, *arguments)

    return guarded


def _fused(*tensors: Tensor) -> bool:
    return all(t.dtype != torch.float64 and t.numel() > 0 for t in tensors)


def _with_positions(a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    return (a, e) if e.ndim == 3 else (a.unsqueeze(1), e.unsqueeze(1))


def _precision(precision: str | None) -> str:
    """Return how float32 is multiplied: by default as torch was told to multiply its own."""
    return precision or ("ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32")


def _contribution_precision(precision: str | None, inputs: Tensor) -> str | None:
    """Return how contributions are multiplied: by default, for half precision, as the kernel chooses."""
    return _precision(precision) if inputs.dtype == torch.float32 else precision


for function in (
    gram,
    gram_conv,
    gram_embedding,
    gram_diag,
    gram_embedding_diag,
    combine,
    combine_conv,
    combine_embedding,
):
    LIBRARY.impl(function.__name__, _on_device(function), "CUDA")
