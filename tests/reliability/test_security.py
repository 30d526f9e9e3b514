"""Hostile files and absurd sizes: refused with an error, nothing run, nothing written, no memory taken."""

import ast
import gzip
import io
import json
import pickle
import re
import resource
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fngd
import fngd_kernels as fk
from bench import workloads
from bench.pinn import problems
from bench.train import archive, checkpoint
from bench.workloads import cifar, compressed
from fngd_kernels.ops.scale_bias import scale_bias

ROOT = Path(__file__).resolve().parents[2]
AREA = "Security"
MIB = 1 << 20


def tar_of(path, *entries):
    """Write a .tar.gz archive of (name, content) or of tarfile.TarInfo without content."""
    with tarfile.open(path, "w:gz") as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                member = tarfile.TarInfo(entry[0])
                member.size = len(entry[1])
                tar.addfile(member, io.BytesIO(entry[1]))
    return path


class Calls:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def nested(depth):
    """A list of lists that is small in a pickle and has 2^depth leaves."""
    labels = [0, 0]
    for _ in range(depth):
        labels = [labels, labels]
    return labels


def claims(opcode, form, size):
    """A pickle that claims an object of so many bytes and ends there."""
    return b"\x80\x04" + opcode + struct.pack(form, size) + b"."


def published(batch):
    """A pickle with the names that numpy had when CIFAR was published."""
    return pickle.dumps(batch, 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def pickles(folder):
    """{what it is: a hostile pickle}; those that do something would make `folder`/made."""
    made = folder / "made"
    pixels = np.zeros((2, 3072), np.uint8)
    return {
        "os.system": pickle.dumps(Calls(__import__("os").system, f"touch {made}"), 2),
        "eval": pickle.dumps(Calls(eval, f"open({str(made)!r}, 'w')"), 2),
        "open": pickle.dumps(Calls(open, str(made), "w"), 2),
        "pathlib": pickle.dumps(made, 2),
        "torch": pickle.dumps(torch.ones(2), 2),
        "numpy's loader": b"cnumpy\nload\n(S'" + str(made).encode() + b"'\ntR.",
        "numpy attribute": b"\x80\x04\x8c\x05numpy\x8c\x08dtype.el\x93.",
        "extension registry": b"\x80\x02\x82\x01.",
        "persistent id": b"Pfile\n.",
        "array of objects": published({b"data": np.array([0], object), b"labels": [0]}),
        "array of numbers": published({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}),
        "huge array": published({b"data": Calls(np.ndarray, (1 << 50,)), b"labels": [0]}),
        "false shape": published({b"data": pixels, b"labels": [0, 1]}).replace(
            b"M\x00\x0c", b"J\x00\x00\x00\x7f"
        ),
        "nested labels": published({b"data": pixels, b"labels": nested(40)}),
        "huge memo": b"\x80\x02Nr\xff\xff\xff\x03.",
        "huge bytes": claims(b"\x8e", "<Q", 1 << 50),
        "huge bytearray": claims(b"\x96", "<Q", 1 << 36),
        "huge frame": claims(b"\x95", "<Q", 1 << 50),
        "no pickle": b"\x00" * 99,
    }


HOSTILE_PICKLES = tuple(pickles(Path("x")))
CALLING = ("os.system", "eval", "open", "pathlib", "torch", "numpy's loader", "numpy attribute")


def peak(function):
    """Run a function that must raise ValueError; return the message and the most memory Python took."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            function()
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("what", HOSTILE_PICKLES)
def test_hostile_pickles_run_nothing(what, tmp_path, tally):
    path = tmp_path / "cifar-10-python.tar.gz"
    tar_of(path, ("cifar-10-batches-py/data_batch_1", pickles(tmp_path)[what]))
    message, most = peak(lambda: cifar.read_cifar10(path))
    assert "data_batch_1 is not a published batch" in message
    assert ("is not admitted" in message) == (what in CALLING)
    assert most < 64 * MIB
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    tally(AREA, "pickles in a CIFAR archive that call functions or claim sizes", "ValueError, nothing run")


def test_random_changes_of_a_published_batch_run_nothing(full, tally):
    batch = published({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 3]})
    pixels, labels = cifar._read_pickle(batch, b"labels")
    assert pixels.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3]
    rng = np.random.default_rng(0)
    # The pixels themselves are not worth changing.
    where = [i for i in range(len(batch)) if batch[i] or i < 300 or i > len(batch) - 100]
    given = "bytes of a pickled batch changed at random"
    for _ in range(20_000 if full else 1_000):
        changed = bytearray(batch)
        for place in rng.choice(where, rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        try:
            pixels, labels = cifar._read_pickle(bytes(changed), b"labels")
        except Exception:
            tally(AREA, given, "an error, which the reader passes on as ValueError")
            continue
        assert pixels.dtype == np.uint8
        assert labels.dtype == np.int64
        assert pixels.shape == (len(labels), 3, 32, 32)
        tally(AREA, given, "arrays of the right types")


def jpeg(size=(32, 32)):
    content = io.BytesIO()
    Image.new("RGB", size).save(content, "JPEG")
    return content.getvalue()


def claimed(width, height):
    """A JPEG image whose header claims other sizes."""
    content = jpeg()
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


def entry(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


JPEG = "cifar10-jpeg/train/cat/0000.jpg"
HOSTILE_MEMBERS = {
    "..": ("../cifar10-jpeg/train/cat/0000.jpg", jpeg()),
    ".. inside": ("cifar10-jpeg/train/cat/../../../0000.jpg", jpeg()),
    "absolute": ("/cifar10-jpeg/train/cat/0000.jpg", jpeg()),
    "newline": (JPEG + "\n", jpeg()),
    "symbolic link": entry(JPEG, tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": entry(JPEG, tarfile.LNKTYPE, "/etc/passwd"),
    "character device": entry(JPEG, tarfile.CHRTYPE),
    "block device": entry(JPEG, tarfile.BLKTYPE),
    "pipe": entry(JPEG, tarfile.FIFOTYPE),
    "folder": entry(JPEG, tarfile.DIRTYPE),
}


@pytest.mark.parametrize("what", HOSTILE_MEMBERS)
def test_members_elsewhere_links_and_devices_are_passed_over(what, tmp_path, tally):
    path = tar_of(tmp_path / "a.tar.gz", HOSTILE_MEMBERS[what], ("cifar10-jpeg/test/cat/0001.jpg", jpeg()))
    found = list(compressed.members(path, cifar.JPEG_PATH, cifar.MAX_JPEG_BYTES))
    assert [match[0] for match, _ in found] == ["cifar10-jpeg/test/cat/0001.jpg"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar.gz"]
    tally(AREA, "archive members outside their folder, links, devices", "passed over, nothing written")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(65_500, 65_500), (10_000, 10_000), (0, 0), (33, 32)])
def test_pictures_that_claim_other_sizes_are_not_decoded(width, height, tmp_path, tally):
    path = tar_of(tmp_path / "cifar10-jpeg.tar.gz", (JPEG, claimed(width, height)))
    message, most = peak(lambda: cifar.read_jpeg(path))
    assert re.search(r"expected 32 x 32 pixels|not a readable JPEG image", message)
    assert most < MIB
    tally(AREA, "JPEG files that claim other sizes", "ValueError before decoding")


def long_name(size):
    """An archive whose next member's name is said to have so many bytes."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, size
    return gzip.compress(member.tobuf() + bytes(size), 1)


def test_bombs_end_at_a_bound(tmp_path, monkeypatch, tally):
    monkeypatch.setattr(compressed, "MAX_BYTES", 8 * MIB)
    tar = tmp_path / "cifar10-jpeg.tar.gz"
    zeros = bytes(32 * MIB)
    tar.write_bytes(long_name(32 * MIB))
    message, most = peak(lambda: cifar.read_jpeg(tar))
    assert "unpacks to more than it should" in message
    assert most < 24 * MIB
    tally(AREA, "archives that unpack to more than a bound", "ValueError at the bound")
    for name in ("somewhere/else", JPEG):
        message, most = peak(lambda name=name: cifar.read_jpeg(tar_of(tar, (name, zeros))))
        assert "unpacks to more than it should" in message or "bytes, over" in message
        tally(AREA, "archives that unpack to more than a bound", "ValueError at the bound")
    (tmp_path / "multi30k").mkdir()
    (tmp_path / "multi30k/train.de.gz").write_bytes(gzip.compress(bytes(80 * MIB), 1))
    message, most = peak(lambda: workloads.load("multi30k", data_dir=tmp_path, cache_dir=tmp_path))
    assert "unpacks to more than it should" in message
    assert most < 160 * MIB
    tar_of(tmp_path / "cal_housing.tgz", ("CaliforniaHousing/cal_housing.data", zeros))
    message, most = peak(lambda: problems.load("california", data_dir=tmp_path))
    assert "unpacks to more than it should" in message or "bytes, over" in message
    assert most < 24 * MIB
    tally(AREA, "archives that unpack to more than a bound", "ValueError at the bound", cases=2)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_checkpoints_that_call_functions_are_refused(tmp_path, tally):
    made = tmp_path / "made"
    for protocol in (2, 4):
        path = tmp_path / "checkpoint.pt"
        torch.save({"model": Calls(open, str(made), "w")}, path, pickle_protocol=protocol)
        with pytest.raises(ValueError, match=r"is damaged or of another kind .*Weights only load failed"):
            checkpoint.load(path)
        assert not made.exists()
        tally(AREA, "checkpoints that call functions", "ValueError, nothing run")


def test_a_cache_with_objects_is_made_anew(tmp_path, tally):
    made, cache = tmp_path / "made", tmp_path / "cache"
    path = tar_of(tmp_path / "cifar10-jpeg.tar.gz", (JPEG, jpeg()), (JPEG.replace("train", "test"), jpeg()))
    read = cifar._cached(path, cache, cifar.read_jpeg)
    (stored,) = cache.iterdir()
    with zipfile.ZipFile(stored, "w") as file:
        content = io.BytesIO()
        np.save(content, np.array([Calls(open, str(made), "w")], object), allow_pickle=True)
        file.writestr("train_x.npy", content.getvalue())
    again = cifar._cached(path, cache, cifar.read_jpeg)
    assert again.keys() == read.keys()
    assert not made.exists()
    tally(AREA, "a cache that holds pickled objects", "made anew, nothing run")


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "7", "NaN", "{}", '{"config": {}}', '{"config": {"eval": "1"}}', "[" * 100_000],
)
@pytest.mark.parametrize("read", [archive.load_run, archive.recorded])
def test_results_of_another_kind_are_refused(read, text, tmp_path, tally):
    path = tmp_path / "run.json"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=r"run\.json is not a "):
        read(path)
    tally(AREA, "result files of another kind, damaged or deeply nested", "ValueError")


@pytest.mark.parametrize("base", ["os.system", "torch.optim.SGD", "__import__('os')", "SGD", ""])
def test_optimizers_are_not_imported_by_name(base, tally):
    with pytest.raises(ValueError, match="base: expected one of 'sgd', 'adamw'"):
        fngd.FNGD(torch.nn.Linear(2, 2), base=base)
    tally(AREA, "a base optimizer named by a string other than sgd and adamw", "ValueError")


def large(*shape, dtype=torch.float32, device="cpu"):
    """A tensor of any size that takes no memory."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


MANY = 1 << 33
ERRORS = ("RuntimeError", "MemoryError", "ValueError")
ABSURD = {
    "gram, samples": lambda: fk.gram(large(MANY, 4), large(MANY, 4)),
    "gram, positions": lambda: fk.gram(large(2, MANY, 4), large(2, MANY, 4)),
    "gram, inputs": lambda: fk.gram(large(2, MANY), large(2, 4)),
    "gram, order 2^17": lambda: fk.gram(large(1 << 17, 4), large(1 << 17, 4)),
    "gram, diagonal": lambda: fk.gram(large(2, MANY, 4), large(2, MANY, 4), diag=True),
    "gram_conv, space": lambda: fk.gram_conv(large(1, 1, MANY), large(1, 1, MANY - 2), (1, 1, 3)),
    "gram_embedding, samples": lambda: fk.gram_embedding(large(MANY, dtype=torch.int64), large(MANY, 4)),
    "gram_embedding, positions": lambda: fk.gram_embedding(
        large(2, MANY, dtype=torch.int32), large(2, MANY, 1)
    ),
    "gram_rows, samples": lambda: fk.gram_rows(large(MANY, 4)),
    "gram_rows, columns": lambda: fk.gram_rows(large(2, MANY)),
    "combine, samples": lambda: fk.combine(large(MANY, 4), large(MANY, 4), large(MANY)),
    "combine, outputs": lambda: fk.combine(large(2, 4), large(2, MANY), large(2)),
    "combine_conv": lambda: fk.combine_conv(large(MANY, 1, 3), large(MANY, 1, 1), large(MANY), (1, 1, 3)),
    "combine_embedding, rows": lambda: fk.combine_embedding(
        large(2, dtype=torch.int64), large(2, 2), large(2), 1 << 62
    ),
    "combine_embedding, samples": lambda: fk.combine_embedding(
        large(MANY, dtype=torch.int64), large(MANY, 1), large(MANY), 5
    ),
    "combine_rows": lambda: fk.combine_rows(large(MANY, 4), large(MANY)),
    "solve, matrices": lambda: fk.solve(large(MANY, 1, 1), 1.0),
    "solve, empty matrices": lambda: fk.solve(large(MANY, 0, 0), 1.0),
    "solve, order": lambda: fk.solve(large(1 << 17, 1 << 17), 1.0),
    "solve, order over 2^32": lambda: torch.ops.fngd.solve(large(MANY, MANY), torch.tensor(1.0), None),
    "solve, order 2^16": lambda: torch.ops.fngd.solve(large(1 << 16, 1 << 16), torch.tensor(1.0), None),
    "solve, order 2^29": lambda: torch.ops.fngd.solve(large(1 << 29, 1 << 29), torch.tensor(1.0), None),
    "native solve, matrices": lambda: torch.ops.fngd.solve(large(MANY, 9, 9), large(MANY), None),
    "coefficients": lambda: torch.ops.fngd.coefficients(large(MANY, 1, 1), 0.1, 0.0, "mean"),
    "found_non_finite": lambda: torch.ops.fngd.found_non_finite([large(MANY)]),
    "scale_bias": lambda: scale_bias(large(MANY, 4), large(MANY), 1, True, True),
    "set_samples": lambda: fngd.FNGD(torch.nn.Linear(2, 2)).set_samples([1 << 62]),
    "start_epoch": lambda: tracked(1 << 62),
}


def tracked(samples):
    """Tell an optimizer of a dataset of so many samples."""
    opt = fngd.FNGD(torch.nn.Linear(2, 2))
    opt.start_epoch(samples)
    opt.set_samples([0])


def call_absurd():
    """Make every call with 6 GiB of address space and print how it ends: {call: error or ""}."""
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    ends = {}
    for name, call in ABSURD.items():
        try:
            call()
            ends[name] = ""
        except Exception as error:
            ends[name] = type(error).__name__
    usable = fk.gram(torch.ones(2, 3), torch.ones(2, 3)).tolist() == [[9, 9], [9, 9]]
    print(json.dumps([ends, usable]))


def test_absurd_sizes_raise(tally):
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_security as t"
    command = [sys.executable, "-c", f"{program}; t.torch.set_num_threads(1); t.call_absurd()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ends, usable = json.loads(done.stdout)
    assert usable
    assert {name: end for name, end in ends.items() if end not in ERRORS} == {}
    tally(AREA, "tensors of 2^33 and more numbers in no memory", "an error, no crash", cases=len(ends))


@pytest.mark.parametrize("ids", [[1 << 62, 0], [(1 << 63) - 1, 1], [-1, 0], [-(1 << 63), 3]])
def test_ids_that_cannot_be_counted_raise(ids, tally):
    with pytest.raises(ValueError, match=r"ids: expected 0 to \d+, got"):
        fk.gram_embedding(torch.tensor(ids), torch.ones(2, 3))
    tally(AREA, "ids of an embedding below 0 or near 2^63", "ValueError")


META = {
    "gram": (lambda x: fk.gram(x(9, MANY, 4), x(9, MANY, 5)), (9, 9)),
    "gram, diagonal": (lambda x: fk.gram(x(MANY, 3, 4), x(MANY, 3, 5), diag=True), (MANY,)),
    "gram_rows": (lambda x: fk.gram_rows(x(9, MANY)), (9, 9)),
    "gram_conv": (lambda x: fk.gram_conv(x(9, 2, MANY), x(9, 4, MANY - 2), (4, 2, 3)), (9, 9)),
    "combine": (lambda x: fk.combine(x(MANY, 4), x(MANY, 5), x(MANY)), (5, 4)),
    "combine_rows": (lambda x: fk.combine_rows(x(MANY, 4), x(MANY)), (4,)),
    "solve": (lambda x: fk.solve(x(MANY, 3, 3), 0.1), (MANY, 3)),
}


@pytest.mark.parametrize("name", META)
def test_tensors_without_data_of_absurd_sizes(name, tally):
    call, shape = META[name]
    result = call(lambda *size: large(*size, device="meta"))
    assert result.device.type == "meta"
    assert result.shape == shape
    tally(AREA, "tensors of 2^33 and more numbers on the meta device", "the right shape")


LOADERS = ("pickle", "yaml", "marshal", "shelve", "dill", "joblib")


def calls(path):
    """(name called, keyword arguments) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            yield owner, name, {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_no_file_is_loaded_or_run_as_code(tally):
    files = [path for folder in ("python", "fngd_kernels", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    for path in files:
        for owner, name, options in calls(path):
            where = f"{path.relative_to(ROOT)}: {owner}.{name}"
            assert name not in ("exec", "__import__", "system", "popen", "extractall", "extract"), where
            assert name != "eval" or owner, where  # a model's eval() is none
            assert name not in ("load", "loads") or owner not in LOADERS, where
            assert "shell" not in options, where
            assert (owner, name) != ("torch", "load") or options.get("weights_only") == "True", where
            assert (owner, name) != ("np", "load") or options.get("allow_pickle") == "False", where
        tally(AREA, "source files searched for code loading", "none")


def locked(name):
    """{package: version} of a lock file, the last one where Pythons differ, and its text."""
    text = (ROOT / f"requirements/{name}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)==([^ +]+)", text, re.MULTILINE)), text


@pytest.mark.parametrize("name", ["torch", "dev", "torch-cpu"])
def test_every_locked_package_has_hashes(name, tally):
    packages, text = locked(name)
    entries = re.split(r"\n(?=[a-z])", text)[1:]
    assert packages.keys() == {part.partition("==")[0] for part in entries}
    for part in entries:
        assert re.match(r"\S+==\S+( ; .*)? \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n?)+$", part)
        tally(AREA, "packages of the development set", "pinned with sha256 hashes")


def test_the_lock_holds_what_pyproject_asks_for():
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.search(r"^frameworks = (\[.*?\])$\ndev = (\[.*?\])$", text, re.MULTILINE | re.DOTALL).groups()
    asked = [
        re.match(r"[\w-]+", each)[0].replace("_", "-") for part in lists for each in ast.literal_eval(part)
    ]
    torch_part, rest, cpu = (locked(name)[0] for name in ("torch", "dev", "torch-cpu"))
    assert len(asked) > 20
    assert {name.replace("_", "-") for name in asked} - {"fngd"} <= rest.keys()
    assert torch_part["torch"] == cpu["torch"]


def test_setup_installs_nothing_without_its_hash():
    makefile = (ROOT / "Makefile").read_text()
    installs = [line for line in makefile.splitlines() if re.search(r"pip install|LOCKED", line)]
    assert any("--require-hashes" in line and "--only-binary :all:" in line for line in installs)
    unlocked = [line for line in installs if "LOCKED" not in line]
    assert len(unlocked) == 1
    assert re.search(r"--no-deps --no-build-isolation -e \.$", unlocked[0])
