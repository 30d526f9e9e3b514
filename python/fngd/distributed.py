"""What data-parallel ranks tell each other: coefficients, and whether a gradient is finite."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def is_initialized() -> bool:
    """Return whether this process is one of a group: gradients are then reduced inside backward."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: "dist.ProcessGroup | None") -> int:
    """Return how many processes are in the group (None: in all), 1 without torch.distributed."""
    return dist.get_world_size(group) if is_initialized() else 1


def all_reduce_max(
    numbers: Sequence[int], group: "dist.ProcessGroup | None", device: torch.device
) -> list[int]:
    """Return the element-wise maximum over the ranks."""
    maximum = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    return maximum.tolist()


def all_reduce_mean(
    values: Tensor, weights: Tensor, group: "dist.ProcessGroup | None"
) -> tuple[Tensor, Tensor]:
    """Return sum_r w_r v_r / sum_r w_r over the ranks r, and sum_r w_r; where that is 0, the own values."""
    both = torch.stack([torch.where(weights > 0, values * weights, 0), weights])
    dist.all_reduce(both, group=group)
    total, weight = both
    return torch.where(weight > 0, total / torch.where(weight > 0, weight, 1), values), weight


def is_dtensor(t: Tensor) -> bool:
    """Return whether ranks hold parts of a tensor even while it is used, as under tensor parallelism."""
    return type(t).__name__ == "DTensor"  # by name: the import takes long, and can fail


def local_shards(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list["dist.ProcessGroup"]]:
    """Return what this rank holds of each tensor, and the groups, one per mesh dimension, that hold the rest.

    There are no groups where all tensors are whole.
    """
    if not is_initialized():
        return list(tensors), []
    from torch.distributed.tensor import DTensor

    meshes = [t.device_mesh for t in tensors if isinstance(t, DTensor)]
    if not meshes:
        return list(tensors), []
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors], meshes[0].get_all_groups()


def all_reduce_max_(flag: Tensor, groups: Sequence["dist.ProcessGroup"]) -> Tensor:
    """Replace a flag by its largest value over the ranks of a mesh, so that all leave out the same steps."""
    for group in groups:
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return flag
