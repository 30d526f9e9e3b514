"""GaussNewton inside PINA's solvers and Trainer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from pina.optim import TorchOptimizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .squares import ClosureGaussNewton, Squares, plain_inputs


class GaussNewton(TorchOptimizer):
    """An optimizer for `PINN(problem, model, optimizer=GaussNewton(model))`.

    Args:
        model: The solver's network. The unknown parameters of an InverseProblem are optimized with it.
        **settings: Those of `fngd.GaussNewton`.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(_Optimizer, **settings)
        self._model = model

    def hook(self, parameters: Iterable[Tensor]) -> None:
        """Make the optimizer, `instance`, for a solver's parameters."""
        self._optimizer_instance = self.optimizer_class(self._model, params=parameters, **self.kwargs)


class _Optimizer(ClosureGaussNewton):
    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._model = model

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        if closure is None:
            raise ValueError(
                "step: solvers that step without a closure, by manual optimization, are not served"
            )
        return super().step(closure)

    @contextmanager
    def _recording(self, squares: Squares) -> Iterator[None]:
        with _MseLosses(squares), plain_inputs(self._model, _plain):
            yield


def _plain(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Tensor) else x


class _MseLosses(TorchFunctionMode):
    """Has every MSE loss take its squares from elsewhere; PINA has one of each condition's residuals."""

    def __init__(self, squares: Squares) -> None:
        super().__init__()
        self._squares = squares

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.mse_loss:
            return func(*args, **(kwargs or {}))
        return self._mse_loss(*args, **(kwargs or {}))

    def _mse_loss(
        self, input: Tensor, target: Tensor, *unused: Any, reduction: str = "mean", **more: Any
    ) -> Tensor:
        if input.shape != target.shape:
            shapes = f"{tuple(input.shape)} and {tuple(target.shape)}"
            raise ValueError(f"loss: expected residuals or targets of one shape, got {shapes}")
        if unused or any(value is not None for value in more.values()):
            raise ValueError("loss: expected MSELoss without weights or deprecated arguments")
        squared = self._squares(input - target)
        return squared if reduction == "none" else squared.mean() if reduction == "mean" else squared.sum()
