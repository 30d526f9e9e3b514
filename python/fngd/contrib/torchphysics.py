"""GaussNewton inside torchphysics' Solver."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torchphysics.problem.conditions import DataCondition, ParameterCondition
from torchphysics.problem.conditions.condition import SquaredError
from torchphysics.problem.spaces import Points
from torchphysics.solver import OptimizerSetting

from .squares import ClosureGaussNewton, Squares, plain_inputs


class GaussNewton(OptimizerSetting):
    """A setting for `Solver(conditions, optimizer_setting=GaussNewton(conditions))`.

    Args:
        conditions: The solver's train_conditions. Their modules and their Parameters are optimized.
        lr, scheduler_class, scheduler_args, scheduler_frequency: As of OptimizerSetting.
        **settings: Those of `fngd.GaussNewton`.
    """

    def __init__(
        self,
        conditions: Iterable[nn.Module],
        lr: float = 1.0,
        *,
        scheduler_class: Any = None,
        scheduler_args: dict[str, Any] | None = None,
        scheduler_frequency: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(
            partial(_Optimizer, list(conditions)),
            lr,
            settings,
            scheduler_class,
            scheduler_args or {},
            scheduler_frequency,
        )


class _Optimizer(ClosureGaussNewton):
    def __init__(self, conditions: list[Any], params: Iterable[Tensor], **settings: Any) -> None:
        self._model = nn.ModuleList(conditions)
        params = [p for p in params if p.numel()]  # a condition without a Parameter has an empty one
        super().__init__(self._model, params=params, **settings)
        self._conditions = conditions
        self._replays: list[_Replay] = []

    def step(self, closure: Callable[[], Any]) -> Tensor:  # type: ignore[override]
        for condition in self._conditions:
            _refuse_other_norms(condition)
        samplers = {id(s): s for condition in self._conditions for s in vars(condition).values()}
        self._replays = [
            _Replay(sampler, name)
            for sampler in samplers.values()
            for name in ("sample_points", "sample_functions")
            if hasattr(sampler, name)
        ]
        self._replays += [_Replay(c, "_compute_dist") for c in self._conditions if _draws_batches(c)]
        return super().step(closure)

    @contextmanager
    def _recording(self, squares: Squares) -> Iterator[None]:
        def squared_error(self: SquaredError, x: Tensor) -> Tensor:
            return _over_components(squares(x))

        with ExitStack() as stack:
            stack.enter_context(plain_inputs(self._model, _plain))
            for replay in self._replays:
                stack.enter_context(_replaced(replay.owner, replay.name, replay.evaluation(squares)))
            for condition in self._conditions:
                if isinstance(condition, ParameterCondition):
                    penalty = partial(_penalty, squares, condition)
                    stack.enter_context(_replaced(condition, "forward", penalty))
                elif _draws_batches(condition) and not squares.is_first:
                    stack.enter_context(_replaced(condition, "iterator", repeat(None)))
            stack.enter_context(_replaced(SquaredError, "forward", squared_error))
            yield


def _plain(x: Any) -> Any:
    return x.as_tensor if isinstance(x, Points) else x


class _Replay:
    """What a sampler or a data loader gives in the first evaluation of a step, again in the others."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self._function = getattr(owner, name)
        self._given: list[Any] = []

    def evaluation(self, squares: Squares) -> Callable[..., Any]:
        """Return the function for one evaluation of the loss."""
        given = self._given
        again = None if squares.is_first else iter(given)

        def batch(data: Any, device: Any) -> Tensor:
            if again is None:
                given.append(data)
            data = data if again is None else next(again)
            if isinstance(self.owner, DataCondition):
                return _over_components(squares(_data_residuals(self.owner, data, device)))
            return self._function(data, device)

        def sample(*args: Any, **kwargs: Any) -> Any:
            if again is not None:
                return next(again)
            given.append(self._function(*args, **kwargs))
            return given[-1]

        return batch if self.name == "_compute_dist" else sample


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _draws_batches(condition: Any) -> bool:
    return hasattr(condition, "_compute_dist")


def _refuse_other_norms(condition: Any) -> None:
    kind = f"condition {condition.name!r} ({type(condition).__name__})"
    error = getattr(condition, "error_fn", None)
    if error is not None and type(error) is not SquaredError:
        raise ValueError(f"{kind}: expected SquaredError, GaussNewton minimises mean squares; got {error}")
    if isinstance(condition, DataCondition) and (condition.norm != 2 or condition.root != 1):
        got = f"norm={condition.norm}, root={condition.root}"
        raise ValueError(f"{kind}: expected norm=2, root=1, GaussNewton minimises mean squares; got {got}")


def _over_components(squared: Tensor) -> Tensor:
    return torch.sum(squared, dim=list(range(1, squared.ndim)))  # as SquaredError does


def _data_residuals(condition: Any, batch: Any, device: Any) -> Tensor:
    """Return the residuals of a DataCondition, whose squares its _compute_dist adds up."""
    x, y = (points.to(device) for points in batch)
    output = condition.module(x)
    if condition.constrain_fn:
        values = condition.constrain_fn({**output.coordinates, **x.coordinates})
    else:
        values = output.as_tensor
    residuals = values - y.as_tensor
    if not condition.relative:
        return residuals
    size = _over_components(y.as_tensor.square()) + condition.epsilon
    return residuals / size.sqrt().view(-1, *[1] * (residuals.ndim - 1))


def _penalty(squares: Squares, condition: Any, **unused: Any) -> Tensor:
    """Return the penalty of a ParameterCondition, the square of its root."""
    penalty = condition.penalty(condition.parameter.coordinates)
    if bool((penalty < 0).any()):
        raise ValueError(f"condition {condition.name!r}: expected a penalty >= 0, got {penalty}")
    positive = penalty > 0
    return squares(torch.where(positive, penalty, 1).sqrt() * positive)
