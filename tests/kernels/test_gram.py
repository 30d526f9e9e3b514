import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import fngd_kernels as fk
import oracles
from fngd_kernels.backends.torch.gram_conv_explicit import gram_conv_explicit
from fngd_kernels.backends.torch.gram_conv_pairs import gram_conv_pairs
from fngd_kernels.backends.torch.gram_explicit import gram_explicit
from fngd_kernels.backends.torch.gram_pairs import gram_pairs
from geometries import conv_geometry

# K is accumulated in at least fp32 whatever the inputs are, and casts to it are exact: one bound for all.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}

LINEAR = [
    (1, None, 1, 1),
    (3, None, 63, 10),
    (129, None, 5, 3),
    (3, 1, 4, 5),
    (63, 2, 31, 17),
    (5, 40, 3, 1),
]
CONV = [
    ((3, 4, 11), (6, 4, 3), {}),
    ((5, 4, 12), (6, 2, 4), {"stride": 3, "padding": 2, "dilation": 2, "groups": 2}),
    ((3, 3, 7, 6), (5, 3, 3, 3), {"padding": 1}),
    ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    ((9, 4, 5, 7), (6, 2, 3, 2), {"stride": (2, 1), "padding": (1, 0), "groups": 2}),
    ((3, 6, 8, 9), (6, 1, 3, 3), {"stride": 2, "padding": 2, "dilation": (1, 2), "groups": 6}),
    ((4, 3, 6, 6), (4, 3, 2, 2), {"stride": 3}),
    ((2, 3, 2, 2), (4, 3, 1, 1), {"stride": 2, "padding": 3}),
    ((3, 4, 4, 5, 3), (6, 2, 3, 2, 1), {"stride": (1, 2, 1), "padding": (1, 1, 0), "groups": 2}),
]
WORKSPACES = [64 << 20, 20_000, 1_000]


def linear_case(n, t, inputs, outputs, dtype=torch.float32):
    positions = () if t is None else (t,)
    return torch.randn(n, *positions, inputs).to(dtype), torch.randn(n, *positions, outputs).to(dtype)


def conv_case(x_shape, weight_shape, geometry, dtype=torch.float32):
    x = torch.randn(x_shape)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(weight_shape) - 3]
    e = torch.randn_like(convolution(x, torch.zeros(weight_shape), **geometry))
    return x.to(dtype), e.to(dtype)


def assert_gram(k, rows, dtype):
    assert k.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert oracles.relative_error(k, rows @ rows.T) < TOLERANCE[dtype]
    assert torch.equal(k, k.T)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", LINEAR)
def test_gram(shape, bias, dtype):
    a, e = linear_case(*shape, dtype)
    assert_gram(fk.gram(a, e, bias=bias), oracles.linear_rows(a, e, bias), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("x_shape", "weight_shape", "geometry"), CONV)
def test_gram_conv(x_shape, weight_shape, geometry, bias, dtype):
    x, e = conv_case(x_shape, weight_shape, geometry, dtype)
    k = fk.gram_conv(x, e, weight_shape, **geometry, bias=bias)
    assert_gram(k, oracles.conv_rows(x, e, weight_shape, bias, **geometry), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padding_idx", [None, 0, 4])
@pytest.mark.parametrize(
    ("n", "t", "vocabulary"), [(1, None, 5), (63, None, 9), (3, 1, 5), (17, 29, 7), (5, 4, 1000)]
)
def test_gram_embedding(n, t, vocabulary, padding_idx, dtype):
    shape = (n,) if t is None else (n, t)
    ids, e = torch.randint(vocabulary, shape), torch.randn(*shape, 6).to(dtype)
    rows = oracles.embedding_rows(ids, e, vocabulary, padding_idx)
    for workspace in (64 << 20, 0):
        k = fk.gram_embedding(ids.int(), e, padding_idx=padding_idx, workspace=workspace)
        assert_gram(k, rows, dtype)


def test_gram_embedding_of_padding_alone():
    k = fk.gram_embedding(torch.full((3, 4), 2), torch.randn(3, 4, 5), padding_idx=2)
    assert torch.equal(k, torch.zeros(3, 3))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (63, 4, 5), (129, 3), (7,)])
def test_gram_rows(shape, dtype):
    g = torch.randn(shape).to(dtype)
    for workspace in (64 << 20, 0):
        assert_gram(fk.gram_rows(g, workspace=workspace), g.double().view(len(g), -1), dtype)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("algorithm", [gram_pairs, gram_explicit])
def test_every_linear_algorithm(algorithm, bias, workspace):
    a, e = linear_case(37, 3, 7, 5)
    rows = oracles.linear_rows(a, e, bias)
    plan = fk.plan(a.shape, e.shape, bias=bias, workspace=workspace)
    for samples, outputs, inputs in (
        (37, 11, 13),
        (plan.sample_chunk, plan.out_chunk, plan.in_chunk),
        (5, 2, 4),
    ):
        forced = replace(plan, sample_chunk=samples, out_chunk=outputs, in_chunk=inputs)
        assert_gram(algorithm(a, e, bias, forced), rows, a.dtype)


@pytest.mark.parametrize("algorithm", [gram_conv_pairs, gram_conv_explicit])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("x_shape", "weight_shape", "geometry"), CONV)
def test_every_conv_algorithm(algorithm, x_shape, weight_shape, geometry, bias):
    x, e = conv_case(x_shape, weight_shape, geometry)
    rows = oracles.conv_rows(x, e, weight_shape, bias, **geometry)
    whole = conv_geometry(weight_shape, **geometry)
    for workspace in WORKSPACES:
        plan = fk.plan(x.shape, e.shape, weight_shape=weight_shape, **geometry, workspace=workspace)
        for forced in (plan, replace(plan, sample_chunk=2, group_chunk=4, out_chunk=2, in_chunk=1)):
            assert_gram(algorithm(x, e, whole, bias, forced), rows, x.dtype)


def test_pixels_of_one_sample_that_lie_neither_in_rows_nor_in_columns():
    x, e = (t.float() for t in conv_case((1, 2, 4), (3, 2, 3), {"stride": 3, "padding": 1}))
    rows = oracles.conv_rows(x, e, (3, 2, 3), False, stride=3, padding=1)
    k = fk.gram_conv(x, e, (3, 2, 3), stride=3, padding=1, workspace=1000)
    assert_gram(k, rows, x.dtype)


def test_a_layer_without_inputs_has_the_gram_matrix_of_its_bias():
    e = torch.randn(4, 3, 5)
    assert_gram(fk.gram(torch.ones(4, 3, 0), e, bias=True), e.sum(1), e.dtype)
    assert torch.equal(fk.gram(torch.ones(4, 3, 0), e), torch.zeros(4, 4))


@pytest.mark.parametrize("ids", [[-1, 2], [0, 2**62]])
def test_ids_out_of_range_are_refused_on_the_cpu(ids):
    ids, e = torch.tensor([[0, 1], ids, [2, 3]]), torch.randn(3, 2, 4)
    for diag in (False, True):
        with pytest.raises(ValueError, match=r"^ids: expected 0 to"):
            fk.gram_embedding(ids, e, diag=diag)
    with pytest.raises(ValueError, match=r"^ids: expected 0 to 6, got"):
        fk.combine_embedding(ids, e, torch.ones(3), 7)


@pytest.mark.parametrize("workspace", [*WORKSPACES, 0])
def test_small_workspaces_change_nothing(workspace):
    a, e = linear_case(9, 20, 10, 7)
    assert_gram(fk.gram(a, e, bias=True, workspace=workspace), oracles.linear_rows(a, e, True), a.dtype)
    x, e = conv_case((7, 6, 9, 9), (4, 3, 3, 3), {"padding": 1, "groups": 2})
    k = fk.gram_conv(x, e, (4, 3, 3, 3), padding=1, groups=2, workspace=workspace)
    assert_gram(k, oracles.conv_rows(x, e, (4, 3, 3, 3), False, padding=1, groups=2), x.dtype)


def test_any_strides():
    a, e = torch.randn(5, 7, 11).mT, torch.randn(11, 5, 12)[..., ::2].transpose(0, 1)
    assert_gram(fk.gram(a, e, bias=True), oracles.linear_rows(a, e, True), a.dtype)
    wide = a.expand(5, 11, 7)[:1].expand(5, 11, 7)
    assert_gram(fk.gram(wide, e), oracles.linear_rows(wide, e, False), a.dtype)
    assert_gram(fk.gram(a[:, 0], e[:, 0]), oracles.linear_rows(a[:, 0], e[:, 0], False), a.dtype)
    g = torch.randn(6, 9).T
    assert_gram(fk.gram_rows(g), g.double(), g.dtype)
    ids = torch.randint(4, (11, 5)).T
    assert_gram(fk.gram_embedding(ids, e), oracles.embedding_rows(ids, e, 4, None), e.dtype)


@pytest.mark.parametrize("algorithm", [gram_conv_pairs, gram_conv_explicit])
def test_conv_takes_any_strides(algorithm):
    shape, geometry = (6, 4, 3, 3), {"padding": 1}
    x, e = conv_case((5, 4, 6, 7), shape, geometry)
    rows = oracles.conv_rows(x, e, shape, False, **geometry)
    plan = fk.plan(x.shape, e.shape, weight_shape=shape, **geometry)
    last = torch.channels_last
    padded = F.pad(x, (1, 2))[..., 1:-2]
    for x_view, e_view in (
        (x.to(memory_format=last), e.to(memory_format=last)),
        (padded, e.mT.contiguous().mT),
    ):
        whole = conv_geometry(shape, **geometry)
        assert_gram(algorithm(x_view, e_view, whole, False, plan), rows, x.dtype)


def test_empty_batch_and_empty_sequence():
    assert fk.gram(torch.ones(0, 3), torch.ones(0, 2)).shape == (0, 0)
    assert fk.gram_conv(torch.ones(0, 3, 4), torch.ones(0, 2, 2), (2, 3, 3)).shape == (0, 0)
    assert fk.gram_embedding(torch.ones(0, 3).long(), torch.ones(0, 3, 2)).shape == (0, 0)
    assert fk.gram_rows(torch.ones(0, 3)).shape == (0, 0)
    assert torch.equal(fk.gram(torch.ones(2, 0, 3), torch.ones(2, 0, 4), bias=True), torch.zeros(2, 2))


def test_reference_is_the_definition():
    a, e = linear_case(5, 4, 6, 3, torch.float64)
    rows = oracles.linear_rows(a, e, True)
    assert oracles.relative_error(fk.reference.gram(a, e, bias=True), rows @ rows.T) < 1e-12
    ids, padding = torch.randint(5, (5, 4)), 2
    rows = oracles.embedding_rows(ids, e, 5, padding)
    assert (
        oracles.relative_error(fk.reference.gram_embedding(ids, e, padding_idx=padding), rows @ rows.T)
        < 1e-12
    )
    for x_shape, weight_shape, geometry in CONV:
        x, e = conv_case(x_shape, weight_shape, geometry, torch.float64)
        rows = oracles.conv_rows(x, e, weight_shape, True, **geometry)
        k = fk.reference.gram_conv(x, e, weight_shape, **geometry, bias=True)
        assert oracles.relative_error(k, rows @ rows.T) < 1e-12


def test_reference_is_differentiable():
    a, e = (t.requires_grad_() for t in linear_case(3, 2, 4, 5, torch.float64))
    assert torch.autograd.gradcheck(lambda a, e: fk.reference.gram(a, e, bias=True), (a, e))


def test_no_gradients_are_recorded():
    a, e = (t.requires_grad_() for t in linear_case(4, 20, 5, 3))
    x, y = (t.requires_grad_() for t in conv_case((4, 3, 5), (2, 3, 3), {}))
    grams = fk.gram(a, e), fk.gram_conv(x, y, (2, 3, 3)), fk.gram_rows(a)
    assert not any(k.requires_grad for k in grams)


def test_autocast_does_not_round():
    a, e = linear_case(5, 20, 30, 17)
    with torch.autocast("cpu", torch.bfloat16):
        k = fk.gram(a, e)
    assert_gram(k, oracles.linear_rows(a, e, False), a.dtype)


@pytest.mark.parametrize("workspace", [8 << 20, 2 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_bounded(workspace, dtype):
    n = 32
    # What the docstring grants beside the workspace: matrices of K's size, buffers of the matrix product.
    bound = workspace + 8 * 4 * n * n + torch.get_num_threads() * (264 << 10)

    a, e = linear_case(n, 24, 256, 250, dtype)
    assert oracles.peak_allocation(partial(fk.gram, a, e, workspace=workspace)) <= bound

    weight_shape = (32, 32, 3, 3)
    x, e = conv_case((n, 32, 32, 32), weight_shape, {"padding": 1}, dtype)
    patch_bytes = n * 32 * 9 * 1024 * 4
    run = partial(fk.gram_conv, x, e, weight_shape, padding=1, workspace=workspace)
    assert oracles.peak_allocation(run) <= bound < patch_bytes

    ids, e = torch.randint(50, (n, 64)), torch.randn(n, 64, 256).to(dtype)
    run = partial(fk.gram_embedding, ids, e, workspace=workspace)
    assert oracles.peak_allocation(run) <= bound + 16 * ids.nbytes

    g = torch.randn(n, 70_000).to(dtype)
    assert oracles.peak_allocation(partial(fk.gram_rows, g, workspace=workspace)) <= bound


def test_process_never_holds_the_patch_tensor():
    # In a process of its own, so that the buffers inside the library count and earlier peaks do not.
    script = """
import resource, torch, fngd_kernels as fk
torch.set_num_threads(1)
shape = (64, 64, 3, 3)
x = torch.randn(64, 64, 32, 32)
fk.gram_conv(x[:, :, :4, :4], x[:, :, :4, :4], shape, padding=1, workspace=1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fk.gram_conv(x, x, shape, padding=1, workspace=32 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("ru_maxrss is in KiB on Linux only")
    kib = int(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    )
    patch_kib = 64 * 64 * 9 * 1024 * 4 / 1024
    assert kib < 48 << 10 < patch_kib


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fk.gram(torch.ones(2), torch.ones(2, 1)), ValueError, r"a: expected shape \(N,I\) or"),
        (lambda: fk.gram(torch.ones(2, 3), torch.ones(3, 3)), ValueError, r"e: expected shape \(2,O\)"),
        (lambda: fk.gram(torch.ones(2, 3), torch.ones(2, 1, 3)), ValueError, r"e: expected shape \(2,O\)"),
        (
            lambda: fk.gram(torch.ones(2, 4, 3), torch.ones(2, 5, 3)),
            ValueError,
            r"e: expected shape \(2,4,O\)",
        ),
        (lambda: fk.gram(torch.ones(2, 3).long(), torch.ones(2, 3)), TypeError, "a: expected float32"),
        (
            lambda: fk.gram(torch.ones(2, 3), torch.ones(2, 3).double()),
            TypeError,
            "e: expected the dtype of a",
        ),
        (
            lambda: fk.gram(torch.ones(2, 3), torch.ones(2, 3, device="meta")),
            ValueError,
            "e: expected the device",
        ),
        (
            lambda: fk.gram(torch.ones(2, 3), torch.ones(2, 3), workspace=-1),
            ValueError,
            "workspace: .* got -1",
        ),
        (lambda: fk.gram_rows(torch.ones(())), ValueError, "g: expected shape"),
        (lambda: fk.gram_rows(torch.ones(2, 2).int()), TypeError, "g: expected float32"),
        (lambda: fk.gram_rows(torch.ones(2, 2), workspace=-1), ValueError, "workspace"),
        (lambda: fk.gram_embedding(torch.ones(2), torch.ones(2, 3)), TypeError, "ids: expected int64"),
        (
            lambda: fk.gram_embedding(torch.ones(2, 1, 1).long(), torch.ones(2, 3)),
            ValueError,
            "ids: expected shape",
        ),
        (
            lambda: fk.gram_embedding(torch.ones(2, 3).long(), torch.ones(2, 3)),
            ValueError,
            r"e: .* \(2,3,D\)",
        ),
        (
            lambda: fk.gram_embedding(torch.ones(2).long(), torch.ones(2, 3).int()),
            TypeError,
            "e: expected float32",
        ),
        (
            lambda: fk.gram_embedding(torch.ones(2, device="meta").long(), torch.ones(2, 3)),
            ValueError,
            "ids: expected the device of e",
        ),
        (
            lambda: fk.gram_embedding(torch.ones(2).long(), torch.ones(2, 3), workspace=-1),
            ValueError,
            "workspace",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight_shape": (6, 4)}, ValueError, "weight_shape: expected"),
        ({"weight_shape": (6, 4, 1, 1, 1, 1)}, ValueError, "weight_shape: expected"),
        ({"weight_shape": (6, 4, 0, 3)}, ValueError, "weight_shape: expected"),
        ({"weight_shape": (6, 3, 3, 3)}, ValueError, r"x: expected shape \(N,3,size,size\)"),
        ({"x": torch.ones(2, 4, 5)}, ValueError, r"x: expected shape \(N,4,size,size\)"),
        ({"x": torch.ones(2, 4, 2, 2), "padding": 0}, ValueError, "x: expected space that the kernel fits"),
        ({"e": torch.ones(2, 6, 4, 5)}, ValueError, r"e: expected shape \(2, 6, 5, 5\), got \(2, 6, 4, 5\)"),
        ({"e": torch.ones(3, 6, 5, 5)}, ValueError, r"e: expected shape \(2, 6, 5, 5\)"),
        ({"e": torch.ones(2, 6, 5, 5).half()}, TypeError, "e: expected the dtype of x"),
        ({"e": torch.ones(2, 6, 5, 5, device="meta")}, ValueError, "e: expected the device of x"),
        ({"x": torch.ones(2, 4, 5, 5).long()}, TypeError, "x: expected float32"),
        ({"stride": 0}, ValueError, r"stride: expected an int or 2 ints, 1 or more, got \(0, 0\)"),
        ({"stride": (1, 1, 1)}, ValueError, "stride: expected"),
        ({"padding": -1}, ValueError, "padding: expected"),
        ({"dilation": (1,)}, ValueError, "dilation: expected"),
        ({"groups": 4}, ValueError, r"groups: expected a divisor of weight_shape\[0\] = 6, got 4"),
        ({"groups": 0}, ValueError, "groups: expected"),
        ({"workspace": -5}, ValueError, "workspace: expected an int, 0 or more and below 2\\*\\*63, got -5"),
        (
            {"precision": "fast"},
            ValueError,
            "precision: expected one of ieee, tf32, tf32x3, got 'fast'",
        ),
    ],
)
def test_bad_conv_input(changes, error, message):
    good = {
        "x": torch.ones(2, 4, 5, 5),
        "e": torch.ones(2, 6, 5, 5),
        "weight_shape": (6, 4, 3, 3),
        "padding": 1,
    }
    with pytest.raises(error, match=message):
        fk.gram_conv(**(good | changes))
