"""What is asked of residuals before they are worth a step."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..memory import is_out_of_memory
from ..torch_private import BATCH_NORMS

SEVERAL = 16
"""Residuals of a row or column that are compared."""


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuse batch normalisation in training mode."""
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module.training:
            raise ValueError(
                f"model: module {name!r} ({type(module).__name__}) couples the samples of a batch in "
                "training mode, so that no residual belongs to one sample; call .eval() on it, or "
                "normalise per sample"
            )


def refuse_broadcasting(name: str, values: Tensor, gradient: Callable[[Tensor], Tensor]) -> None:
    """Refuse (N, N) residuals that are (N, 1) minus (N,), or (N,) minus (N, 1).

    The gradients of f_i - y_j in one row, or of f_j - y_i in one column, are multiples of one another, by
    all parameters at once. Those of a network's outputs are not, nor those of its samples.

    Args:
        name: The name of a block.
        values: (N, C), its residuals.
        gradient: Returns the gradient (P,) of one of them by all parameters.
    """
    samples, components = values.shape
    if samples != components or samples == 1:
        return
    line = samples // 3  # points at an end or in the middle may have a residual without a gradient
    step = max(1, samples // SEVERAL)
    for residuals in (values[line], values[:, line]):
        if _parallel(gradient(residual) for residual in residuals[::step]):
            raise ValueError(
                f"residuals: block {name!r} is {tuple(values.shape)}, and the residuals of a row "
                "or column are multiples of one function: were shapes (N, 1) and (N,) subtracted? Squeeze or "
                "unsqueeze one. If every sample has N such residuals, return them as two blocks of columns"
            )


def refuse_too_large(device: torch.device, solver: str, order: int) -> None:
    """Refuse a system for whose matrix, the damped one and its factor there is no memory."""
    try:
        torch.empty((3, order, order), dtype=torch.float64, device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = "residuals, J J^T" if solver == "sample" else "parameters, J^T J"
        raise ValueError(
            f"solver: {order} {what} and its factor need {24 * order**2 / 1e9:.1f} GB, which cannot be "
            "allocated; take solver='iterative', or fewer points in a step"
        ) from error


def disagreeing(expected: Mapping[Tensor, Tensor], found: Mapping[Tensor, Tensor]) -> list[Tensor]:
    """Return the parameters for which J^T v is not as expected; zero where a parameter is absent."""
    size = torch.stack([g.norm().double() for g in expected.values()]).norm()
    if not bool(size.isfinite()):
        return []
    wrong = []
    for p in dict.fromkeys([*expected, *found]):
        zero = torch.zeros_like(p)
        error = (found.get(p, zero) - expected.get(p, zero)).norm()
        if not error <= 100 * torch.finfo(p.dtype).eps ** 0.5 * size:
            wrong.append(p)
    return wrong


def _parallel(gradients: Iterator[Tensor]) -> bool:
    """Return whether all are non-zero multiples of the first, up to rounding; False for single numbers."""
    first = next(gradients)
    unit, rounding = first / first.norm(), 1e3 * torch.finfo(first.dtype).eps
    return len(first) > 1 and all(
        bool(g.any()) and bool((g - (g @ unit) * unit).norm() <= rounding * g.norm()) for g in gradients
    )
