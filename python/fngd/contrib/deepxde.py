"""GaussNewton inside DeepXDE's Model.train, with its PyTorch backend."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepxde import config
from deepxde.backend import backend_name
from deepxde.losses import mean_squared_error
from torch import Tensor

from .squares import ClosureGaussNewton, Squares

if backend_name != "pytorch":
    raise ImportError(f"fngd.contrib.deepxde: expected DDE_BACKEND=pytorch, DeepXDE runs on {backend_name}")


class GaussNewton(ClosureGaussNewton):
    """An optimizer for `model.compile(GaussNewton(model))`; loss weights and conditions are the model's.

    Args:
        model: The deepxde.Model. Its external_trainable_variables are optimized with its network.
        **settings: Those of `fngd.GaussNewton`.
    """

    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__(model.net, **settings)
        self._owner = model

    def step(self, closure: Callable[[], Any]) -> Tensor:  # type: ignore[override]
        """Make one step on what the model's loss is made of, and return the loss before it.

        Raises:
            ValueError: A loss other than MSE, a regularizer, or mixed precision.
        """
        if self._owner.net.regularizer is not None:
            raise ValueError(f"regularizer: expected None, got {self._owner.net.regularizer}")
        if config.mixed:
            raise ValueError("mixed precision: expected float32 or float64")
        self._adopt(self._owner.external_trainable_variables)
        return super().step(closure)

    def _adopt(self, variables: list[Tensor]) -> None:
        """Optimize the unknowns given to compile, in the first group: a scheduler knows the groups."""
        known = {p for group in self.param_groups for p in group["params"]}
        missing = [v for v in variables if v not in known]
        if missing:
            before = list(self.param_groups)
            self.param_groups.clear()
            try:
                self.add_param_group(before[0] | {"params": [*before[0]["params"], *missing]})
                self.param_groups.extend(before[1:])
            except (TypeError, ValueError):
                self.param_groups.extend(before)
                raise

    @contextmanager
    def _recording(self, squares: Squares) -> Iterator[None]:
        data = self._owner.data
        losses = data.losses_train

        def square_means(target: Tensor, output: Tensor) -> Tensor:
            if target.shape != output.shape:
                shapes = f"{tuple(target.shape)} and {tuple(output.shape)}"
                raise ValueError(f"loss: expected targets of the outputs' shape, got {shapes}")
            return squares(output - target).mean()

        def losses_train(targets: Any, outputs: Any, loss_fn: Any, *rest: Any, **more: Any) -> Any:
            several = isinstance(loss_fn, (list, tuple))
            for each in loss_fn if several else [loss_fn]:
                if each is not mean_squared_error and not _is_torch_mse(each):
                    name = getattr(each, "__name__", type(each).__name__)
                    raise ValueError(f"loss: GaussNewton minimises mean squares, expected 'MSE', got {name}")
            own = [square_means] * len(loss_fn) if several else square_means
            return losses(targets, outputs, own, *rest, **more)

        data.losses_train = losses_train
        try:
            yield
        finally:
            del data.losses_train


def _is_torch_mse(loss: Any) -> bool:
    if isinstance(loss, torch.nn.MSELoss):
        return loss.reduction == "mean"
    return loss is torch.nn.functional.mse_loss
