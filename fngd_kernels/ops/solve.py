"""Damped solve of symmetric positive definite systems, batched."""

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from .. import checks, native
from ..arguments import flag
from ..backends.torch.solve import solve as torch_solve
from . import choose
from .registration import call, register

IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]] = {
    "torch": torch_solve,
    "native": lambda k, damping, rhs: native.extension.solve(k, damping, rhs),
}


@overload
def solve(
    k: Tensor,
    damping: float | Tensor,
    rhs: Tensor | None = ...,
    *,
    return_info: Literal[False] = ...,
) -> Tensor: ...
@overload
def solve(
    k: Tensor,
    damping: float | Tensor,
    rhs: Tensor | None = ...,
    *,
    return_info: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def solve(
    k: Tensor,
    damping: float | Tensor,
    rhs: Tensor | None = None,
    *,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Solve damped symmetric positive definite systems.

    x = (k + damping I)^-1 rhs

    Source: the Woodbury form of the damped empirical Fisher, Ou et al. 2024 (arXiv 2403.03473).

    Args:
        k: (..., N, N) float32 or float64, symmetric, with any strides. The upper triangle has no influence.
        damping: A finite number >= 0, or (...) of k's dtype, one per matrix.
        rhs: (..., N) of k's dtype, ones by default.
        return_info: Whether to return info beside x.

    Returns:
        x, (..., N). With return_info also info (...) int32: 0 where solved, j > 0 where the leading minor of
        order j is not positive definite or not finite. There x is NaN; nothing is raised, and the other
        matrices are not affected. x is not differentiable; `fngd_kernels.reference` is.

    Raises:
        ValueError: Shapes or devices do not fit, or the damping is out of range.
        TypeError: Dtypes do not fit, or an argument has the wrong type.
    """
    damping = checks.check_solve(k, damping, rhs)
    flag("return_info", return_info)
    x, info = call(torch.ops.fngd.solve.default, k, damping, rhs)
    return (x, info) if return_info else x


def _solve(k: Tensor, damping: Tensor, rhs: Tensor | None) -> tuple[Tensor, Tensor]:
    return IMPLEMENTATIONS[choose.solve(k.shape[-1], k.device.type, native.serves(k))](k, damping, rhs)


def _fake(k: Tensor, damping: Tensor, rhs: Tensor | None) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape[:-1]), k.new_empty(k.shape[:-2], dtype=torch.int32)


register("solve(Tensor k, Tensor damping, Tensor? rhs) -> (Tensor x, Tensor info)", _solve, _fake)
