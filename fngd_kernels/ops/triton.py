"""The Triton kernels as implementations of operators; importing this adds them to the operators' tables."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.triton.combine_embedding import combine_embedding as triton_combine_embedding
from ..backends.triton.gram_embedding import gram_embedding as triton_gram_embedding
from ..backends.triton.gram_embedding import gram_embedding_diag as triton_gram_embedding_diag
from ..backends.triton.gram_explicit import gram_conv_explicit, gram_explicit
from ..backends.triton.gram_hadamard import gram_hadamard, gram_hadamard_batch
from ..backends.triton.gram_pairs import gram_pairs, gram_pairs_batch, gram_pairs_diag
from ..backends.triton.sketch import sketch as triton_sketch
from ..geometry import ConvGeometry
from ..plans import Plan
from . import combine_embedding, devices, gram, gram_conv, gram_embedding, sketch


def _hadamard(a: Tensor, e: Tensor, bias: bool, plan: Plan, workspace: int, precision: str | None) -> Tensor:
    return gram_hadamard(a, e, bias, _precision(precision))


def _pairs(a: Tensor, e: Tensor, bias: bool, plan: Plan, workspace: int, precision: str | None) -> Tensor:
    return gram_pairs(a, e, bias, _precision(precision))


def _hadamard_batch(a: Sequence[Tensor], e: Sequence[Tensor], bias: bool, precision: str | None) -> Tensor:
    return gram_hadamard_batch(a, e, bias, _precision(precision))


def _pairs_batch(a: Sequence[Tensor], e: Sequence[Tensor], bias: bool, precision: str | None) -> Tensor:
    return gram_pairs_batch(a, e, bias, _precision(precision))


def _explicit(a: Tensor, e: Tensor, bias: bool, plan: Plan, workspace: int, precision: str | None) -> Tensor:
    return gram_explicit(a, e, bias, _contribution_precision(precision, a), workspace)


def _conv_explicit(
    x: Tensor,
    e: Tensor,
    geometry: ConvGeometry,
    bias: bool,
    plan: Plan,
    workspace: int,
    precision: str | None,
) -> Tensor:
    return gram_conv_explicit(x, e, geometry, bias, precision, workspace)


def _pairs_diag(a: Tensor, e: Tensor, bias: bool, workspace: int, precision: str | None) -> Tensor:
    return gram_pairs_diag(a, e, bias, _precision(precision))


def _embedding(
    ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int, precision: str | None
) -> Tensor:
    return triton_gram_embedding(ids, e, padding_idx, precision or "tf32x3")


def _embedding_diag(
    ids: Tensor, e: Tensor, padding_idx: int | None, workspace: int, precision: str | None
) -> Tensor:
    return triton_gram_embedding_diag(ids, e, padding_idx, precision or "tf32x3")


def _precision(precision: str | None) -> str:
    """Return how float32 is multiplied: by default as torch was told to multiply its own."""
    return precision or devices.float32_precision(torch.backends.cuda.matmul)


def _contribution_precision(precision: str | None, inputs: Tensor) -> str | None:
    """Return how contributions are multiplied; by default, for half precision, the kernel chooses."""
    return _precision(precision) if inputs.dtype == torch.float32 else precision


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with the device of its first tensor current: Triton launches on that one."""

    def guarded(first: Tensor | Sequence[Tensor], *arguments: Any) -> Any:
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return function(first, *arguments)

    return guarded


gram.IMPLEMENTATIONS["triton", "hadamard"] = _on_device(_hadamard)
gram.IMPLEMENTATIONS["triton", "pairs"] = _on_device(_pairs)
gram.IMPLEMENTATIONS["triton", "explicit"] = _on_device(_explicit)
gram.BATCHES["triton", "hadamard"] = _on_device(_hadamard_batch)
gram.BATCHES["triton", "pairs"] = _on_device(_pairs_batch)
gram.DIAGONALS["triton"] = _on_device(_pairs_diag)
gram_conv.IMPLEMENTATIONS["triton", "explicit"] = _on_device(_conv_explicit)
gram_embedding.IMPLEMENTATIONS["triton"] = _on_device(_embedding)
gram_embedding.DIAGONALS["triton"] = _on_device(_embedding_diag)
combine_embedding.IMPLEMENTATIONS["triton"] = _on_device(triton_combine_embedding)
sketch.IMPLEMENTATIONS["triton"] = _on_device(triton_sketch)
