"""The update rule under FNGD: a torch.optim optimizer that leaves out steps whose gradient is not finite."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fngd_kernels.ops.finite import unchecked as found_non_finite

from .distributed import all_reduce_max_, local_shards
from .event_log import DeviceCounts, EventLog
from .torch_private import step_without_global_hooks

SHARED = ("state", "param_groups")
"""What an optimizer saves that the base and its owner have in common."""

LEFT_OUT = "left out, its gradient is not finite"


class Update:
    """Runs a base optimizer on the groups and the state of another optimizer, its owner."""

    def __init__(self, base: Optimizer, owner: Optimizer, device: torch.device) -> None:
        self.base = base
        # Counted on the device: a fused update is left out without the host knowing.
        self._skipped = DeviceCounts((), device)
        self._log = EventLog("step")
        self.link(owner)

    def link(self, owner: Optimizer) -> None:
        """Let the base optimizer work on what its owner holds now; a user may have put other state there."""
        self.base.param_groups = owner.param_groups
        self.base.state = owner.state
        self._with_momentum: list[int] = []  # the parameters, by id, when all had begun

    def own_state(self) -> dict[str, Any]:
        """Return what the base optimizer saves beside state and groups: counters, modes, schedules."""
        return {key: value for key, value in self.base.state_dict().items() if key not in SHARED}

    @contextmanager
    def saving(self, owner: Optimizer) -> Iterator[None]:
        """Inside, the owner's state_dict() holds state and groups in the form that the base saves them in."""

        def saved_by_base(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            saved = self.base.state_dict()
            return {key: saved[key] for key in SHARED}

        self.link(owner)
        # Before the owner's hooks, which may change what is saved.
        handle = owner.register_state_dict_post_hook(saved_by_base, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def loading(self, owner: Optimizer, own_state: Mapping[str, Any]) -> Iterator[None]:
        """Inside, the owner's load_state_dict() has the base load state and groups, and its own state.

        What `own_state` lacks stays as it is. When the base refuses, the owner keeps what it has.
        """

        def load_by_base(_: Optimizer, state: dict[str, Any]) -> None:
            shared = {key: state[key] for key in SHARED}
            self.base.load_state_dict({**self.own_state(), **own_state, **shared})

        def take_over(owner: Optimizer) -> None:
            owner.state, owner.param_groups = self.base.state, self.base.param_groups  # type: ignore[assignment]

        self.link(owner)
        # After the owner's hooks that change what is loaded, before those that change what was.
        handles = (
            owner.register_load_state_dict_pre_hook(load_by_base),
            owner.register_load_state_dict_post_hook(take_over, prepend=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.link(owner)

    @property
    def skips_on_device(self) -> bool:
        """Whether the base optimizer itself leaves out a step by found_inf, without the host waiting."""
        return getattr(self.base, "_step_supports_amp_scaling", False) and all(
            group.get("fused", True) and not group.get("dampening") for group in self.base.param_groups
        )

    def step(self, owner: Optimizer, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """Update the parameters, unless a gradient is not finite.

        Args:
            owner: Whose groups and state.
            found_inf: () or (1,) 1 if one is not; None where nobody looked yet.
            grad_scale: What a fused update divides the gradients by, None for 1.
        """
        if self.base.state is not owner.state or self.base.param_groups is not owner.param_groups:
            self.link(owner)
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
        base: Any = self.base
        base.found_inf, base.grad_scale = found_inf, grad_scale
        try:
            step_without_global_hooks(base)
        finally:
            del base.found_inf, base.grad_scale

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
        found = found_non_finite(dense) if dense else self._skipped.values.new_zeros(1, dtype=torch.float32)
        return all_reduce_max_(found, groups)
