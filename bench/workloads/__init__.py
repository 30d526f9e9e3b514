"""Data sets as tensors: each module loads one family, `load` finds it by name."""

from __future__ import annotations

from pathlib import Path

from bench.workloads import cifar, digits
from bench.workloads.common import Split, Workload

__all__ = ["NAMES", "Split", "Workload", "load"]

NAMES = ("digits", *cifar.NAMES)


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    cache_dir: Path = Path("runs/cache"),
    train_size: int | None = None,
) -> Workload:
    """Load the workload called `name`; only the CIFAR sets use `data_dir` and `cache_dir`.

    Raises: ValueError for an unknown name, a missing data folder or a bad archive.
    """
    if name == "digits":
        return digits.load(train_size=train_size)
    if name not in cifar.NAMES:
        raise ValueError(f"data: expected one of {', '.join(NAMES)}, got {name!r}")
    if data_dir is None:
        raise ValueError(f"data_dir: {name} needs the folder that holds its archive, got none")
    return cifar.load(name, data_dir, cache_dir=cache_dir, train_size=train_size)
