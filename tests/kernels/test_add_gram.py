"""The symmetric product of the extension and that of torch, against float64."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import oracles
from fngd_kernels import native
from fngd_kernels.backends.torch.products import NATIVE_MAX_ROWS, add_gram

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
ORDERS = [1, 2, 3, 7, 12, 47, 48, 49, 64, 101]
LENGTHS = [1, 3, 8, 17, 511, 1024, 1025, 2100]
CAPABILITIES = ["default", "avx2", None]
"""What torch, and with it the extension, is told to restrict itself to; None is all that is there."""

extension = pytest.mark.skipif(not native.AVAILABLE, reason="no compiled extension")


def added(rows, k):
    add_gram(k, rows)
    return k.triu()


def check_added(rows):
    n = len(rows)
    k = torch.randn(n, n, dtype=rows.dtype)
    expected = (k.double() + rows.double() @ rows.double().T).triu()
    assert oracles.relative_error(added(rows, k), expected) < TOLERANCE[rows.dtype]


@pytest.fixture(params=[pytest.param(True, marks=extension), False], ids=["native", "torch"])
def available(request, monkeypatch):
    monkeypatch.setattr(native, "AVAILABLE", request.param)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("available")
def test_sizes_that_fill_no_tile_and_no_panel(dtype):
    for n in ORDERS:
        for d in LENGTHS:
            check_added(torch.randn(n, d, dtype=dtype))


@extension
@pytest.mark.parametrize(("rows", "called"), [(NATIVE_MAX_ROWS, True), (NATIVE_MAX_ROWS + 1, False)])
def test_many_rows_go_to_the_library(rows, called, monkeypatch):
    calls = []
    monkeypatch.setattr(native, "extension", SimpleNamespace(add_gram=lambda *_: calls.append(1)))
    add_gram(torch.zeros(rows, rows), torch.randn(rows, 3))
    assert bool(calls) == called


@pytest.mark.usefixtures("available")
def test_strides():
    wide = torch.full((2 * 13, 50), torch.nan)
    wide[::2, 3:40] = torch.randn(13, 37)
    for rows in (
        wide[::2, 3:40],
        wide[::2, 4:40:2],
        torch.randn(37, 13).T,
        torch.randn(1, 37).expand(13, 37),
    ):
        check_added(rows)
    inside = torch.zeros(9, 20)
    rows = torch.randn(7, 100)
    added(rows, inside[1:8, 4:11])
    assert (
        oracles.relative_error(inside[1:8, 4:11].triu(), (rows.double() @ rows.double().T).triu())
        < TOLERANCE[torch.float32]
    )
    inside[1:8, 4:11] = 0
    assert not inside.any()


@pytest.mark.usefixtures("available")
def test_a_sample_that_is_not_finite_spoils_its_own_row_and_column():
    rows = torch.randn(50, 300)
    rows[20, 299] = torch.nan
    k = added(rows, torch.zeros(50, 50))
    spoilt = torch.zeros(50, 50, dtype=torch.bool)
    spoilt[20], spoilt[:, 20] = True, True
    assert torch.equal(k.isnan(), spoilt.triu())


def check_threads():
    rows = torch.randn(131, 3000)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(added(rows, torch.zeros(131, 131)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@extension
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_gives_the_same_bits_on_any_number_of_threads(capability):
    code = """
import torch, test_add_gram as tests
for dtype in tests.TOLERANCE:
    tests.check_added(torch.randn(61, 1500, dtype=dtype))
tests.check_threads()
"""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *sys.path]))
    environment.pop("ATEN_CPU_CAPABILITY", None)
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@extension
@pytest.mark.parametrize(
    ("k", "c", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 5), ValueError, r"k: expected shape \(2, 2\)"),
        (
            torch.zeros(2, 2),
            torch.zeros(5, 2).T,
            ValueError,
            "c: expected shape .* with neighbouring columns",
        ),
        (torch.zeros(2, 2), torch.zeros(2, 5).double(), TypeError, "k: expected the dtype of c, Double"),
    ],
)
def test_wrong_arguments(k, c, error, message):
    with pytest.raises(error, match=message):
        native.extension.add_gram(k, c)
