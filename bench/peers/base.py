"""What an entry of the registry says: which library it needs, and where the peer takes part."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

MOMENTUM = 0.9
SGD_WEIGHT_DECAY = 5e-4
ADAMW_WEIGHT_DECAY = 1e-2

# Equally many rates each, in equal ratios, so that no method is tuned more finely than another.
SGD_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAMW_LRS = (0.0003, 0.001, 0.003, 0.01, 0.03)

Style = dict[str, Any]
"""How matplotlib draws a line: a colour of Okabe and Ito's, and dashes that tell it apart in print."""


def grey() -> Style:
    """Return the style of a peer that has none of its own."""
    return {"color": "#666666", "linestyle": "-"}


class Update(Protocol):
    """The part of torch.optim.Optimizer that training uses; its schedule writes `lr` into the groups."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def step(self) -> Any:
        """Take a step along the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what state_dict returned."""


@dataclass(frozen=True)
class Settings:
    """What is tuned in training: the learning rate and, where there is one, the damping; how FNGD shares."""

    lr: float
    damping: float | None = None
    share: str = "sample"


@dataclass(frozen=True)
class Training:
    """How a peer takes part in training and in the timing of steps.

    Attributes:
        lrs: Learning rates to try.
        build: Makes the update of a model's parameters.
        style: Its line in pictures.
        solves: In which epochs FNGD solves for coefficients.
        damping: The recommended damping, None for a method without.
        period: Steps after which the same work comes again (the refresh of a preconditioner).
        warmup: Steps before the first such period.
        resumes: Whether its state consists of tensors and plain values, so that a checkpoint can be
            trusted.
    """

    lrs: tuple[float, ...]
    build: Callable[[nn.Module, Settings], Update]
    style: Style = field(default_factory=grey)
    solves: Literal["never", "first epoch", "always"] = "never"
    damping: float | None = None
    period: int = 1
    warmup: int = 5
    resumes: bool = True


Setting = dict[str, float]
"""What is tuned on equations, by name."""

Iterate = Callable[[float], int]
"""Takes the share of the seconds that is spent; iterates once or more and returns how many times."""


class Fit(Protocol):
    """A network and the residuals it is to make small: `bench.pinn.task.Task`."""

    @property
    def network(self) -> nn.Module:
        """Return what is trained."""

    @property
    def points(self) -> dict[str, Tensor]:
        """Return the training points by name."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters."""

    def residuals(self) -> dict[str, tuple[Tensor, float]]:
        """Return {block: (residuals (N,), weight)} at the training points."""

    def backward(self) -> Tensor:
        """Return the loss and leave its gradient in `.grad`."""


@dataclass(frozen=True)
class Pinn:
    """How a peer takes part in the comparison on equations.

    Attributes:
        settings: What to try; all peers have equally many.
        build: Makes the iteration from a `Fit` and a setting as keywords.
        style: Its line in pictures.
        regression_only: It cannot take residuals that contain derivatives of the network.
    """

    settings: tuple[Setting, ...]
    build: Callable[..., Iterate]
    style: Style = field(default_factory=grey)
    regression_only: bool = False


@dataclass(frozen=True)
class Peer:
    """An optimizer in comparisons.

    Attributes:
        label: Its name in tables.
        training, pinn: How it takes part in these, None where it does not.
        module, source: The library that has to be importable, and where it comes from.
    """

    label: str
    training: Training | None = None
    pinn: Pinn | None = None
    module: str = "torch"
    source: str = ""

    @property
    def installed(self) -> bool:
        """Whether its library can be imported."""
        return importlib.util.find_spec(self.module) is not None

    def missing(self) -> str | None:
        """Return why the peer cannot run here, None when it can."""
        return None if self.installed else f"{self.label}: no module {self.module!r}; {self.source}"
