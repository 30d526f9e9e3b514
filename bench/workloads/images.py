"""Image classification: three splits of images and labels, how a batch is prepared, what is measured."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bench.models import images

SPLIT_SEED = 0
NOISE_SEED = 0
EVALUATION_BATCH = 500


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to `device` without a wait for the work it was given before."""
    # A copy out of memory that is not pinned waits for all that the device was given before.
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass(frozen=True)
class Split:
    """Images (N,C,H,W) and labels (N,) of one split."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> "Split":
        """Copy to `device`."""
        return Split(self.x.to(device), self.y.to(device))


class Fetched(Dataset[tuple[Tensor, Tensor]]):
    """A split whose samples are fetched a batch at a time, without a copy per sample."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = to_device(torch.tensor(indices), self.split.x.device)
        return self.split.x[rows], self.split.y[rows]


def as_fetched(batch: Any) -> Any:
    """Return the batch, which comes whole: nothing is collated."""
    return batch


def shuffled(fetched: Dataset[Any], batch_size: int, generator: torch.Generator) -> DataLoader:
    """Return batches of what fetches them whole, in a new random order every epoch."""
    return DataLoader(
        fetched, batch_size=batch_size, shuffle=True, collate_fn=as_fetched, generator=generator
    )


@dataclass(frozen=True)
class Workload:
    """A classification task; `mean` and `std` (C,1,1) are statistics of the training split alone.

    Attributes:
        replaced: (N,) bool, the training labels that were replaced at random; None where none was.
    """

    title: str
    classes: int
    train: Split
    validation: Split
    test: Split
    mean: Tensor
    std: Tensor
    crop_padding: int
    target: float
    replaced: Tensor | None = None

    metric = "accuracy"

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of images by split."""
        return {name: len(getattr(self, name)) for name in ("train", "validation", "test")}

    @property
    def device(self) -> torch.device:
        """Return where the tensors are."""
        return self.train.y.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (C,H,W) of one image."""
        channels, height, width = self.train.x.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> "Workload":
        """Copy every tensor to `device`."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
        )

    def model(self, name: str, width: int) -> nn.Module:
        """Return the network called `name`."""
        return images.build(name, self.image_shape, self.classes, width=width)

    def batches(self, batch_size: int, generator: torch.Generator) -> DataLoader:
        """Return training batches in a new random order every epoch."""
        return shuffled(Fetched(self.train), batch_size, generator)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        """Return the mean loss of a batch of augmented training images."""
        x, y = batch
        return F.cross_entropy(model(self.standardise(self.augment(x, generator))), y)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split) -> tuple[float, float]:
        """Return mean loss and accuracy over a split."""
        model.eval()
        loss = correct = torch.zeros((), device=split.x.device)
        for x, y in zip(split.x.split(EVALUATION_BATCH), split.y.split(EVALUATION_BATCH), strict=True):
            logits = model(self.standardise(x))
            loss = loss + F.cross_entropy(logits.float(), y, reduction="sum")
            correct = correct + (logits.argmax(dim=1) == y).sum()
        return loss.item() / len(split), correct.item() / len(split)

    def score(self, model: nn.Module, split: Split) -> float:
        """Return what runs are judged by: accuracy in percent."""
        return 100 * self.evaluate(model, split)[1]

    def with_label_noise(self, fraction: float) -> "Workload":
        """Replace `fraction` of the training labels by another class, drawn at random with a fixed seed.

        Raises:
            ValueError: When fraction is not in [0, 1).
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"label_noise: expected 0 or more and below 1, got {fraction}")
        generator = torch.Generator().manual_seed(NOISE_SEED)
        y = self.train.y
        rows = torch.randperm(len(y), generator=generator)[: round(fraction * len(y))]
        shift = torch.randint(1, self.classes, (len(rows),), generator=generator)
        noisy = y.clone()
        noisy[rows] = (y[rows] + shift) % self.classes
        replaced = torch.zeros(len(y), dtype=torch.bool)
        replaced[rows] = True
        title = f"{self.title}, {fraction:.0%} of the training labels replaced"
        return replace(self, title=title, train=Split(self.train.x, noisy), replaced=replaced)

    def standardise(self, x: Tensor) -> Tensor:
        """Return raw values (N,C,H,W) as float32 of zero mean and unit variance over the training split."""
        return (x.float() - self.mean) / self.std

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Crop and flip at random, drawn on the CPU so that every device sees the same images."""
        return crop_and_flip(x, self.crop_padding, generator) if self.crop_padding else x


def make_workload(
    title: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    classes: int,
    validation_fraction: float,
    train_size: int | None,
    crop_padding: int,
    target: float,
) -> Workload:
    """Split validation off the training images, limit what is left to `train_size`, take its statistics."""
    for _, labels in (train, test):
        if not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"labels: expected 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    (x, y), (x_val, y_val) = stratified_split(*train, fraction=validation_fraction)
    if train_size is not None:
        if not classes <= train_size <= len(y) - classes:
            raise ValueError(f"train_size: expected {classes} to {len(y) - classes} images, got {train_size}")
        _, (x, y) = stratified_split(x, y, fraction=train_size)
    # Channel by channel: a float copy of all images would be four times their size.
    moments = [torch.std_mean(torch.from_numpy(x[:, channel]).float()) for channel in range(x.shape[1])]
    std, mean = (torch.stack(values).view(-1, 1, 1) for values in zip(*moments, strict=True))
    return Workload(
        title=title,
        classes=classes,
        train=_split(x, y),
        validation=_split(x_val, y_val),
        test=_split(*test),
        mean=mean,
        std=std,
        crop_padding=crop_padding,
        target=target,
    )


def stratified_split(
    x: np.ndarray, y: np.ndarray, *, fraction: float | int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return rest and part, always the same, classes in equal proportion; `fraction`: a share or a count."""
    x_rest, x_part, y_rest, y_part = train_test_split(
        x, y, test_size=fraction, stratify=y, random_state=SPLIT_SEED
    )
    return (x_rest, y_rest), (x_part, y_part)


def _split(x: np.ndarray, y: np.ndarray) -> Split:
    return Split(torch.from_numpy(x), torch.from_numpy(y).long())


def crop_and_flip(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift each image of (N,C,H,W) by up to `padding` pixels (zeros enter) and mirror half of them."""
    n, _, height, width = x.shape
    offsets = torch.randint(2 * padding + 1, (n, 2), generator=generator)
    mirrored = torch.randint(2, (n, 1), generator=generator)
    top, left, flip = to_device(torch.cat([offsets, mirrored], dim=1), x.device).split(1, dim=1)
    rows = top + torch.arange(height, device=x.device)
    columns = left + torch.arange(width, device=x.device)
    columns = torch.where(flip.bool(), columns.flip(1), columns)
    padded = torch.nn.functional.pad(x, [padding] * 4)
    index = (rows * (width + 2 * padding)).unsqueeze(2) + columns.unsqueeze(1)
    index = index.view(n, 1, height * width).expand(-1, x.shape[1], -1)
    return padded.flatten(2).gather(2, index).view_as(x)
