"""The networks that the training runs choose from."""

import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("mlp", "cnn", "resnet18")


def build(name: str, image_shape: tuple[int, int, int], classes: int, *, width: int) -> nn.Module:
    """Return the network called `name` for images (C,H,W), with `width` channels at first (mlp: units / 32).

    Raises:
        ValueError: An unknown name or a width below 1.
    """
    if width < 1:
        raise ValueError(f"width: expected 1 or more, got {width}")
    channels, height, image_width = image_shape
    if name == "mlp":
        return mlp(channels * height * image_width, classes, units=32 * width)
    if name == "cnn":
        return cnn(image_shape, classes, width=width)
    if name == "resnet18":
        return ResNet18(channels, classes, width=width)
    raise ValueError(f"model: expected one of {', '.join(NAMES)}, got {name!r}")


def mlp(inputs: int, classes: int, *, units: int) -> nn.Sequential:
    """Return a network with two hidden layers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, units),
        nn.ReLU(),
        nn.Linear(units, units),
        nn.ReLU(),
        nn.Linear(units, classes),
    )


def cnn(image_shape: tuple[int, int, int], classes: int, *, width: int) -> nn.Sequential:
    """Return three 3x3 convolutions and a linear layer, without normalisation."""
    channels, height, image_width = image_shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (image_width // 4), classes),
    )


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016) with the stem for 32 x 32 images: a 3x3 convolution and no pooling.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """

    def __init__(self, channels: int, classes: int, *, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential()
        for stage in range(4):
            stride = 1 if stage == 0 else 2
            self.blocks.append(BasicBlock(widths[stage], widths[stage + 1], stride=stride))
            self.blocks.append(BasicBlock(widths[stage + 1], widths[stage + 1], stride=1))
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N,classes) of images (N,C,H,W)."""
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        return self.linear(x.mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut, which is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N,C',H',W') of (N,C,H,W)."""
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))
