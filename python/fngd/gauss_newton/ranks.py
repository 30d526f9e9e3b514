"""Sums over the ranks of a data-parallel run, each of which holds some of the residuals."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The ranks of a process group; this process alone where there is none."""

    def __init__(self, group: "dist.ProcessGroup | None") -> None:
        self._group = group

    @property
    def alone(self) -> bool:
        """Return whether this process holds all residuals."""
        return self._group is None

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks, in place; the same on all of them."""
        if self._group is not None:
            dist.all_reduce(x, group=self._group)
        return x

    def check_equal(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise ValueError where a parameter differs between the ranks."""
        if self._group is None:
            return
        sums = torch.stack([p.detach().double().sum() for p in parameters.values()])
        least, most = sums.clone(), sums.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._group)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._group)
        differing = [name for name, differs in zip(parameters, least != most, strict=True) if differs]
        if differing:
            raise ValueError(
                f"model: expected equal parameters on all ranks, {', '.join(differing)} differ; "
                "broadcast them, or load the same state"
            )

    def sums(self, own: dict[str, int]) -> dict[str, int]:
        """Return the sums of numbers by name.

        Raises:
            ValueError: The ranks have numbers of different names.
        """
        if self._group is None:
            return own
        of_all: list[dict[str, int]] = [{}] * dist.get_world_size(self._group)
        dist.all_gather_object(of_all, own, group=self._group)
        names = {tuple(each) for each in of_all}
        if len(names) > 1:
            raise ValueError(f"residuals: expected the same blocks on all ranks, got {sorted(names)}")
        return {name: sum(each[name] for each in of_all) for name in own}
