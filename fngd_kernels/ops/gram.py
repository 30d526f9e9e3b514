"""The Gram matrix of a linear layer's contributions, and its diagonal.

All Gram matrices K (N,N) of this package are float64 for float64 input and float32 otherwise, and every sum
is kept in that dtype. K is exactly symmetric. It is not differentiable; `fngd_kernels.reference` is. Scratch
memory stays under `workspace` bytes, unless the chunk of a single input and output needs more. Not counted
are matrices of K's size, inputs that a sketch has compressed, and the buffers of the library's matrix product
(about 256 KiB for each thread).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import checks
from ..arguments import flag
from ..backends.torch.gram_explicit import gram_explicit
from ..backends.torch.gram_hadamard import gram_hadamard
from ..backends.torch.gram_pairs import gram_pairs
from ..backends.torch.products import accumulation_dtype
from ..backends.torch.squared_norms import linear_norms
from ..plans import Plan
from ..sketch import INPUTS, OUTPUTS, Sketch, as_sketch
from ..workspace import default_workspace
from . import choose, devices
from .registration import call, register
from .sketch import sketched

Implementation = Callable[[Tensor, Tensor, bool, Plan, int, str | None], Tensor]

IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {
    ("torch", "hadamard"): lambda a, e, bias, plan, workspace, precision: gram_hadamard(a, e, bias),
    ("torch", "pairs"): lambda a, e, bias, plan, workspace, precision: gram_pairs(a, e, bias, plan),
    ("torch", "explicit"): lambda a, e, bias, plan, workspace, precision: gram_explicit(a, e, bias, plan),
}
"""By backend and algorithm of a plan; for a (N,T,I) and e (N,T,O)."""

BATCHES: dict[tuple[str, str], Callable[[Sequence[Tensor], Sequence[Tensor], bool, str | None], Tensor]] = {}
"""By backend and algorithm, where one takes several layers at a time; for lists of a (N,T,I), e (N,T,O)."""

DIAGONALS: dict[str, Callable[[Tensor, Tensor, bool, int, str | None], Tensor]] = {
    "torch": lambda a, e, bias, workspace, precision: linear_norms(a, e, bias, workspace),
}
"""By backend; for a (N,T,I) and e (N,T,O)."""


def gram(
    a: Tensor,
    e: Tensor,
    *,
    bias: bool = False,
    diag: bool = False,
    workspace: int | None = None,
    precision: str | None = None,
    sketch: int | Sketch | None = None,
) -> Tensor:
    """Return the Gram matrix of a linear layer's contributions.

    K_ij = <E_i^T A_i, E_j^T A_j> + bias <sum_t E_it, sum_t E_jt>

    Source: the Gram form of the empirical Fisher, Ou et al. 2024 (arXiv 2403.03473).

    Args:
        a: (N,I) or (N,T,I) float, layer input.
        e: (N,O) or (N,T,O) float of a's dtype, gradient at the layer output.
        bias: Whether the bias belongs to the block (a column of ones on A).
        diag: Whether to return only the diagonal, the squared norms ||C_n||^2.
        workspace: Upper bound of scratch memory in bytes, by default 64 MiB.
        precision: How float32 is multiplied on a GPU: "ieee", "tf32" or "tf32x3"; by default what
            torch.backends.cuda.matmul.fp32_precision says. Contributions of 16-bit inputs, where they are
            formed, are rounded to bfloat16 by default, |K'_ij - K_ij| <= 2^-7 ||C_i|| ||C_j||, and kept in
            float32 with a precision. On a CPU it is always "ieee".
        sketch: A Sketch, or its size alone, to compress both sides of the contributions;
            None for the exact K.

    Returns:
        K, (N,N) float32 or float64; with diag (N,).

    Raises:
        ValueError: Shapes or devices do not fit, or a number is out of range.
        TypeError: Dtypes do not fit, or an argument has the wrong type.
    """
    checks.check_linear(a, e)
    flag("bias", bias)
    flag("diag", diag)
    workspace = checks.workspace_bytes(workspace)
    checks.check_precision(precision)
    sketch = as_sketch(sketch)
    a, e = sketched(a, INPUTS, sketch), sketched(e, OUTPUTS, sketch)
    op = torch.ops.fngd.gram_diag if diag else torch.ops.fngd.gram
    return call(op.default, a, e, bias, workspace, precision)


def gram_batch(a: Sequence[Tensor], e: Sequence[Tensor], bias: bool) -> Tensor:
    """Return K (L,N,N), for each of L linear layers what `gram` returns.

    Args:
        a: (N,T,I) each, layer inputs, alike in shape, strides, dtype and device.
        e: (N,T,O) each, gradients at the layer outputs, alike in the same way.
        bias: Whether the biases belong to the blocks.
    """
    checks.check_linear(a[0], e[0])
    return call(torch.ops.fngd.gram_batch.default, a, e, bias, default_workspace())


def with_positions(a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors with an axis of positions, of size 1 where e has none."""
    return (a, e) if e.ndim == 3 else (a.unsqueeze(1), e.unsqueeze(1))


def _gram(a: Tensor, e: Tensor, bias: bool, workspace: int, precision: str | None = None) -> Tensor:
    if not e.numel() or not (a.numel() or bias):
        return empty_gram(a).zero_()
    triton = devices.triton_serves(a, e)
    if not a.numel():
        # The bias alone.
        a = a.new_zeros((*a.shape[:-1], 1))
    plan = choose.gram(tuple(a.shape), tuple(e.shape), bias, a.itemsize, workspace, triton)
    run = IMPLEMENTATIONS[plan.backend, plan.algorithm]
    return run(*with_positions(a, e), bias, plan, workspace, precision)


def _gram_batch(
    a: Sequence[Tensor], e: Sequence[Tensor], bias: bool, workspace: int, precision: str | None = None
) -> Tensor:
    triton = devices.triton_serves(a[0], e[0])
    if triton:
        plan = choose.gram(tuple(a[0].shape), tuple(e[0].shape), bias, a[0].itemsize, workspace, triton)
        run = BATCHES.get((plan.backend, plan.algorithm))
        if run is not None:
            return run(a, e, bias, precision)
    return torch.stack([_gram(x, y, bias, workspace, precision) for x, y in zip(a, e, strict=True)])


def _gram_diag(a: Tensor, e: Tensor, bias: bool, workspace: int, precision: str | None = None) -> Tensor:
    if not e.numel():
        return empty_diagonal(e).zero_()
    run = DIAGONALS[choose.gram_diag(tuple(a.shape), tuple(e.shape), devices.triton_serves(a, e))]
    return run(*with_positions(a, e), bias, workspace, precision)


def empty_gram(a: Tensor, *_: object) -> Tensor:
    """Return an uninitialised Gram matrix for the samples of a: the fake of most operators."""
    return a.new_empty((a.shape[0], a.shape[0]), dtype=accumulation_dtype(a.dtype))


def empty_diagonal(a: Tensor, *_: object) -> Tensor:
    """Return an uninitialised diagonal of a Gram matrix for the samples of a: the fake of most operators."""
    return a.new_empty(a.shape[0], dtype=accumulation_dtype(a.dtype))


register(
    "gram(Tensor a, Tensor e, bool bias, int workspace, str? precision=None) -> Tensor", _gram, empty_gram
)
register(
    "gram_batch(Tensor[] a, Tensor[] e, bool bias, int workspace, str? precision=None) -> Tensor",
    _gram_batch,
    lambda a, *_: torch.stack([empty_gram(x) for x in a]),
)
register(
    "gram_diag(Tensor a, Tensor e, bool bias, int workspace, str? precision=None) -> Tensor",
    _gram_diag,
    empty_diagonal,
)
