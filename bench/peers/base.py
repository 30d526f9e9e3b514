"""What a training loop needs of an optimizer, and how one becomes a line of a comparison."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import nn

MOMENTUM = 0.9
SGD_WEIGHT_DECAY = 5e-4
ADAMW_WEIGHT_DECAY = 1e-2

# equally many rates each, in equal ratios, so that no method is tuned more finely than another
SGD_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAMW_LRS = (0.0003, 0.001, 0.003, 0.01, 0.03)


class Update(Protocol):
    """The part of torch.optim.Optimizer that training uses; its schedule writes `lr` into the groups."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def step(self) -> Any:
        """Take a step along the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """State as tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what state_dict returned."""


@dataclass(frozen=True)
class Settings:
    """What is tuned: the learning rate and, where the method has one, the damping; how FNGD shares."""

    lr: float
    damping: float | None = None
    share: str = "sample"


@dataclass(frozen=True)
class Method:
    """One line of a comparison.

    label: its name in tables
    lrs: learning rates to try
    build: the update of a model's parameters
    solves: in which epochs FNGD solves for coefficients
    damping: the recommended damping, None for a method without
    module, source: the library that has to be importable, and where it comes from
    period: steps after which the same work comes again (the refresh of a preconditioner)
    warmup: steps before the first such period
    resumes: whether its state consists of tensors and plain values, so that a checkpoint can be trusted
    """

    label: str
    lrs: tuple[float, ...]
    build: Callable[[nn.Module, Settings], Update]
    solves: Literal["never", "first epoch", "always"] = "never"
    damping: float | None = None
    module: str = "torch"
    source: str = ""
    period: int = 1
    warmup: int = 5
    resumes: bool = True

    def missing(self) -> str | None:
        """Return why the method cannot run here, None when it can."""
        if importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.label}: no module {self.module!r}; {self.source}"
