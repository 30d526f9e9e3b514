import pytest
import torch
import triton
import triton.language as tl
from poison import poisoned

import fngd_kernels as fk
import oracles
from fngd_kernels.backends.torch.gram_pairs import gram_pairs as library_gram_pairs
from fngd_kernels.backends.triton import gram_pairs as fused
from fngd_kernels.backends.triton.common import lower_block
from fngd_kernels.backends.triton.gram_pairs import gram_pairs, gram_pairs_batch, gram_pairs_diag
from fngd_kernels.backends.triton.tiles import diagonal_grid, pair_grid, waves_cost

# On top of twice the library's error; products of 16-bit numbers are exact, tensor cores cut off their sums.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}
# Many samples in a tile, one sample in a tile, a sample in several tiles, blocks that share their pairs out.
SHAPES = [(1, 1, 1, 1), (17, 3, 33, 5), (3, 33, 17, 70), (1, 130, 3, 1), (20, 2, 5, 65)]


def linear_case(n, positions, inputs, outputs, dtype, device):
    a, e = torch.randn(n, positions, inputs), torch.randn(n, positions, outputs)
    return a.to(device, dtype), e.to(device, dtype)


def assert_as_good_as_the_library(a, e, bias, precision="ieee", tolerance=None):
    rows = oracles.linear_rows(a.cpu(), e.cpu(), bias)
    truth = rows @ rows.T
    library = library_gram_pairs(a, e, bias, fk.plan(a.shape, e.shape)).cpu()
    with poisoned():
        k, norms = gram_pairs(a, e, bias, precision), gram_pairs_diag(a, e, bias, precision)
    tolerance = TOLERANCE[a.dtype] if tolerance is None else tolerance
    for actual, peer, exact in (k, library, truth), (norms, library.diagonal(), truth.diagonal()):
        assert actual.dtype == torch.float32
        assert (
            oracles.relative_error(actual.cpu(), exact) <= 2 * oracles.relative_error(peer, exact) + tolerance
        )
    assert torch.equal(k, k.T)


@pytest.mark.parametrize(
    ("dtype", "bias"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.float16, True)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_and_their_diagonal(shape, bias, dtype, device):
    assert_as_good_as_the_library(*linear_case(*shape, dtype, device), bias)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_every_tile(multiprocessors, arch, device, monkeypatch):
    monkeypatch.setattr(fused, "capability", lambda _: divmod(arch, 10))
    monkeypatch.setattr(fused, "multiprocessors", lambda _: multiprocessors)
    for dtype in TOLERANCE:
        assert_as_good_as_the_library(*linear_case(11, 9, 70, 33, dtype, device), True)


# Of these the interpreter emulates none.
@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 4e-3), ("tf32x3", 1e-5)])
def test_precision(precision, tolerance, device):
    assert_as_good_as_the_library(
        *linear_case(9, 4, 40, 20, torch.float32, device), True, precision, tolerance
    )


def test_any_strides_and_nothing_read_beside_them(device):
    a = torch.randn(5, 7, 11, device=device).mT
    e = torch.randn(11, 5, 12, device=device)[..., ::2].transpose(0, 1)
    assert_as_good_as_the_library(a, e, True)
    assert_as_good_as_the_library(a[:1].expand(5, 11, 7), e, False)
    surrounded = torch.full((7, 13, 9), torch.nan, device=device)
    surrounded[1:-1, 1:-1, 1:-1] = a
    assert_as_good_as_the_library(surrounded[1:-1, 1:-1, 1:-1], e, True)


@pytest.mark.parametrize("shape", [(1, 130, 4, 4), (20, 3, 4, 4)])
def test_same_bits_every_time(shape, device):
    a, e = linear_case(*shape, torch.float32, device)
    assert torch.equal(gram_pairs(a, e, True), gram_pairs(a, e, True))
    assert torch.equal(gram_pairs_diag(a, e, True), gram_pairs_diag(a, e, True))


@pytest.mark.parametrize(("layers", "shape"), [(3, (17, 3, 33, 5)), (18, (6, 2, 5, 4))])
def test_layers_of_one_launch_have_the_bits_of_their_own(layers, shape, device):
    cases = [linear_case(*shape, torch.float32, device) for _ in range(layers)]
    with poisoned():
        k = gram_pairs_batch(*zip(*cases, strict=True), True)
    assert k.shape == (layers, shape[0], shape[0])
    for own, (a, e) in zip(k, cases, strict=True):
        assert torch.equal(own, gram_pairs(a, e, True))


# One program shares out the pairs of positions of fewer layers among more programs: other sums, as good.
def test_layers_of_one_launch_with_partial_sums(device, monkeypatch):
    monkeypatch.setattr(fused, "multiprocessors", lambda _: 8)
    cases = [linear_case(1, 130, 3, 2, torch.float32, device) for _ in range(3)]
    with poisoned():
        k = gram_pairs_batch(*zip(*cases, strict=True), True)
    for own, (a, e) in zip(k, cases, strict=True):
        rows = oracles.linear_rows(a.cpu(), e.cpu(), True)
        assert oracles.relative_error(own.cpu(), rows @ rows.T) < TOLERANCE[torch.float32]
    assert torch.equal(k, gram_pairs_batch(*zip(*cases, strict=True), True))


@triton.jit
def _lower_blocks_kernel(PLACES, num_blocks, pids: tl.constexpr):
    for pid in range(0, pids):
        row, column = lower_block(pid, num_blocks)
        tl.store(PLACES + 2 * pid, row)
        tl.store(PLACES + 2 * pid + 1, column)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 6, 7])
def test_every_block_of_the_lower_triangle_once(num_blocks, device):
    pids = num_blocks * (num_blocks + 1) // 2
    places = torch.full((pids, 2), -1, device=device, dtype=torch.int32)
    _lower_blocks_kernel[(1,)](PLACES=places, num_blocks=num_blocks, pids=pids)
    expected = {(row, column) for row in range(num_blocks) for column in range(row + 1)}
    assert {tuple(place) for place in places.tolist()} == expected


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("positions", [1, 2, 3, 33, 64, 197, 1024])
@pytest.mark.parametrize("n", [1, 2, 33, 128, 4096])
def test_grids_cover_every_pair(n, positions, rows):
    for grid, symmetric in (
        (pair_grid(n, positions, rows, 264), False),
        (diagonal_grid(n, positions, rows, 264), True),
    ):
        assert grid.samples * grid.positions == rows or symmetric
        assert grid.samples <= rows // 2
        blocks = -(-n // grid.samples)
        assert grid.blocks == (blocks if symmetric else blocks * (blocks + 1) // 2)
        chunks = -(-positions // grid.positions)
        pairs = chunks * (chunks + 1) // 2 if symmetric else chunks**2
        assert (grid.parts - 1) * grid.pairs < pairs <= grid.parts * grid.pairs
        assert grid.parts == 1 or grid.blocks * grid.parts <= 264 + grid.blocks


@pytest.mark.parametrize(
    ("n", "layers", "rows"),
    [
        # Of 128 rows: 136 tiles, of which 4 wait for the other 132; of 64: 528, which take 4 full waves.
        (128, 1, 64),
        # 36 tiles leave most processors idle.
        (64, 1, 64),
        # The tiles of 12 layers, and those of a large batch, fill the device either way.
        (128, 12, 128),
        (1024, 1, 128),
    ],
)
def test_small_tiles_where_large_ones_leave_the_device_idle(n, layers, rows, monkeypatch):
    monkeypatch.setattr(fused, "capability", lambda _: (9, 0))
    monkeypatch.setattr(fused, "multiprocessors", lambda _: 132)
    a = torch.empty(n, 16, 64, dtype=torch.bfloat16, device="meta")
    chosen, grid = fused._tile_and_grid([a] * layers, [a] * layers)
    assert chosen.blocks["ROWS"] == grid.samples * grid.positions == rows


def test_the_last_wave_costs_as_much_as_a_full_one():
    grid = pair_grid(128, 16, 128, 264)
    assert (grid.blocks, grid.parts, grid.pairs) == (136, 1, 1)
    assert waves_cost(grid, 1, 136) == 128**2
    assert waves_cost(grid, 1, 132) == 2 * 128**2
    assert waves_cost(grid, 2, 136) == 2 * 128**2


@pytest.mark.parametrize("n", [1, 64, 100, 1408, 4096])
def test_partial_sums_stay_small(n):
    multiprocessors = 132
    for positions in (1, 2, 33, 128, 1000):
        parts = pair_grid(n, positions, 128, 2 * multiprocessors).parts
        assert 4 * parts * n * n <= (multiprocessors * 64 << 10) + 4 * n * n
