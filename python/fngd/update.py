"""The update rule under FNGD: a torch.optim optimizer that leaves out steps whose gradient is not finite."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fngd_kernels.ops.finite import unchecked as found_non_finite

from .distributed import all_reduce_max_, local_shards
from .event_log import DeviceCounts, EventLog

_BASES: dict[str, type[Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
_NAMES = ", ".join(map(repr, _BASES))
LEFT_OUT = "left out, its gradient is not finite"
_FUSED_ON_CUDA = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class Update:
    """Runs a base optimizer on the groups and the state of another optimizer, its owner."""

    def __init__(self, base: Optimizer, owner: Optimizer, device: torch.device) -> None:
        self.base = base
        # Counted on the device: a fused update is left out without the host knowing.
        self._skipped = DeviceCounts((), device)
        self._log = EventLog("step")
        self.link(owner)

    def link(self, owner: Optimizer) -> None:
        """Let the base optimizer work on what its owner holds now."""
        self.base.param_groups = owner.param_groups
        self.base.state = owner.state
        self._with_momentum: list[int] = []  # the parameters, by id, when all had begun

    @property
    def skips_on_device(self) -> bool:
        """Whether the base optimizer itself leaves out a step by found_inf, without the host waiting."""
        return getattr(self.base, "_step_supports_amp_scaling", False) and all(
            group.get("fused", True) and not group.get("dampening") for group in self.base.param_groups
        )

    def step(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """Update the parameters, unless a gradient is not finite.

        Args:
            found_inf: () or (1,) 1 if one is not; None where nobody looked yet.
            grad_scale: What a fused update divides the gradients by, None for 1.
        """
        if found_inf is None:
            found_inf = self._found_non_finite()
        if self.skips_on_device:
            found_inf = found_inf.view(())
            self._skipped.values += found_inf
            self._skipped.send()
            self._log_skipped()
            self._begin_momentum()
        elif found_inf:
            self._skipped.values += 1
            self._log_skipped()
            return
        else:
            found_inf = None
        self.base.found_inf, self.base.grad_scale = found_inf, grad_scale  # type: ignore[attr-defined]
        self.base.step()

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out so far; waits for the device."""
        return int(self._skipped.values)

    @skipped_steps.setter
    def skipped_steps(self, steps: int) -> None:
        self._skipped.load(steps)
        self._log.counts[LEFT_OUT] = steps

    def _log_skipped(self) -> None:
        """Log the steps that were left out, as far as the host knows of them."""
        new = int(self._skipped.arrived) - self._log.counts[LEFT_OUT]
        if new:
            self._log.count(LEFT_OUT, new)

    def _begin_momentum(self) -> None:
        """Write the momentum 0 that torch's fused SGD leaves undefined when its first step is left out."""
        parameters = [p for g in self.base.param_groups if g.get("momentum") for p in g["params"]]
        state, numbers = self.base.state, list(map(id, parameters))
        # The usual case, told without a look at every state; a user may have emptied it.
        if numbers == self._with_momentum and len(numbers) <= len(state):
            return
        without = [p for p in parameters if state[p].get("momentum_buffer") is None]
        begun = [p for p in without if p.grad is not None]
        for p in begun:
            state[p]["momentum_buffer"] = torch.zeros_like(p)
        self._with_momentum = numbers if len(begun) == len(without) else []

    def _found_non_finite(self) -> Tensor:
        """Return 1 if a gradient holds NaN or infinity, else 0: (1,) float32."""
        gradients = (p.grad for group in self.base.param_groups for p in group["params"])
        local, groups = local_shards([g for g in gradients if g is not None])
        dense = [g.coalesce().values() if g.is_sparse else g for g in local]
        dense = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in dense]
        found = found_non_finite(dense) if dense else torch.zeros(1, device=self._skipped.values.device)
        return all_reduce_max_(found, groups)


def base_class(base: str | type[Optimizer]) -> type[Optimizer]:
    """Return the torch.optim class that the argument `base` of FNGD names.

    Raises:
        TypeError: What is no optimizer.
        ValueError: A name or an optimizer that cannot serve.
    """
    if isinstance(base, str):
        if base not in _BASES:
            raise ValueError(f"base: expected one of {_NAMES}, got {base!r}")
        return _BASES[base]
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(f"base: expected {_NAMES} or a torch.optim class, got {base!r}")
    if issubclass(base, torch.optim.LBFGS):
        raise ValueError("base: LBFGS evaluates the loss several times a step, weighted gradients only once")
    return base


def fuses_on_cuda(base: type[Optimizer], model: nn.Module, options: dict[str, Any]) -> bool:
    """Return whether torch's fused update can be chosen for a user who named no other."""
    return (
        base in _FUSED_ON_CUDA
        and not options.keys() & {"fused", "foreach", "capturable", "differentiable"}
        and all(p.is_cuda and p.is_floating_point() for p in model.parameters())
        and not any(getattr(module, "sparse", False) for module in model.modules())
    )
