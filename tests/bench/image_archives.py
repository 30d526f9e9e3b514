"""Archives of small images, as those of CIFAR-10 are laid out."""

import io
import tarfile

import numpy as np
from PIL import Image

from bench.workloads import cifar

PER_CLASS = {"train": 11, "test": 2}


def jpeg_bytes(seed, size=(32, 32)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def write_tar(path, files, extra=()):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return path


def jpeg_files():
    # reversed, so that the order of the archive is not the order wanted
    return {
        f"cifar10-jpeg/{split}/{label}/{number:04d}.jpg": jpeg_bytes(1000 * len(split) + 100 * k + number)
        for split, count in PER_CLASS.items()
        for k, label in reversed(list(enumerate(cifar.CLASSES)))
        for number in reversed(range(count))
    }
