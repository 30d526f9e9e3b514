"""Self-scaled BFGS and Broyden with the whole inverse Hessian, after Adam or from the start.

Sources: Urban, Stefanou and Pons, "Unveiling the optimization process of physics informed neural networks",
arXiv 2405.04230, and Kiyani et al., arXiv 2501.16371, who take the updates from Al-Baali, "Numerical
experience with a class of self-scaling quasi-Newton algorithms", 1998 (BFGS), and Al-Baali and Khalfan, "A
wide interval for efficient self-scaling quasi-Newton algorithms", 2005 (Broyden's family).
"""

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bench.peers.adam import adam
from bench.peers.base import Fit, Iterate, Peer, Pinn

# Of the line search: sufficient decrease and strong Wolfe, the values of all quasi-Newton methods.
DECREASE, CURVATURE = 1e-4, 0.9
# Before the quasi-Newton iterations, as the sources do.
ADAM_LR = 5e-3
TINY = 1e-300

Objective = Callable[[Tensor], tuple[float, Tensor]]
"""Returns the value and the gradient (P,) at parameters (P,)."""


def scaling(b: float, h: float, size: int, *, broyden: bool) -> tuple[float, float]:
    """Return what the inverse Hessian is divided by, and the share of BFGS in the update: tau and phi.

    Args:
        b: s B s / y s with the Hessian B = 1 / H, step s and change of the gradient y.
        h: y H y / y s.
        size: Number of parameters.
        broyden: Whether the share is chosen too; without, it is 1.
    """
    scale = min(1.0, 1 / b)
    if not broyden:
        return scale, 1.0
    # Cauchy and Schwarz: a > 0.
    a = max(b * h - 1, 1e-14)
    least = min(1.0, h * (1 - math.sqrt(a / (1 + a))))
    theta = max((least - 1) / a, min(1 / least, (1 - b) / b))
    growth = 1 + a * theta
    # To the power of 1 / (P - 1): the determinant keeps its size.
    spread = abs(growth) ** (-1 / max(size - 1, 1))
    tau = scale * min(spread, 1 / theta) if theta > 0 else min(scale * spread, growth)
    return tau, (1 - theta) / growth


class SelfScaled:
    """Minimises a function along -H g, with a strong Wolfe line search.

    Attributes:
        x: The parameters (P,).
        inverse: The inverse Hessian H (P,P).
    """

    def __init__(self, objective: Objective, x: Tensor, *, broyden: bool) -> None:
        self.x, self._objective, self._broyden = x, objective, broyden
        self.inverse = torch.eye(len(x), dtype=x.dtype)
        self._value, self._gradient = objective(x)
        self._direction = -self._gradient
        # Makes the first trial a step of length about 1, as in scipy's BFGS.
        self._before = self._value + float(self._gradient.norm()) / 2

    def step(self) -> bool:
        """Iterate once; return False, with H forgotten, where the line search found no better point."""
        found = self._search()
        if found is None:
            self.inverse = torch.eye(len(self.x), dtype=self.x.dtype)
            self._direction = -self._gradient
            self._before = self._value + float(self._gradient.norm()) / 2
            return False
        length, value, gradient = found
        s, y = length * self._direction, gradient - self._gradient
        # B s without B: the direction was -H g.
        curvature, bs = float(y @ s), -length * float(self._gradient @ s)
        times_gradient = self.inverse @ gradient
        hy = times_gradient + self._direction
        self.x = self.x + s
        self._before, self._value, self._gradient = self._value, value, gradient
        self._direction = -times_gradient
        yhy = float(y @ hy)
        if min(curvature, yhy, bs) > TINY:
            self._update(s, hy, curvature, yhy, bs)
        return True

    def _update(self, s: Tensor, hy: Tensor, ys: float, yhy: float, sbs: float) -> None:
        """Replace H by (H - Hy yH / yHy + phi yHy v v) / tau + s s / ys, v = s / ys - Hy / yHy."""
        tau, phi = scaling(sbs / ys, yhy / ys, len(s), broyden=self._broyden)
        mixed = -phi / ys / tau
        core = torch.tensor(
            [[(phi - 1) / yhy / tau, mixed], [mixed, phi * yhy / ys**2 / tau + 1 / ys]], dtype=s.dtype
        )
        pair = torch.stack([hy, s], dim=1)
        # The direction was made with the former H.
        self._direction = self._direction / tau - pair @ (core @ (pair.T @ self._gradient))
        self.inverse.addmm_(pair @ core, pair.T, beta=1 / tau)

    def _search(self) -> tuple[float, float, Tensor] | None:
        """Return a step length with the value and the gradient there, None where none is found."""
        from scipy.optimize import line_search

        last: tuple[np.ndarray, float, Tensor] | None = None

        def at(x: np.ndarray) -> tuple[float, Tensor]:
            nonlocal last
            if last is None or not np.array_equal(last[0], x):
                last = (x.copy(), *self._objective(torch.from_numpy(x)))
            return last[1], last[2]

        with warnings.catch_warnings():
            # That it fails is returned.
            warnings.simplefilter("ignore")
            length, _, _, value, _, _ = line_search(
                lambda x: at(x)[0],
                lambda x: at(x)[1].numpy(),
                self.x.numpy(),
                self._direction.numpy(),
                self._gradient.numpy(),
                self._value,
                self._before,
                c1=DECREASE,
                c2=CURVATURE,
                maxiter=20,
            )
        if length is None or not value <= self._value:
            return None
        value, gradient = at((self.x + length * self._direction).numpy())
        return float(length), value, gradient


def of_network(task: Fit) -> Objective:
    """Return the loss of a task as a function of all parameters as one vector."""

    def objective(x: Tensor) -> tuple[float, Tensor]:
        # Copied: the parameters would become views of x.
        vector_to_parameters(x.clone(), task.parameters)
        value = task.backward().item()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in task.parameters]
        return value, parameters_to_vector(gradients)

    return objective


def _build(task: Fit, *, adam_share: float, broyden: float) -> Iterate:
    first = adam(task, lr=ADAM_LR)
    then: SelfScaled | None = None

    def step(spent: float) -> int:
        nonlocal then
        if spent < adam_share:
            return first(spent / adam_share)
        if then is None:
            start = parameters_to_vector(task.parameters).detach()
            then = SelfScaled(of_network(task), start, broyden=bool(broyden))
        then.step()
        # A line search ends at any of its trials.
        vector_to_parameters(then.x.clone(), task.parameters)
        return 1

    return step


PEERS = {
    "ssbroyden": Peer(
        "SSBroyden",
        pinn=Pinn(
            tuple({"adam_share": share, "broyden": family} for share in (0.0, 0.1) for family in (1.0, 0.0)),
            _build,
            {"color": "#8C564B", "linestyle": "--"},
        ),
        module="scipy",
        source="pip install scipy",
    )
}
