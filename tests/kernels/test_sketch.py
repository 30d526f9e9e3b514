"""Sketched Gram matrices: those of dense matrices of signs, and right in expectation."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

import fngd_kernels as fk
import oracles
from fngd_kernels.backends.torch import sketch as backend
from fngd_kernels.sketch import INPUTS, OUTPUTS, ROWS

# Compressed inputs of 16 bits are rounded to them, once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SEED = 3

LINEAR = [(5, None, 37, 20), (4, 1, 9, 3), (3, 6, 7, 33), (6, 5, 130, 4)]
CONV = [
    ((3, 9, 11), (8, 9, 3), {"stride": 2}),
    ((3, 12, 7, 6), (10, 6, 3, 2), {"padding": (1, 0), "groups": 2}),
    ((3, 6, 6, 6), (12, 1, 3, 3), {"stride": (2, 1), "dilation": 2, "groups": 6}),
    ((2, 20, 3, 3), (17, 20, 1, 1), {}),
    ((2, 7, 4, 5, 3), (6, 7, 3, 2, 1), {"stride": (1, 2, 1), "padding": (1, 1, 0)}),
]


def linear_case(n, t, inputs, outputs, dtype):
    positions = () if t is None else (t,)
    return torch.randn(n, *positions, inputs).to(dtype), torch.randn(n, *positions, outputs).to(dtype)


def conv_case(x_shape, weight_shape, geometry, dtype, memory_format=torch.contiguous_format):
    x = torch.randn(x_shape)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(weight_shape) - 3]
    e = torch.randn_like(convolution(x, torch.zeros(weight_shape), **geometry))
    return tuple(t.to(dtype).contiguous(memory_format=memory_format) for t in (x, e))


def sketched_rows(rows, weight_shape, groups, bias, size, seed=SEED):
    """Return the contributions (N, D) of weight and bias, compressed by dense matrices."""
    outputs, inputs = weight_shape[0], weight_shape[1] * groups
    r = oracles.sketch_matrix(outputs, size, seed, OUTPUTS, groups)
    q = oracles.sketch_matrix(inputs, size, seed, INPUTS, groups)
    c = rows[:, : rows.shape[1] - outputs * bias].view(
        len(rows), groups, outputs // groups, weight_shape[1], -1
    )
    parts = [torch.einsum("ngoik,gor,gis->ngrsk", c, r, q).flatten(1)]
    if bias:
        b = rows[:, -outputs:].view(len(rows), groups, -1)
        parts.append(torch.einsum("ngo,gor->ngr", b, r).flatten(1))
    return torch.cat(parts, 1)


def assert_gram(gram, rows, dtype):
    k = gram()
    assert k.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert oracles.relative_error(k, rows @ rows.T) < TOLERANCE[dtype]
    assert torch.equal(k, k.T)
    assert oracles.relative_error(gram(diag=True), rows.square().sum(1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear(shape, size, bias, dtype):
    a, e = linear_case(*shape, dtype)
    rows = sketched_rows(oracles.linear_rows(a, e, bias), (shape[3], shape[2]), 1, bias, size)
    assert_gram(partial(fk.gram, a, e, bias=bias, sketch=fk.Sketch(size, SEED)), rows, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("x_shape", "weight_shape", "geometry"), CONV)
def test_conv(x_shape, weight_shape, geometry, bias, dtype):
    x, e = conv_case(x_shape, weight_shape, geometry, dtype)
    rows = oracles.conv_rows(x, e, weight_shape, bias, **geometry)
    rows = sketched_rows(rows, weight_shape, geometry.get("groups", 1), bias, 4)
    sketch = fk.Sketch(4, SEED)
    assert_gram(partial(fk.gram_conv, x, e, weight_shape, **geometry, bias=bias, sketch=sketch), rows, dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last, "cropped"])
def test_conv_of_any_layout(memory_format):
    cropped = memory_format == "cropped"
    layout = torch.contiguous_format if cropped else memory_format
    x, e = conv_case((3, 12, 8, 9), (10, 6, 3, 2), {"groups": 2}, torch.float32, layout)
    if cropped:
        x, e = x[..., 1:, 1:-1], e[..., 1:, 1:-1]
    rows = sketched_rows(oracles.conv_rows(x, e, (10, 6, 3, 2), False, groups=2), (10, 6, 3, 2), 2, False, 4)
    sketch = fk.Sketch(4, SEED)
    assert_gram(partial(fk.gram_conv, x, e, (10, 6, 3, 2), groups=2, sketch=sketch), rows, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("positions", [(), (6,)])
def test_embedding(positions, padding_idx, dtype):
    ids, e = torch.randint(5, (4, *positions)), torch.randn(4, *positions, 19).to(dtype)
    rows = oracles.embedding_rows(ids, e, 5, padding_idx).view(4, 5, 19)
    rows = (rows @ oracles.sketch_matrix(19, 4, SEED, INPUTS)[0]).flatten(1)
    gram = partial(fk.gram_embedding, ids, e, padding_idx=padding_idx, sketch=fk.Sketch(4, SEED))
    assert_gram(gram, rows, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [2, 9])
@pytest.mark.parametrize("shape", [(5, 130), (3, 5, 20), (4, 1), (2,)])
def test_rows(shape, size, dtype):
    g = torch.randn(shape).to(dtype)
    rows = g.double().view(len(g), -1)
    rows = rows @ oracles.sketch_matrix(rows.shape[1], size**2, SEED, ROWS)[0]
    assert_gram(partial(fk.gram_rows, g, sketch=fk.Sketch(size, SEED)), rows, dtype)


def test_sums_of_16_bits_are_rounded_once(monkeypatch):
    x = torch.randn(5, 300, dtype=torch.bfloat16)
    matrix = oracles.sketch_matrix(300, 4, SEED, ROWS)[0]
    expected = (x.double() @ matrix).float().bfloat16()
    for product_size in (64, 1):
        monkeypatch.setattr(backend, "PRODUCT_SIZE", product_size)
        monkeypatch.setattr(backend, "CHUNK_BYTES", 4000)
        key = fk.Sketch(2, SEED).key(ROWS)
        y = torch.ops.fngd.sketch(x.unsqueeze(1), 1, 4, key, True)[:, 0]
        torch.testing.assert_close(y, expected, rtol=2**-8, atol=0)
        assert (y != expected).sum() <= 1


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (4, 4)])
def test_a_side_that_is_small_enough_stays_as_it_is(sizes):
    inputs, outputs = sizes
    a, e = torch.randn(5, 3, inputs), torch.randn(5, 3, outputs)
    assert torch.equal(fk.gram(a, e, sketch=6), fk.gram(a, e))
    x, y = torch.randn(5, 2 * inputs, 3, 3), torch.randn(5, 2 * outputs, 3, 3)
    weight_shape, options = (2 * outputs, inputs, 3, 3), {"padding": 1, "groups": 2}
    exact = fk.gram_conv(x, y, weight_shape, **options)
    assert torch.equal(fk.gram_conv(x, y, weight_shape, **options, sketch=6), exact)
    ids = torch.randint(3, (5, 3))
    assert torch.equal(fk.gram_embedding(ids, e, sketch=6), fk.gram_embedding(ids, e))
    g = torch.randn(5, 36)
    assert torch.equal(fk.gram_rows(g, sketch=6), fk.gram_rows(g))


def test_an_int_is_the_size_of_a_sketch():
    a, e = torch.randn(5, 37), torch.randn(5, 20)
    k = fk.gram(a, e, sketch=4)
    assert torch.equal(k, fk.gram(a, e, sketch=fk.Sketch(4)))
    assert not torch.equal(k, fk.gram(a, e, sketch=fk.Sketch(4, seed=1)))
    assert fk.Sketch() == fk.Sketch(64, 0)


def test_tensors_without_elements():
    for a_shape, e_shape in (((0, 9), (0, 9)), ((0, 3, 9), (0, 3, 9)), ((4, 0, 9), (4, 0, 9))):
        k = fk.gram(torch.ones(a_shape), torch.ones(e_shape), bias=True, sketch=2)
        assert torch.equal(k, torch.zeros(2 * a_shape[:1]))
    assert fk.gram_rows(torch.ones(0, 9), sketch=2).shape == (0, 0)
    assert fk.gram_conv(torch.ones(0, 9, 3, 3), torch.ones(0, 9, 3, 3), (9, 9, 1, 1), sketch=2).shape == (
        0,
        0,
    )


def test_expectation():
    """The mean over seeds is K within five of its standard deviations, which are known for one position."""
    n, inputs, outputs, size, seeds = 4, 12, 10, 3, 4000
    a, e = linear_case(n, None, inputs, outputs, torch.float64)

    def moments(x):
        """Return mean and mean square of <R^T x_i, R^T x_j>."""
        products, mean = x[:, None] * x[None], x @ x.T
        squares = x[:, None].square(), x[None].square()
        variance = torch.zeros(n, n, dtype=torch.float64)
        for b in range(size):
            p, (s, t) = products[..., b::size], (square[..., b::size] for square in squares)
            variance += p.sum(-1).square() + s.sum(-1) * t.sum(-1) - 2 * p.square().sum(-1)
        return mean, variance + mean.square()

    (mean_a, square_a), (mean_e, square_e) = moments(a), moments(e)
    k = mean_a * mean_e
    deviation = (square_a * square_e - k.square()).sqrt()
    found = torch.stack([fk.gram(a, e, sketch=fk.Sketch(size, seed)) for seed in range(seeds)])
    assert ((found.mean(0) - k).abs() < 5 * deviation / seeds**0.5).all()
    torch.testing.assert_close(found.std(0), deviation, rtol=0.2, atol=0)


def test_more_buckets_come_nearer():
    a, e = linear_case(16, 3, 128, 128, torch.float64)
    k = fk.gram(a, e)
    errors = [
        sum(oracles.relative_error(fk.gram(a, e, sketch=fk.Sketch(size, seed)), k) for seed in range(5))
        for size in (2, 8, 32, 128)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_signs_do_not_depend_on_torchs_generator():
    a, e = torch.randn(5, 37), torch.randn(5, 20)
    first = fk.gram(a, e, sketch=4)
    before = torch.random.get_rng_state()
    assert torch.equal(fk.gram(a, e, sketch=4), first)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("sketch", [True, False, 2.5, "8", (4,)])
def test_refused_types(sketch):
    a, e = torch.randn(5, 37), torch.randn(5, 20)
    calls = [
        partial(fk.gram, a, e),
        partial(fk.gram_conv, torch.ones(2, 9, 3), torch.ones(2, 9, 3), (9, 9, 1)),
        partial(fk.gram_embedding, torch.ones(5, dtype=torch.int64), e),
        partial(fk.gram_rows, a),
        partial(fk.plan, a.shape, e.shape),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="sketch: expected an int, a Sketch or None, got"):
            call(sketch=sketch)
    with pytest.raises(TypeError, match="size: expected an int, got"):
        fk.Sketch(sketch)
    with pytest.raises(TypeError, match="seed: expected an int, got"):
        fk.Sketch(4, seed=sketch)


def test_refused_numbers():
    with pytest.raises(ValueError, match="sketch: expected an int, 1 or more and below 32768, got 0"):
        fk.gram_rows(torch.randn(2, 3), sketch=0)
    with pytest.raises(ValueError, match=r"size: .*got -1"):
        fk.Sketch(-1)
    with pytest.raises(ValueError, match=r"size: .*got 32768"):
        fk.Sketch(2**15)
    with pytest.raises(ValueError, match=r"seed: .*got -1"):
        fk.Sketch(4, seed=-1)


def test_a_sketch_does_not_change():
    with pytest.raises(AttributeError):
        fk.Sketch().size = 3


def test_the_plan_is_that_of_the_compressed_layer():
    assert fk.plan((64, 32, 512), (64, 32, 100), sketch=16) == fk.plan((64, 32, 16), (64, 32, 16))
    assert fk.plan((64, 32, 8), (64, 32, 100), sketch=16) == fk.plan((64, 32, 8), (64, 32, 16))
    weight, small = (30, 20, 3, 3), (16, 8, 3, 3)
    planned = fk.plan((4, 40, 5, 5), (4, 30, 3, 3), weight_shape=weight, groups=2, sketch=8)
    assert planned == fk.plan((4, 16, 5, 5), (4, 16, 3, 3), weight_shape=small, groups=2)


def test_the_compressed_channels_lie_as_the_next_kernel_reads_them():
    x = torch.randn(2, 3, 9)
    for innermost, stride in ((True, (12, 4, 1)), (False, (12, 1, 3))):
        assert torch.ops.fngd.sketch(x, 1, 4, 5, innermost).stride() == stride


def test_signs_first_drawn_under_another_mode_serve_all_others():
    a, e = torch.randn(5, 37), torch.randn(5, 20)
    with torch._subclasses.FakeTensorMode() as mode:
        fk.gram(mode.from_tensor(a), mode.from_tensor(e), sketch=fk.Sketch(4, 77))
    fk.gram(a.to("meta"), e.to("meta"), sketch=fk.Sketch(4, 77))
    with torch.inference_mode():
        first = fk.gram(a, e, sketch=fk.Sketch(4, 77))
    again = fk.gram(a.requires_grad_(), e, sketch=fk.Sketch(4, 77))
    assert torch.equal(first, again)
    assert not again.requires_grad


def test_autocast_rounds_nothing():
    a, e = torch.randn(5, 37), torch.randn(5, 20)
    with torch.autocast("cpu", torch.bfloat16):
        k = fk.gram(a, e, sketch=4)
    assert torch.equal(k, fk.gram(a, e, sketch=4))


def test_a_function_of_sketches_compiles_to_one_graph():
    def grams(a, e, x, y):
        k = fk.gram(a, e, sketch=fk.Sketch(4, SEED)) + fk.gram_rows(a, sketch=2)
        return k + fk.gram_conv(x, y, (9, 7, 3), padding=1, sketch=4)

    arguments = (torch.randn(5, 37), torch.randn(5, 20), torch.randn(5, 7, 6), torch.randn(5, 9, 6))
    compiled = torch.compile(grams, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), grams(*arguments))
