"""From a framework's closure, which returns a scalar loss, to the residuals in it."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..gauss_newton import GaussNewton

NO_HISTORY = ("to not have been used", "does not require grad", "expected a non-empty list of Tensors")
"""Errors of a framework that differentiates its loss, or collects gradients that did not come."""


class Squares:
    """The residuals of a step, whose squares a framework weighs and adds up to its loss.

    The framework is given the squares as numbers without a history, so that its backward costs nothing and
    leaves in their gradient how much each of them counts. A step evaluates the loss several times: weights
    are those of the first time, and the framework is shown the squares of the first time again, so that it
    logs the loss before the step.
    """

    def __init__(self) -> None:
        self.is_first = True
        """Whether the framework evaluates its loss for the first time in this step."""
        self._residuals: list[Tensor] = []  # of the present evaluation
        self._shown: list[Tensor] = []
        self._weights: list[Tensor] = []

    def __call__(self, residuals: Tensor) -> Tensor:
        """Note residuals of any shape and return their squares for the framework to go on with."""
        residuals = residuals.as_subclass(Tensor)
        if not residuals.requires_grad:
            return residuals.square()
        self._residuals.append(residuals)
        if self.is_first:
            self._shown.append(residuals.detach().square().requires_grad_())
            return self._shown[-1]
        number = len(self._residuals) - 1
        if number >= len(self._shown) or residuals.shape != self._shown[number].shape:
            raise ValueError(
                "residuals: those of a trial step are not of the shapes that they had before; every "
                "evaluation within a step must see the same points"
            )
        return self._shown[number].detach().clone().requires_grad_()

    def blocks(self, closure: Callable[[], Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Return the blocks of residuals for GaussNewton.

        Args:
            closure: Returns the loss after its backward.
            parameters: What is optimized.

        Raises:
            ValueError: A loss that is not a sum of weighted squares of residuals.
        """
        self._residuals = []
        loss = self._closed(closure)
        if self.is_first:
            self._weights = [torch.zeros_like(s) if s.grad is None else s.grad for s in self._shown]
            self._refuse_other_losses(loss, parameters)
            self.is_first = False
        elif len(self._residuals) != len(self._shown):
            raise ValueError(
                f"residuals: {len(self._residuals)} terms in a trial step, {len(self._shown)} before it"
            )
        pairs = zip(self._residuals, self._weights, strict=True)
        return {str(i): _block(r, w) for i, (r, w) in enumerate(pairs) if bool(w.any())}

    def _closed(self, closure: Callable[[], Any]) -> Any:
        try:
            return closure()
        except (RuntimeError, ValueError) as error:
            if any(sign in str(error) for sign in NO_HISTORY):
                raise ValueError(
                    "loss: expected weighted mean squares of residuals; a derivative of the loss itself, as "
                    "some weightings of conditions take, is not served"
                ) from error
            raise

    def _refuse_other_losses(self, loss: Any, parameters: Sequence[Tensor]) -> None:
        if not isinstance(loss, Tensor) or not self._shown:
            raise ValueError("loss: expected mean squares of residuals, found none in it")
        if any(p.grad is not None for p in parameters):
            raise ValueError(
                "loss: a part of it is no mean square of residuals (a regularization, an energy, another "
                "norm), or gradients of several batches are added up; neither is served"
            )
        weighted = sum(float((w * s.detach()).sum()) for w, s in zip(self._weights, self._shown, strict=True))
        found = float(loss.detach().sum())
        rounding = max(torch.finfo(t.dtype).eps for t in (loss, *self._shown))
        if abs(found - weighted) > 1e3 * rounding * max(abs(found), abs(weighted)):
            raise ValueError(
                f"loss: expected a sum of weighted squares of residuals, which is {weighted:.6g}, found "
                f"{found:.6g}; roots of mean squares, other norms and further terms are not served"
            )
        if any(bool((w < 0).any()) for w in self._weights):
            raise ValueError("loss: expected weights >= 0 of squared residuals")


def _block(residuals: Tensor, weights: Tensor) -> Any:
    """Return (N,) or (N, C) residuals with the weight of their mean square."""
    total = weights * weights.numel()
    weight = total.flatten()[0]
    if bool((total == weight).all()):
        return _as_rows(residuals), float(weight)
    return _as_rows(residuals * total.sqrt()), 1.0


def _as_rows(residuals: Tensor) -> Tensor:
    return residuals.reshape(-1) if residuals.ndim < 2 else residuals.flatten(0, -2)


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding)


@contextmanager
def plain_inputs(model: nn.Module, plain: Callable[[Any], Any]) -> Iterator[None]:
    """Have layers called on what `plain` makes of their input; only calls on plain tensors are captured."""

    def convert(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map(plain, inputs))

    hooks = [m.register_forward_pre_hook(convert) for m in model.modules() if isinstance(m, LAYERS)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class ClosureGaussNewton(GaussNewton):
    """GaussNewton for loops that call step with a closure that returns the loss, after its backward."""

    def step(self, closure: Callable[[], Any]) -> Tensor:  # type: ignore[override]
        """Make one step on the residuals in the framework's loss and return the loss before it.

        Raises:
            TypeError, ValueError: As GaussNewton.step, and a loss that is not made of squared residuals.
        """
        squares = Squares()
        parameters = [p for group in self.param_groups for p in group["params"]]

        def residuals() -> dict[str, Any]:
            with self._recording(squares):
                return squares.blocks(closure, parameters)

        return super().step(residuals)

    @abstractmethod
    def _recording(self, squares: Squares) -> AbstractContextManager[None]:
        """Return a context in which the framework takes its squares from `squares`."""
