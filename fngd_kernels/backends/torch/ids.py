"""The range of an embedding's ids."""

from torch import Tensor

from ...arguments import LIMIT


def check_ids(ids: Tensor, num_embeddings: int | None = None) -> None:
    """Require ids (N, ...) from 0 on, below num_embeddings where it is given; a GPU is not waited for."""
    if ids.device.type != "cpu":
        return
    lowest, highest = map(int, ids.aminmax())
    # Where it is not given, ids are multiplied by N.
    end = LIMIT // len(ids) if num_embeddings is None else num_embeddings
    if lowest < 0 or highest >= end:
        raise ValueError(f"ids: expected 0 to {end - 1}, got {lowest} to {highest}")
