"""Layer shapes of the networks the kernels are timed on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """positions T of a sample, inputs I, outputs O; how many layers have this shape."""

    positions: int
    inputs: int
    outputs: int
    count: int = 1

    def __str__(self) -> str:
        """Return the name used in results."""
        return f"linear T={self.positions} {self.inputs}->{self.outputs}"


@dataclass(frozen=True)
class Conv:
    """Square 2-d convolution: channels in and out, kernel, stride, image size; padding keeps the size."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    image: int
    count: int = 1

    def __str__(self) -> str:
        """Return the name used in results."""
        return f"conv {self.kernel}x{self.kernel}/{self.stride} {self.inputs}->{self.outputs} @{self.image}"

    @property
    def padding(self) -> int:
        """Return the zeros on each side; a patch embedding (stride = kernel) has none."""
        return 0 if self.stride == self.kernel else self.kernel // 2

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Return outputs, inputs, height and width of the kernel."""
        return self.outputs, self.inputs, self.kernel, self.kernel

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return self.outputs * self.inputs * self.kernel**2

    @property
    def space(self) -> int:
        """Return the output's height, which is its width."""
        return (self.image + 2 * self.padding - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class Embedding:
    """positions T of a sample, rows of the table, columns."""

    positions: int
    num_embeddings: int
    dim: int
    count: int = 1

    def __str__(self) -> str:
        """Return the name used in results."""
        return f"embedding T={self.positions} {self.num_embeddings}x{self.dim}"


Layer = Linear | Conv | Embedding


@dataclass(frozen=True)
class NetworkShapes:
    """Distinct layer shapes and the batch sizes they are timed at; --quick takes the first batch."""

    name: str
    batches: tuple[int, ...]
    layers: tuple[Layer, ...]


def _basic(inputs: int, outputs: int, stride: int, image: int) -> tuple[Layer, ...]:
    """Return a stage of ResNet-18: two blocks of two 3x3 convolutions, image is that of its input."""
    out = image // stride
    if stride == 1:
        return (Conv(inputs, outputs, 3, 1, image, 4),)
    return (
        Conv(inputs, outputs, 3, stride, image),
        Conv(inputs, outputs, 1, stride, image),
        Conv(outputs, outputs, 3, 1, out, 3),
    )


def _bottleneck(inputs: int, width: int, stride: int, image: int, blocks: int) -> tuple[Layer, ...]:
    """Return a stage of ResNet-50: blocks of 1x1, 3x3 (strided in the first), 1x1 to 4 times the width."""
    out = image // stride
    return (
        Conv(inputs, width, 1, 1, image),
        Conv(width, width, 3, stride, image),
        Conv(width, 4 * width, 1, 1, out, blocks),
        Conv(inputs, 4 * width, 1, stride, image),
        Conv(4 * width, width, 1, 1, out, blocks - 1),
        Conv(width, width, 3, 1, out, blocks - 1),
    )


def _resnet18(image: int) -> tuple[Layer, ...]:
    """Return the four stages on an image of that size."""
    return (
        *_basic(64, 64, 1, image),
        *_basic(64, 128, 2, image),
        *_basic(128, 256, 2, image // 2),
        *_basic(256, 512, 2, image // 4),
    )


def _resnet50(image: int) -> tuple[Layer, ...]:
    """Return the four stages on an image of that size."""
    return (
        *_bottleneck(64, 64, 1, image, 3),
        *_bottleneck(256, 128, 2, image, 4),
        *_bottleneck(512, 256, 2, image // 2, 6),
        *_bottleneck(1024, 512, 2, image // 4, 3),
    )


def _transformer(positions: int) -> tuple[Layer, ...]:
    """Return 6 encoder and 6 decoder layers, d = 512, vocabulary of a small translation task."""
    return (
        Linear(positions, 512, 512, 72),
        Linear(positions, 512, 2048, 12),
        Linear(positions, 2048, 512, 12),
        Linear(positions, 512, 10_000),
        Embedding(positions, 10_000, 512, 2),
    )


NETWORKS = (
    NetworkShapes("ResNet-18 CIFAR", (128, 256), (Conv(3, 64, 3, 1, 32), *_resnet18(32), Linear(1, 512, 10))),
    NetworkShapes("ResNet-18 224", (64, 128), (Conv(3, 64, 7, 2, 224), *_resnet18(56), Linear(1, 512, 1000))),
    NetworkShapes(
        "ResNet-50 CIFAR", (128, 256), (Conv(3, 64, 3, 1, 32), *_resnet50(32), Linear(1, 2048, 10))
    ),
    NetworkShapes(
        "ResNet-50 224", (32, 128), (Conv(3, 64, 7, 2, 224), *_resnet50(56), Linear(1, 2048, 1000))
    ),
    NetworkShapes("Transformer 6+6 T=32", (128, 256), _transformer(32)),
    NetworkShapes("Transformer 6+6 T=128", (64, 128), _transformer(128)),
    NetworkShapes(
        "ViT-S",
        (64, 256),
        (
            Conv(3, 384, 16, 16, 224),
            Linear(197, 384, 1152, 12),
            Linear(197, 384, 384, 12),
            Linear(197, 384, 1536, 12),
            Linear(197, 1536, 384, 12),
            Linear(1, 384, 1000),
        ),
    ),
    NetworkShapes(
        "GPT-2 small",
        (32, 64),
        (
            Linear(1024, 768, 2304, 12),
            Linear(1024, 768, 768, 12),
            Linear(1024, 768, 3072, 12),
            Linear(1024, 3072, 768, 12),
            Embedding(1024, 50_257, 768),
        ),
    ),
    # Many layers of one position each: a list of them is one launch.
    NetworkShapes(
        "MLP",
        (256, 128),
        (Linear(1, 784, 1024), Linear(1, 1024, 1024), Linear(1, 1024, 512), Linear(1, 512, 10)),
    ),
)

TINY = NetworkShapes(
    "tiny",
    (3,),
    (
        Linear(5, 33, 17, 2),
        Linear(1, 17, 3),
        Linear(1, 3, 2),
        Conv(5, 3, 3, 2, 7),
        Embedding(9, 7, 19),
    ),
)
"""Every kind of layer at sizes that run anywhere."""
