"""What data-parallel ranks tell each other: coefficients, and whether a gradient is finite."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def in_use() -> bool:
    """Return whether this process is one of a group: gradients then leave inside backward."""
    return dist.is_available() and dist.is_initialized()


def ranks(group: "dist.ProcessGroup | None") -> int:
    """Return how many processes are in the group (None: in all), 1 without torch.distributed."""
    return dist.get_world_size(group) if in_use() else 1


def largest(numbers: Sequence[int], group: "dist.ProcessGroup | None", device: torch.device) -> list[int]:
    """Return the element-wise maximum over the ranks."""
    maximum = torch.tensor(numbers, device=device)
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    return maximum.tolist()


def weighted_mean(
    values: Tensor, weights: Tensor, group: "dist.ProcessGroup | None"
) -> tuple[Tensor, Tensor]:
    """Return sum_r w_r v_r / sum_r w_r over the ranks r, and sum_r w_r; the own values where that is 0."""
    both = torch.stack([torch.where(weights > 0, values * weights, 0), weights])
    dist.all_reduce(both, group=group)
    total, weight = both
    return torch.where(weight > 0, total / torch.where(weight > 0, weight, 1), values), weight


def is_split(weight: Tensor) -> bool:
    """Return whether ranks hold parts of a weight even while it is used, as under tensor parallelism."""
    return type(weight).__name__ == "DTensor"  # by name: the import takes long, and can fail


def local_shards(tensors: Sequence[Tensor]) -> tuple[list[Tensor], "dist.ProcessGroup | None"]:
    """Return what this rank holds of each tensor, and the ranks that hold the rest: None for whole ones."""
    if not in_use():
        return list(tensors), None
    from torch.distributed.tensor import DTensor

    sharded = [t for t in tensors if isinstance(t, DTensor)]
    if not sharded:
        return list(tensors), None
    mesh = sharded[0].device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors], group


def on_any_rank(found: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """Return the largest `found` of the group's ranks, so that all of them leave out the same steps."""
    if group is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found
