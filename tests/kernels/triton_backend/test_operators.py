"""The operators as CUDA tensors see them: every route against float64 gradients per sample."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import fngd_kernels as fk
import oracles
from fngd_kernels import plan
from fngd_kernels.backends.triton import common, costs
from fngd_kernels.cost_model import plan_conv, plan_linear
from fngd_kernels.ops import devices, triton
from fngd_kernels.ops.gram import gram_batch

WORKSPACE = 1 << 20
BOUND = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-3}
FORMED = BOUND | {torch.bfloat16: 2**-7}  # where contributions are formed, and rounded to 8 bits


@pytest.fixture(autouse=True)
def _launches_cost_nothing(monkeypatch):
    """Let layers that are small enough for a test take every algorithm."""
    monkeypatch.setattr(costs, "LAUNCH", {2: 0.0, 4: 0.0})
    for planned in (plan_linear, plan_conv):
        planned.cache_clear()
    yield
    for planned in (plan_linear, plan_conv):
        planned.cache_clear()


@pytest.fixture(autouse=True)
def _runs_triton(monkeypatch):
    """Let the operators treat a CPU on which Triton interprets as they treat a CUDA device, without tf32."""
    if common.INTERPRET:
        monkeypatch.setattr(devices, "runs_triton", lambda device: True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def linear_case(shape, dtype, device):
    n, t, inputs, outputs = shape
    positions = () if t is None else (t,)
    a, e = torch.randn(n, *positions, inputs), torch.randn(n, *positions, outputs)
    return a.to(device, dtype), e.to(device, dtype)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("shape", "algorithm"),
    [((5, None, 7, 3), "hadamard"), ((4, 3, 20, 17), "pairs"), ((3, 33, 5, 4), "explicit")],
)
def test_linear(shape, algorithm, dtype, device):
    a, e = linear_case(shape, dtype, device)
    if dtype != torch.float64:
        chosen = plan(a.shape, e.shape, bias=True, itemsize=a.itemsize, capability=(9, 0))
        assert (chosen.backend, chosen.algorithm) == ("triton", algorithm)
    rows = oracles.linear_rows(a.cpu(), e.cpu(), True)
    k = fk.gram(a, e, bias=True, workspace=WORKSPACE)
    bound = FORMED if algorithm == "explicit" else BOUND
    assert oracles.relative_error(k.cpu(), rows @ rows.T) < bound[dtype]
    norms = fk.gram(a, e, bias=True, diag=True, workspace=WORKSPACE)
    assert oracles.relative_error(norms.cpu(), rows.square().sum(1)) < BOUND[dtype]
    s = torch.rand(len(a), device=device)
    weight, bias = fk.combine(a, e, s, bias=True)
    total = torch.cat([weight.flatten(), bias])
    # The gradient is rounded to the inputs' dtype.
    assert oracles.relative_error(total.cpu(), s.cpu().double() @ rows) < max(1e-5, 20 * BOUND[dtype])


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_conv(dtype, memory_format, device):
    weight_shape, geometry = (
        (6, 2, 3, 2),
        {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 1), "groups": 2},
    )
    x = torch.randn(3, 4, 5, 4)
    e = torch.randn_like(F.conv2d(x, torch.zeros(weight_shape), **geometry))
    x, e = (t.to(device, dtype).contiguous(memory_format=memory_format) for t in (x, e))
    rows = oracles.conv_rows(x.cpu(), e.cpu(), weight_shape, True, **geometry)
    k = fk.gram_conv(x, e, weight_shape, **geometry, bias=True, workspace=WORKSPACE)
    assert oracles.relative_error(k.cpu(), rows @ rows.T) < FORMED[dtype]
    s = torch.rand(3, device=device)
    weight, bias = fk.combine_conv(x, e, s, weight_shape, **geometry, bias=True)
    total = torch.cat([weight.flatten(), bias]).cpu()
    assert oracles.relative_error(total, s.cpu().double() @ rows) < max(1e-5, 20 * BOUND[dtype])


def test_conv_without_neighbours_is_a_linear_layer_on_pixels(device):
    x, e = torch.randn(3, 4, 3, 2, device=device), torch.randn(3, 5, 3, 2, device=device)
    rows = oracles.conv_rows(x.cpu(), e.cpu(), (5, 4, 1, 1), True)
    k = fk.gram_conv(x, e, (5, 4, 1, 1), bias=True, workspace=WORKSPACE)
    assert oracles.relative_error(k.cpu(), rows @ rows.T) < 1e-5


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        ((2, 3), {"padding": 1}),
        ((5, 4), {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)}),
        ((3, 3), {"padding": 0}),
    ],
)
def test_conv_of_few_positions_is_a_linear_layer_on_patches(size, geometry, memory_format, dtype, device):
    weight_shape = (70, 40, 3, 3)
    x = torch.randn(3, 40, *size)
    e = torch.randn_like(F.conv2d(x, torch.zeros(weight_shape), **geometry))
    x, e = (t.to(device, dtype).contiguous(memory_format=memory_format) for t in (x, e))
    if dtype != torch.float64:
        shapes = {"weight_shape": weight_shape, "itemsize": x.itemsize, "capability": (9, 0)}
        assert plan(x.shape, e.shape, **shapes, **geometry).unfolded
    rows = oracles.conv_rows(x.cpu(), e.cpu(), weight_shape, True, **geometry)
    k = fk.gram_conv(x, e, weight_shape, **geometry, bias=True)
    assert oracles.relative_error(k.cpu(), rows @ rows.T) < BOUND[dtype]


@pytest.mark.parametrize("workspace", [1 << 20, 100])
def test_images_with_many_channels_are_copied_to_channels_last_if_they_fit(workspace, device):
    weight_shape = (33, 40, 3, 3)
    x, e = torch.randn(2, 40, 6, 6, device=device), torch.randn(2, 33, 6, 6, device=device)
    rows = oracles.conv_rows(x.cpu(), e.cpu(), weight_shape, False, padding=1)
    k = fk.gram_conv(x, e, weight_shape, padding=1, workspace=workspace)
    assert oracles.relative_error(k.cpu(), rows @ rows.T) < 1e-5


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("positions", [(), (6,)])
def test_embedding(positions, dtype, device):
    ids = torch.randint(5, (4, *positions), device=device)
    e = torch.randn(4, *positions, 3).to(device, dtype)
    rows = oracles.embedding_rows(ids.cpu(), e.cpu(), 5, 2)
    k = fk.gram_embedding(ids, e, padding_idx=2, workspace=WORKSPACE)
    assert oracles.relative_error(k.cpu(), rows @ rows.T) < BOUND[dtype]
    norms = fk.gram_embedding(ids, e, padding_idx=2, diag=True, workspace=WORKSPACE)
    assert oracles.relative_error(norms.cpu(), rows.square().sum(1)) < BOUND[dtype]
    s = torch.rand(4, device=device)
    total = fk.combine_embedding(ids, e, s, 5, padding_idx=2).cpu().flatten()
    assert oracles.relative_error(total, s.cpu().double() @ rows) < max(1e-5, 20 * BOUND[dtype])


def test_empty_tensors(device):
    a, e = torch.zeros(0, 3, 4, device=device), torch.zeros(0, 3, 2, device=device)
    s = torch.zeros(0, device=device)
    assert fk.gram(a, e, bias=True, workspace=WORKSPACE).shape == (0, 0)
    assert fk.gram(a, e, bias=True, diag=True, workspace=WORKSPACE).shape == (0,)
    assert torch.equal(fk.combine(a, e, s).cpu(), torch.zeros(2, 4))


def test_macs_by_hand():
    explicit = plan((64, 256, 96), (64, 256, 96), itemsize=2, capability=(9, 0))
    assert explicit.algorithm == "explicit"
    assert explicit.macs == 64 * 256 * 96**2 + 64 * 65 // 2 * 96**2
    pairs = plan((64, 4, 512), (64, 4, 512), itemsize=2, capability=(9, 0))
    assert (pairs.algorithm, pairs.workspace) == ("pairs", 0)
    assert pairs.macs == 64 * 65 // 2 * 4 * 4 * 1024


LAUNCHERS = {
    "gram_hadamard": "hadamard",
    "gram_pairs": "pairs",
    "gram_hadamard_batch": "hadamard batch",
    "gram_pairs_batch": "pairs batch",
    "gram_explicit": "explicit",
    "gram_conv_explicit": "conv explicit",
}


@pytest.fixture
def launched(monkeypatch):
    """Return a list of the algorithms whose kernels were launched."""
    names = []

    def spy(launcher, name, *arguments):
        names.append(name)
        return launcher(*arguments)

    for launcher, name in LAUNCHERS.items():
        monkeypatch.setattr(triton, launcher, partial(spy, getattr(triton, launcher), name))
    return names


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", [(5, None, 7, 3), (4, 1, 7, 3), (4, 3, 20, 17), (3, 33, 5, 4)], ids=str)
def test_the_plan_of_a_linear_layer_says_what_runs(shape, dtype, device, launched):
    a, e = linear_case(shape, dtype, device)
    chosen = plan(a.shape, e.shape, itemsize=a.itemsize, capability=(9, 0))
    fk.gram(a, e)
    assert launched == ([chosen.algorithm] if chosen.backend == "triton" else [])
    assert (chosen.backend == "torch") == (dtype == torch.float64)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("shape", "launches"),
    [
        ((5, 1, 7, 3), ["hadamard batch"]),
        ((4, 3, 20, 17), ["pairs batch"]),
        ((3, 33, 5, 4), ["explicit", "explicit"]),
    ],
    ids=str,
)
def test_a_batch_of_linear_layers(shape, launches, dtype, device, launched):
    layers = [linear_case(shape, dtype, device) for _ in range(2)]
    k = gram_batch(*zip(*layers, strict=True), True)
    for own, (a, e) in zip(k, layers, strict=True):
        rows = oracles.linear_rows(a.cpu(), e.cpu(), True)
        bound = FORMED if launches[0] == "explicit" else BOUND
        assert oracles.relative_error(own.cpu(), rows @ rows.T) < bound[dtype]
    assert launched == ([] if dtype == torch.float64 else launches)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "options", "unfolded"),
    [
        ((2, 4, 3, 2), (5, 4, 3, 2), {"padding": 1}, False),
        # A linear layer on its pixels: few of them, one, many.
        ((2, 20, 2, 2), (17, 20, 1, 1), {}, True),
        ((2, 4, 1, 1), (5, 4, 1, 1), {}, True),
        ((2, 4, 6, 6), (5, 4, 1, 1), {}, True),
        # On its patches: strided, padded.
        ((2, 20, 3, 3), (17, 20, 1, 1), {"stride": 2}, True),
        ((2, 40, 2, 2), (48, 40, 3, 3), {"padding": 1}, True),
        # Neither: padding makes many positions, groups.
        ((2, 20, 2, 2), (17, 20, 1, 1), {"padding": 1}, False),
        ((2, 20, 2, 2), (18, 10, 1, 1), {"groups": 2}, False),
    ],
)
def test_the_plan_of_a_convolution_says_what_runs(
    x_shape, weight_shape, options, unfolded, dtype, device, launched
):
    x = torch.randn(x_shape)
    e = torch.randn_like(F.conv2d(x, torch.zeros(weight_shape), **options))
    x, e = x.to(device, dtype), e.to(device, dtype)
    chosen = plan(
        x.shape, e.shape, weight_shape=weight_shape, **options, itemsize=x.itemsize, capability=(9, 0)
    )
    fk.gram_conv(x, e, weight_shape, **options)
    algorithm = chosen.algorithm if chosen.unfolded else f"conv {chosen.algorithm}"
    assert chosen.unfolded == (unfolded and chosen.backend == "triton")
    assert launched == ([algorithm] if chosen.backend == "triton" else [])
    assert (chosen.backend == "torch") == (dtype == torch.float64)


@pytest.fixture
def precisions(monkeypatch):
    """Return a list of the precisions that kernels were launched with."""
    seen = []

    def spy(launcher, *arguments):
        seen.extend(argument for argument in arguments if isinstance(argument, str))
        return launcher(*arguments)

    for name in (*LAUNCHERS, "triton_gram_embedding"):
        monkeypatch.setattr(triton, name, partial(spy, getattr(triton, name)))
    return seen


@pytest.mark.parametrize("allowed", ["tf32", "ieee"])
def test_float32_is_multiplied_as_torch_was_told(allowed, device, precisions, monkeypatch):
    other = "ieee" if allowed == "tf32" else "tf32"
    # Not the attributes of torch's own objects, which cannot be put back.
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=allowed))
    monkeypatch.setitem(vars(torch.backends.cudnn), "conv", SimpleNamespace(fp32_precision=other))
    fk.gram(*linear_case((2, 2, 20, 17), torch.float32, device))
    assert precisions == [allowed]
    for weight_shape in (
        (3, 2, 3, 3),
        (3, 2, 4, 4),
    ):  # contributions; one position, a linear layer on patches
        x, e = (
            torch.randn(2, 2, 4, 4, device=device),
            torch.randn(2, 3, *[5 - weight_shape[2]] * 2).to(device),
        )
        fk.gram_conv(x, e, weight_shape)
    ids, e = torch.zeros(2, 3, dtype=torch.int64, device=device), torch.randn(2, 3, 4, device=device)
    fk.gram_embedding(ids, e)
    assert precisions == [allowed, other, other, "tf32x3"]


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precisions_reach_every_kernel(precision, device, precisions):
    for shape in ((3, None, 4, 2), (2, 2, 20, 17), (2, 33, 5, 4)):
        fk.gram(*linear_case(shape, torch.float32, device), precision=precision)
    x, e = torch.randn(2, 2, 4, 4, device=device), torch.randn(2, 3, 2, 2, device=device)
    fk.gram_conv(x, e, (3, 2, 3, 3), precision=precision)
    ids, e = torch.zeros(2, 3, dtype=torch.int64, device=device), torch.randn(2, 3, 4, device=device)
    fk.gram_embedding(ids, e, precision=precision)
    for shape in ((3, 1, 4, 2), (2, 2, 20, 17)):
        a, e = linear_case(shape, torch.float32, device)
        torch.ops.fngd.gram_batch([a], [e], False, WORKSPACE, precision)
    assert precisions == [precision] * 7
