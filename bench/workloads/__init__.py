"""Data sets as tensors: each module loads one family, `load` finds it by name."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.workloads import cifar, digits, multi30k
from bench.workloads.images import Split, Workload

__all__ = ["NAMES", "Split", "Task", "Workload", "load"]

NAMES = ("digits", *cifar.NAMES, multi30k.NAME)


class Task(Protocol):
    """What a training run needs of its data; `metric` names the score, `target` is a validation accuracy."""

    metric: str

    @property
    def title(self) -> str:
        """Return the name for tables and pictures."""

    @property
    def target(self) -> float:
        """Return the validation accuracy whose first epoch is looked for."""

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of samples by split."""

    @property
    def device(self) -> torch.device:
        """Return where the data is."""

    @property
    def validation(self) -> Any:
        """Return the split on which settings are chosen."""

    @property
    def test(self) -> Any:
        """Return the split that every final run reads once."""

    @property
    def replaced(self) -> Tensor | None:
        """Return the mask of the training labels replaced at random, None where none was."""

    def model(self, name: str, width: int) -> nn.Module:
        """Return the network called `name`."""

    def batches(self, batch_size: int, generator: torch.Generator) -> DataLoader:
        """Return the training batches."""

    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
        """Return the mean training loss of a batch."""

    def evaluate(self, model: nn.Module, split: Any) -> tuple[float, float]:
        """Return mean loss and accuracy."""

    def score(self, model: nn.Module, split: Any) -> float:
        """Return the metric."""


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    cache_dir: Path = Path("runs/cache"),
    train_size: int | None = None,
    label_noise: float = 0.0,
    device: torch.device | None = None,
) -> Task:
    """Return the task called `name`; all but digits need `data_dir`.

    Args:
        label_noise: Share of the training labels to replace at random, for images.

    Raises:
        ValueError: An unknown name, a missing data folder or a bad archive.
    """
    if name not in NAMES:
        raise ValueError(f"data: expected one of {', '.join(NAMES)}, got {name!r}")
    if name != "digits" and data_dir is None:
        raise ValueError(f"data_dir: {name} needs the folder that holds its archive, got none")
    device = device or torch.device("cpu")
    if data_dir is not None and name == multi30k.NAME:
        if label_noise:
            raise ValueError("label_noise: expected 0 for a translation task, whose labels are sentences")
        return multi30k.load(data_dir, cache_dir=cache_dir, train_size=train_size).to(device)
    if data_dir is not None and name in cifar.NAMES:
        images = cifar.load(name, data_dir, cache_dir=cache_dir, train_size=train_size)
    else:
        images = digits.load(train_size=train_size)
    return (images.with_label_noise(label_noise) if label_noise else images).to(device)
