"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read out of their archives without unpacking them to disk."""

import hashlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from bench.workloads.compressed import members
from bench.workloads.images import Workload, make_workload

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MAX_JPEG_BYTES = 1 << 16
MAX_PICKLE_BYTES = 1 << 28
JPEG_PATH = re.compile(r"cifar10-jpeg/(train|test)/(\w+)/(\d+)\.jpg")

Arrays = dict[str, np.ndarray]


def load(name: str, data_dir: Path, *, cache_dir: Path, train_size: int | None = None) -> Workload:
    """Read the first archive of `name` found in `data_dir`; its decoded images are kept in `cache_dir`.

    Returns:
        a workload of uint8 images (N,3,32,32), 10 % of the training images held out for validation.

    Raises:
        ValueError: When no archive is there or it does not hold what was published.
    """
    archive, title, read = _find(name, data_dir)
    arrays = _cached(archive, cache_dir, read)
    return make_workload(
        title,
        (arrays["train_x"], arrays["train_y"]),
        (arrays["test_x"], arrays["test_y"]),
        classes=100 if name == "cifar100" else 10,
        validation_fraction=0.1,
        train_size=train_size,
        crop_padding=4,
        target=0.4 if name == "cifar100" else 0.7,
    )


def read_jpeg(archive: Path) -> Arrays:
    """Decode `cifar10-jpeg/{train,test}/CLASS/NNNN.jpg`, in order of class and number."""
    images: dict[str, list[tuple[int, int, np.ndarray]]] = {"train": [], "test": []}
    files = members(archive, JPEG_PATH, MAX_JPEG_BYTES)
    for path, content in tqdm(files, desc=f"decoding {archive.name}", unit=" images", disable=None):
        if path[2] not in CLASSES:
            raise ValueError(f"{archive.name}: expected one of {', '.join(CLASSES)}, got class {path[2]!r}")
        try:
            with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
                # Before it is decoded: a few bytes may claim any number of pixels.
                if image.size != (32, 32):
                    raise ValueError(
                        f"{archive.name}: expected 32 x 32 pixels, got {image.size} in {path[0]}"
                    )
                pixels = np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
            raise ValueError(f"{archive.name}: {path[0]} is not a readable JPEG image ({error})") from error
        images[path[1]].append((CLASSES.index(path[2]), int(path[3]), pixels))
    arrays: Arrays = {}
    for split, entries in images.items():
        if not entries:
            raise ValueError(f"{archive.name}: holds no cifar10-jpeg/{split}/CLASS/NNNN.jpg")
        entries.sort(key=lambda entry: entry[:2])
        pixels = np.stack([entry[2] for entry in entries])
        arrays[f"{split}_x"] = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        arrays[f"{split}_y"] = np.array([entry[0] for entry in entries], dtype=np.int64)
    return arrays


def read_cifar10(archive: Path) -> Arrays:
    """Read `cifar-10-batches-py/{data_batch_1..5,test_batch}`."""
    return _read_pickles(
        archive,
        re.compile(r"cifar-10-batches-py/(data_batch_[1-5]|test_batch)"),
        splits={"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        label_key=b"labels",
    )


def read_cifar100(archive: Path) -> Arrays:
    """Read `cifar-100-python/{train,test}` with its 100 fine labels."""
    return _read_pickles(
        archive,
        re.compile(r"cifar-100-python/(train|test)"),
        splits={"train": ["train"], "test": ["test"]},
        label_key=b"fine_labels",
    )


ARCHIVES: dict[str, tuple[tuple[str, str, Callable[[Path], Arrays]], ...]] = {
    "cifar10": (
        ("cifar-10-python.tar.gz", "CIFAR-10", read_cifar10),
        ("cifar10-jpeg.tar.gz", "CIFAR-10 (JPEG)", read_jpeg),
    ),
    "cifar100": (("cifar-100-python.tar.gz", "CIFAR-100", read_cifar100),),
}
NAMES = tuple(ARCHIVES)


def _find(name: str, data_dir: Path) -> tuple[Path, str, Callable[[Path], Arrays]]:
    if not data_dir.is_dir():
        raise ValueError(f"data_dir: expected a folder, got {str(data_dir)!r}")
    for file_name, title, read in ARCHIVES[name]:
        if (data_dir / file_name).is_file():
            return data_dir / file_name, title, read
    wanted = " or ".join(entry[0] for entry in ARCHIVES[name])
    raise ValueError(f"data_dir: expected {wanted} in {str(data_dir)!r}, found neither that nor its images")


def _cached(archive: Path, cache_dir: Path, read: Callable[[Path], Arrays]) -> Arrays:
    # The hash in the name makes a changed archive a different cache entry.
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    cache = cache_dir / f"{archive.name.split('.')[0]}-{digest[:16]}.npz"
    try:
        with np.load(cache, allow_pickle=False) as stored:
            return dict(stored)
    except (FileNotFoundError, ValueError, zipfile.BadZipFile):
        pass
    arrays = read(archive)
    cache_dir.mkdir(parents=True, exist_ok=True)
    unfinished = cache.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    unfinished.replace(cache)
    return arrays


class _Pixels:
    """Stands for a numpy array in a pickle: numpy itself never sees what the file says."""

    array: np.ndarray

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_major, content = state
        if dtype.name not in ("u1", b"u1") or column_major:
            raise pickle.UnpicklingError(f"expected uint8 pixels by rows, got {dtype.name!r}")
        self.array = np.frombuffer(content, dtype=np.uint8).reshape(shape)


class _Dtype:
    """Stands for a numpy dtype, of which a pickle says the name and the byte order."""

    def __init__(self, name: str | bytes, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Pixels,
    ("numpy", "ndarray"): _Pixels,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle._Unpickler):
    """Admits plain values and arrays of bytes, which is all the published files hold.

    The one in Python: the one in C makes room for as many objects as a file claims to hold.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted") from None


def _read_pickle(content: bytes, label_key: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    pixels, labels = batch[b"data"].array, batch[label_key]
    # Lists that hold each other many times over would grow without bound in an array.
    if not all(type(label) is int for label in labels):
        raise pickle.UnpicklingError("expected numbers as labels")
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64).reshape(len(pixels))


def _read_pickles(
    archive: Path, wanted: re.Pattern[str], *, splits: dict[str, list[str]], label_key: bytes
) -> Arrays:
    batches: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for path, content in members(archive, wanted, MAX_PICKLE_BYTES):
        try:
            batches[path[1]] = _read_pickle(content, label_key)
        except Exception as error:  # A damaged pickle may raise anything.
            raise ValueError(f"{archive.name}: {path[0]} is not a published batch ({error})") from error
    arrays: Arrays = {}
    for split, names in splits.items():
        missing = [name for name in names if name not in batches]
        if missing:
            raise ValueError(f"{archive.name}: {', '.join(missing)} missing")
        arrays[f"{split}_x"] = np.concatenate([batches[name][0] for name in names])
        arrays[f"{split}_y"] = np.concatenate([batches[name][1] for name in names])
    return arrays
