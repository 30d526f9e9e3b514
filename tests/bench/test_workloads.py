import gzip
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from image_archives import jpeg_bytes, jpeg_files, write_tar
from PIL import Image

from bench import workloads
from bench.workloads import cifar, images
from bench.workloads.images import crop_and_flip


class Python2Pickler(pickle._Pickler):
    """Writes byte strings and module names as the Python 2 pickles of the published archives hold them."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def python2_pickle(value):
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar10_files(per_batch=22):
    files, batches = {}, {}
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.random.default_rng(seed).integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        labels = [(seed + i) % 10 for i in range(per_batch)]
        batches[name] = pixels, labels
        batch = {b"batch_label": name.encode(), b"labels": labels, b"data": pixels, b"filenames": [b"a.png"]}
        files[f"cifar-10-batches-py/{name}"] = python2_pickle(batch)
    return files, batches


def load(name, folder, **options):
    return workloads.load(name, data_dir=folder, cache_dir=folder / "cache", **options)


def test_digits_split_is_fixed_stratified_and_complete():
    first, second = workloads.load("digits"), workloads.load("digits")
    splits = (first.train, first.validation, first.test)
    assert [len(split) for split in splits] == [1077, 360, 360]
    assert torch.equal(first.train.x, second.train.x)
    assert torch.equal(first.test.y, second.test.y)
    for split in splits:
        shares = torch.bincount(split.y, minlength=10) / len(split)
        assert (shares - 0.1).abs().max() < 0.01
    everything = torch.cat([split.x for split in splits]).flatten(1)
    from sklearn.datasets import load_digits

    published = torch.from_numpy(load_digits().data).float()
    assert torch.equal(everything.sum(0), published.sum(0))
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, published.tolist()))


def test_statistics_are_those_of_the_training_split():
    workload = workloads.load("digits", train_size=200)
    x = workload.standardise(workload.train.x)
    assert len(workload.train) == 200
    torch.testing.assert_close(x.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(), torch.tensor(1.0), atol=1e-5, rtol=0)
    assert workload.standardise(workload.test.x).mean().abs() > 1e-4


def test_jpeg_archive(tmp_path):
    files = jpeg_files()
    write_tar(tmp_path / "cifar10-jpeg.tar.gz", files)
    arrays = cifar.read_jpeg(tmp_path / "cifar10-jpeg.tar.gz")
    assert arrays["train_x"].shape == (110, 3, 32, 32)
    assert arrays["test_y"].tolist() == sorted(list(range(10)) * 2)
    for split, index, name in (
        ("train", 0, "airplane/0000"),
        ("train", 12, "automobile/0001"),
        ("test", 19, "truck/0001"),
    ):
        expected = np.asarray(Image.open(io.BytesIO(files[f"cifar10-jpeg/{split}/{name}.jpg"])))
        np.testing.assert_array_equal(arrays[f"{split}_x"][index].transpose(1, 2, 0), expected)


def test_jpeg_workload_and_its_cache(tmp_path, monkeypatch):
    archive = write_tar(tmp_path / "cifar10-jpeg.tar.gz", jpeg_files())
    first = load("cifar10", tmp_path)
    assert first.title == "CIFAR-10 (JPEG)"
    assert (len(first.train), len(first.validation), len(first.test)) == (99, 11, 20)
    assert first.train.x.dtype == torch.uint8
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]

    def decode_again(*_):
        raise AssertionError("the cache was not used")

    with monkeypatch.context() as patch:
        patch.setattr(cifar, "members", decode_again)
        assert torch.equal(load("cifar10", tmp_path).train.x, first.train.x)

    files = jpeg_files()
    files["cifar10-jpeg/train/airplane/0000.jpg"] = jpeg_bytes(1234)
    write_tar(archive, files)
    changed = load("cifar10", tmp_path)
    total = [w.train.x.sum() + w.validation.x.sum() for w in (first, changed)]
    assert total[0] != total[1]


def test_broken_cache_is_made_anew(tmp_path):
    write_tar(tmp_path / "cifar10-jpeg.tar.gz", jpeg_files())
    first = load("cifar10", tmp_path)
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:1000])
    assert torch.equal(load("cifar10", tmp_path).train.x, first.train.x)


def test_archive_members_outside_the_layout_are_ignored(tmp_path):
    link = tarfile.TarInfo("cifar10-jpeg/train/airplane/0099.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    files = jpeg_files() | {"../outside.jpg": b"x", "cifar10-jpeg/train/airplane/../../../up.jpg": b"x"}
    write_tar(tmp_path / "cifar10-jpeg.tar.gz", files, extra=[link])
    assert len(cifar.read_jpeg(tmp_path / "cifar10-jpeg.tar.gz")["train_y"]) == 110
    assert [path.name for path in tmp_path.iterdir()] == ["cifar10-jpeg.tar.gz"]
    assert not (tmp_path.parent / "outside.jpg").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cifar10-jpeg/train/zebra/0000.jpg", jpeg_bytes(0), "got class 'zebra'"),
        ("cifar10-jpeg/train/cat/0000.jpg", b"GIF89a", "not a readable JPEG"),
        ("cifar10-jpeg/train/cat/0000.jpg", jpeg_bytes(0)[:300], "not a readable JPEG"),
        (
            "cifar10-jpeg/train/cat/0000.jpg",
            jpeg_bytes(0, (32, 64)),
            r"expected 32 x 32 pixels, got \(32, 64\)",
        ),
        ("cifar10-jpeg/train/cat/0000.jpg", bytes(1 << 17), "has 131072 bytes"),
        ("somewhere/else.jpg", b"", "holds no cifar10-jpeg/train/CLASS/NNNN.jpg"),
    ],
)
def test_bad_jpeg_archive_is_named(tmp_path, name, content, message):
    write_tar(tmp_path / "cifar10-jpeg.tar.gz", {name: content})
    with pytest.raises(ValueError, match=message):
        load("cifar10", tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not gzip"])
def test_damaged_archive_is_named(tmp_path, damage):
    archive = write_tar(tmp_path / "cifar10-jpeg.tar.gz", jpeg_files())
    content = archive.read_bytes()
    if damage == "truncated":
        archive.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        archive.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    else:
        archive.write_bytes(b"plain text")
    with pytest.raises(ValueError, match=r"cifar10-jpeg\.tar\.gz: "):
        load("cifar10", tmp_path)


def test_cifar10_python_archive(tmp_path):
    files, batches = cifar10_files()
    write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    arrays = cifar.read_cifar10(tmp_path / "cifar-10-python.tar.gz")
    assert arrays["train_x"].shape == (110, 3, 32, 32)
    pixels, labels = batches["data_batch_2"]
    np.testing.assert_array_equal(arrays["train_x"][22:44], pixels.reshape(-1, 3, 32, 32))
    assert arrays["train_y"][22:44].tolist() == labels
    np.testing.assert_array_equal(arrays["test_x"].reshape(22, -1), batches["test_batch"][0])
    assert load("cifar10", tmp_path).title == "CIFAR-10"


def test_cifar100_python_archive(tmp_path):
    def batch(count, seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [i % 100 for i in range(count)]
        return {b"data": pixels, b"fine_labels": labels, b"coarse_labels": [0] * count}

    files = {
        "cifar-100-python/train": python2_pickle(batch(1100, 0)),
        "cifar-100-python/test": python2_pickle(batch(200, 1)),
        "cifar-100-python/meta": python2_pickle({b"fine_label_names": [b"apple"]}),
    }
    write_tar(tmp_path / "cifar-100-python.tar.gz", files)
    workload = load("cifar100", tmp_path)
    assert workload.classes == 100
    assert (len(workload.train), len(workload.validation), len(workload.test)) == (990, 110, 200)
    assert workload.train.y.unique().tolist() == list(range(100))


class Attack:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_that_calls_a_function_is_refused(tmp_path):
    files, _ = cifar10_files()
    files["cifar-10-batches-py/data_batch_3"] = pickle.dumps(Attack(tmp_path / "made"))
    write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    with pytest.raises(ValueError, match=r"data_batch_3 is not a published batch .*mkdir is not admitted"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"data": np.zeros((2, 3072), np.uint8)}, "not a published batch"),
        ({b"data": np.zeros((2, 99), np.uint8), b"labels": [0, 1]}, "not a published batch"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "not a published batch"),
        ({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, "expected uint8 pixels by rows, got .*f8"),
        (
            {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]},
            "labels: expected 0 to 9, got 0 to 10",
        ),
        (None, "data_batch_1 missing"),
    ],
)
def test_bad_python_archive_is_named(tmp_path, batch, message):
    files, _ = cifar10_files()
    del files["cifar-10-batches-py/data_batch_1"]
    if batch is not None:
        files["cifar-10-batches-py/data_batch_1"] = python2_pickle(batch)
    write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    with pytest.raises(ValueError, match=message):
        load("cifar10", tmp_path)


def test_truncated_pickle_archive_is_named(tmp_path):
    files, _ = cifar10_files()
    content = files["cifar-10-batches-py/data_batch_1"]
    files["cifar-10-batches-py/data_batch_1"] = content[: len(content) // 2]
    write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    with pytest.raises(ValueError, match="data_batch_1 is not a published batch"):
        load("cifar10", tmp_path)


def test_archive_of_another_kind_is_named(tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(gzip.compress(b"not a tar file"))
    with pytest.raises(ValueError, match=r"cifar-100-python\.tar\.gz: not a complete"):
        load("cifar100", tmp_path)


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="data_dir: cifar10 needs the folder"):
        workloads.load("cifar10")
    with pytest.raises(ValueError, match=r"data_dir: expected a folder, got .*nowhere"):
        load("cifar10", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected cifar-10-python\.tar\.gz or cifar10-jpeg\.tar\.gz in"):
        load("cifar10", tmp_path)
    with pytest.raises(
        ValueError, match=r"data: expected one of digits, cifar10, cifar100, multi30k, got 'mnist'"
    ):
        workloads.load("mnist")


@pytest.mark.parametrize("size", [5, 1077])
def test_impossible_train_size_is_named(size):
    with pytest.raises(ValueError, match=f"train_size: expected 10 to 1067 images, got {size}"):
        workloads.load("digits", train_size=size)


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (7, 3, 8, 8), (5, 2, 3, 5)])
def test_crop_and_flip_against_a_loop(shape):
    x = torch.arange(torch.Size(shape).numel()).view(shape).to(torch.int32) + 1
    out = crop_and_flip(x, 2, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    offsets = torch.randint(5, (len(x), 2), generator=generator).tolist()
    mirrored = torch.randint(2, (len(x),), generator=generator).tolist()
    padded = torch.nn.functional.pad(x, [2] * 4)
    height, width = shape[2:]
    for image, ((top, left), flip) in enumerate(zip(offsets, mirrored, strict=True)):
        window = padded[image, :, top : top + height, left : left + width]
        assert torch.equal(out[image], window.flip(2) if flip else window)


def test_only_drawn_numbers_are_copied_to_the_device(monkeypatch):
    copied = []

    def to_device(x, device):
        copied.append(tuple(x.shape))
        return x.to(device)

    monkeypatch.setattr(images, "to_device", to_device)
    split = images.Split(torch.zeros(9, 3, 8, 8, device="meta"), torch.zeros(9, device="meta"))
    x, _ = images.Fetched(split).__getitems__([4, 0, 8, 1, 1])
    assert crop_and_flip(x, 2, torch.Generator()).shape == (5, 3, 8, 8)
    assert copied == [(5,), (5, 3)]


def test_crop_and_flip_draws_every_shift_and_both_directions():
    x = torch.zeros(4000, 1, 3, 3)
    x[:, 0, 1, 0] = 1
    out = crop_and_flip(x, 1, torch.Generator().manual_seed(0))
    again = crop_and_flip(x, 1, torch.Generator().manual_seed(0))
    assert torch.equal(out, again)
    frequency = out.mean(dim=(0, 1))
    # each of 3 rows alike; in the row the middle from either direction, each side from one, else out of sight
    expected = torch.tensor([1 / 18, 2 / 18, 1 / 18]).repeat(3, 1)
    torch.testing.assert_close(frequency, expected, atol=0.015, rtol=0)
