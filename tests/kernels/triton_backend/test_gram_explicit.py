import pytest
import torch
from poison import poisoned

import fngd_kernels as fk
import oracles
from fngd_kernels.backends.torch.gram_explicit import gram_explicit as library_gram_explicit
from fngd_kernels.backends.triton import gram_explicit as explicit
from fngd_kernels.backends.triton.gram_explicit import gram_explicit
from fngd_kernels.backends.triton.tiles import Tile

# On top of twice the library's error: rounding of sums, and of both factors in C C^T to 10 or 8 bits.
TOLERANCE = {"ieee": 1e-6, "tf32x3": 1e-6, "tf32": 2**-10, None: 2**-7}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (3, 33, 17, 40), (17, 3, 33, 1), (2, 20, 130, 129)]


def linear_case(n, t, inputs, outputs, dtype, device):
    return (torch.randn(n, t, size).to(device, dtype) for size in (inputs, outputs))


def assert_as_good_as_the_library(a, e, bias, precision=None, **options):
    rows = oracles.linear_rows(a, e, bias)
    truth = rows @ rows.T
    with poisoned():
        k = gram_explicit(a, e, bias, precision, **options)
    library = library_gram_explicit(a, e, bias, fk.plan(a.shape, e.shape, bias=bias))
    assert k.dtype == torch.float32
    assert torch.equal(k, k.T)
    tolerance = TOLERANCE["ieee" if a.dtype == torch.float32 and precision is None else precision]
    assert oracles.relative_error(k, truth) <= 2 * oracles.relative_error(library, truth) + tolerance


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of samples, and partial sums of which the last are empty."""
    monkeypatch.setattr(explicit, "multiprocessors", lambda _: 21)
    monkeypatch.setattr(explicit, "tile", lambda *_: Tile({"BN": 16, "MIN_BN": 16, "BK": 16}, 4, 1, ""))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gram(shape, bias, dtype, device):
    assert_as_good_as_the_library(*linear_case(*shape, dtype, device), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_samples_and_partial_sums(dtype, device, small_blocks):
    assert_as_good_as_the_library(*linear_case(20, 5, 19, 12, dtype, device), True)


@pytest.mark.parametrize("workspace", [0, 20_000])
def test_small_workspaces_change_nothing(workspace, device):
    assert_as_good_as_the_library(
        *linear_case(5, 4, 70, 21, torch.float32, device), True, workspace=workspace
    )


def test_scratch_is_bounded(device):
    n, workspace = 20, 1 << 18
    a, e = linear_case(n, 3, 100, 70, torch.float32, device)

    def run():
        gram_explicit(a, e, True, workspace=workspace)

    if device.type == "cuda":
        run()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = oracles.peak_allocation(run)
    # Beside K, and the column of ones in the 512 bytes that the device gives at least.
    assert peak <= workspace + 4 * n * n + 512


def test_any_strides(device):
    a = torch.randn(5, 7, 11, device=device).mT
    e = torch.randn(11, 5, 12, device=device)[..., ::2].transpose(0, 1)
    assert_as_good_as_the_library(a, e, True)
    assert_as_good_as_the_library(a[:1].expand_as(a), e, False)


def test_empty_sequence(device):
    a, e = linear_case(2, 0, 3, 4, torch.float32, device)
    with poisoned():
        assert not gram_explicit(a, e, True).count_nonzero()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_stays_nan(device):
    a, e = linear_case(3, 5, 4, 6, torch.bfloat16, device)
    a[1, 2, 3], e[2] = torch.nan, torch.inf
    assert gram_explicit(a, e, False).isfinite().tolist() == [
        [i == j == 0 for i in range(3)] for j in range(3)
    ]


def test_same_bits_every_time(device, small_blocks):
    a, e = linear_case(20, 5, 19, 12, torch.float32, device)
    assert torch.equal(gram_explicit(a, e, True), gram_explicit(a, e, True))


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_precision(precision, dtype, device):
    assert_as_good_as_the_library(*linear_case(3, 17, 5, 3, dtype, device), False, precision)


@pytest.mark.parametrize(
    ("dtype", "precision", "bits", "bound"),
    [(torch.float32, "tf32", 13, 1e-4), (torch.bfloat16, "tf32", 13, 1e-4), (torch.bfloat16, None, 16, 5e-4)],
)
def test_contributions_are_rounded_to_nearest(dtype, precision, bits, bound, device):
    a, e = linear_case(8, 16, 64, 64, dtype, device)
    rows = oracles.linear_rows(a, e, False)
    cut = (rows.float().view(torch.int32) & -(1 << bits)).view(torch.float32).double()
    # What becomes of rows whose low bits are cut off, as tensor cores do it for tf32.
    assert oracles.relative_error(cut @ cut.T, rows @ rows.T) > 4 * bound
    assert oracles.relative_error(gram_explicit(a, e, False, precision), rows @ rows.T) < bound


def test_contributions_of_16_bits_beyond_the_range_of_float16(device):
    a, e = linear_case(3, 5, 4, 6, torch.float16, device)
    rows = oracles.linear_rows(a * 64, e * 4096, False)
    k = gram_explicit(a * 64, e * 4096, False)
    assert rows.abs().max() > torch.finfo(torch.float16).max
    assert oracles.relative_error(k, rows @ rows.T) < 2**-7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="6 GiB that a CPU would have to write")
def test_offsets_beyond_32_bits(device):
    a, e = linear_case(3, 5, 7, 4, torch.bfloat16, device)
    storage = torch.empty((2 << 30) + 35, dtype=a.dtype, device=device)
    far = storage.as_strided(a.shape, (1 << 30, 7, 1)).copy_(a)
    assert_as_good_as_the_library(far, e, False)
