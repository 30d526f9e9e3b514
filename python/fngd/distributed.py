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


def local_shards(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list["dist.ProcessGroup"]]:
    """Return what this rank holds of each tensor, and the groups, one per mesh dimension, that hold the rest.

    There are no groups where all tensors are whole.
    """
    if not in_use():
        return list(tensors), []
    from torch.distributed.tensor import DTensor

    meshes = [t.device_mesh for t in tensors if isinstance(t, DTensor)]
    if not meshes:
        return list(tensors), []
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors], meshes[0].get_all_groups()


def on_any_rank(found: Tensor, groups: Sequence["dist.ProcessGroup"]) -> Tensor:
    """Return the largest `found` over the ranks of a mesh, so that all of them leave out the same steps."""
    for group in groups:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found
