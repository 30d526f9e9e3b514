"""The range of an embedding's ids."""

from torch import Tensor

from ...arguments import LIMIT


def check_ids(ids: Tensor, num_embeddings: int | None = None) -> None:
    """Require ids (N, ...) >= 0, and below num_embeddings if it is given. Ids on a GPU are not checked."""
    # Checking them would make the host wait for the GPU.
    if ids.device.type != "cpu":
        return
    lowest, highest = map(int, ids.aminmax())
    # If num_embeddings is not given, ids are multiplied by N in 64 bits.
    end = LIMIT // len(ids) if num_embeddings is None else num_embeddings
    if lowest < 0 or highest >= end:
        raise ValueError(f"ids: expected 0 to {end - 1}, got {lowest} to {highest}")
