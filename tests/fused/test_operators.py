"""The operators as CUDA tensors see them: every route against float64 gradients per sample."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

import oracles
from fngd_kernels import plan
from fngd_kernels.ops import cuda

WORKSPACE = 1 << 20
BOUND = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-3}


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
    itemsize = min(4, a.itemsize)
    assert plan(a.shape, e.shape, bias=True, itemsize=itemsize, capability=(9, 0)).algorithm == algorithm
    rows = oracles.linear_rows(a.cpu(), e.cpu(), True)
    k = cuda.gram(a, e, True, WORKSPACE)
    assert oracles.relative_error(k.cpu(), rows @ rows.T) < BOUND[dtype]
    norms = cuda.gram_diag(a, e, True, WORKSPACE)
    assert oracles.relative_error(norms.cpu(), rows.square().sum(1)) < BOUND[dtype]
    s = torch.rand(len(a), device=device)
    weight, bias = cuda.combine(a, e, s, True)
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
    arguments = (weight_shape, *geometry.values(), True)
    rows = oracles.conv_rows(x.cpu(), e.cpu(), weight_shape, True, **geometry)
    k = cuda.gram_conv(x, e, *arguments, WORKSPACE)
    assert oracles.relative_error(k.cpu(), rows @ rows.T) < BOUND[dtype]
    s = torch.rand(3, device=device)
    weight, bias = cuda.combine_conv(x, e, s, *arguments)
    total = torch.cat([weight.flatten(), bias]).cpu()
    assert oracles.relative_error(total, s.cpu().double() @ rows) < max(1e-5, 20 * BOUND[dtype])


def test_conv_without_neighbours_is_a_linear_layer_on_pixels(device):
    x, e = torch.randn(3, 4, 3, 2, device=device), torch.randn(3, 5, 3, 2, device=device)
    rows = oracles.conv_rows(x.cpu(), e.cpu(), (5, 4, 1, 1), True)
    k = cuda.gram_conv(x, e, (5, 4, 1, 1), (1, 1), (0, 0), (1, 1), 1, True, WORKSPACE)
    assert oracles.relative_error(k.cpu(), rows @ rows.T) < 1e-5


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("positions", [(), (6,)])
def test_embedding(positions, dtype, device):
    ids = torch.randint(5, (4, *positions), device=device)
    e = torch.randn(4, *positions, 3).to(device, dtype)
    rows = oracles.embedding_rows(ids.cpu(), e.cpu(), 5, 2)
    k = cuda.gram_embedding(ids, e, 2, WORKSPACE)
    assert oracles.relative_error(k.cpu(), rows @ rows.T) < BOUND[dtype]
    norms = cuda.gram_embedding_diag(ids, e, 2, WORKSPACE)
    assert oracles.relative_error(norms.cpu(), rows.square().sum(1)) < BOUND[dtype]
    s = torch.rand(4, device=device)
    total = cuda.combine_embedding(ids, e, s, 5, 2).cpu().flatten()
    assert oracles.relative_error(total, s.cpu().double() @ rows) < max(1e-5, 20 * BOUND[dtype])


def test_empty_tensors(device):
    a, e = torch.zeros(0, 3, 4, device=device), torch.zeros(0, 3, 2, device=device)
    s = torch.zeros(0, device=device)
    assert cuda.gram(a, e, True, WORKSPACE).shape == (0, 0)
    assert cuda.gram_diag(a, e, True, WORKSPACE).shape == (0,)
    assert torch.equal(cuda.combine(a, e, s, False)[0].cpu(), torch.zeros(2, 4))


def test_plans_name_the_tiles_of_their_kernels():
    explicit = plan((64, 256, 96), (64, 256, 96), itemsize=2, capability=(9, 0))
    assert explicit.algorithm == "explicit"
    assert len(explicit.tiles) == 2
    assert explicit.macs == 64 * 256 * 96**2 + 64 * 65 // 2 * 96**2
    pairs = plan((64, 4, 512), (64, 4, 512), itemsize=2, capability=(9, 0))
    assert (pairs.algorithm, pairs.workspace, len(pairs.tiles)) == ("pairs", 0, 1)
    assert pairs.macs == 64 * 65 // 2 * 4 * 4 * 1024
    x = plan((8, 16, 9, 9), (8, 16, 9, 9), weight_shape=(16, 16, 3, 3), padding=1, capability=(8, 0))
    assert (x.algorithm, len(x.tiles)) == ("explicit", 2)
    assert plan((64, 4, 512), (64, 4, 512)).tiles == ()


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precisions_reach_every_kernel(precision, device, monkeypatch):
    seen = []

    def spy(launcher, *arguments):
        seen.extend(argument for argument in arguments if isinstance(argument, str))
        return launcher(*arguments)

    launchers = ("gram_hadamard", "gram_pairs", "gram_explicit", "gram_conv_explicit", "fused_gram_embedding")
    for name in launchers:
        monkeypatch.setattr(cuda, name, partial(spy, getattr(cuda, name)))
    for shape in ((3, None, 4, 2), (2, 2, 20, 17), (2, 33, 5, 4)):
        cuda.gram(*linear_case(shape, torch.float32, device), False, WORKSPACE, precision)
    x, e = torch.randn(2, 2, 4, 4, device=device), torch.randn(2, 3, 2, 2, device=device)
    cuda.gram_conv(x, e, (3, 2, 3, 3), (1, 1), (0, 0), (1, 1), 1, False, WORKSPACE, precision)
    ids, e = torch.zeros(2, 3, dtype=torch.int64, device=device), torch.randn(2, 3, 4, device=device)
    cuda.gram_embedding(ids, e, None, WORKSPACE, precision)
    assert seen == [precision] * 5
