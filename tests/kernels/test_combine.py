import pytest
import torch
from test_gram import CONV, LINEAR, conv_case, linear_case

import fngd_kernels as fk
import oracles
from fngd_kernels.ops import nodes

# Largest deviation over the largest entry. s_n e_n and the result are each rounded once to the input dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def coefficients(n, dtype):
    return torch.randn(n, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def assert_combined(actual, expected_rows, s, dtype):
    parts = actual if isinstance(actual, tuple) else (actual,)
    assert all(part.dtype == dtype and part.is_contiguous() for part in parts)
    flat = torch.cat([part.flatten() for part in parts])
    assert oracles.relative_error(flat, s.double() @ expected_rows) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", LINEAR)
def test_combine(shape, bias, dtype):
    a, e = linear_case(*shape, dtype)
    s = coefficients(len(a), dtype)
    combined = fk.combine(a, e, s, bias=bias)
    assert isinstance(combined, tuple) == bias
    assert_combined(combined, oracles.linear_rows(a, e, bias), s, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("x_shape", "weight_shape", "geometry"), CONV)
def test_combine_conv(x_shape, weight_shape, geometry, bias, dtype):
    x, e = conv_case(x_shape, weight_shape, geometry, dtype)
    s = coefficients(len(x), dtype)
    combined = fk.combine_conv(x, e, s, weight_shape, **geometry, bias=bias)
    assert (combined[0] if bias else combined).shape == weight_shape
    assert_combined(combined, oracles.conv_rows(x, e, weight_shape, bias, **geometry), s, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padding_idx", [None, 0, 4])
@pytest.mark.parametrize("shape", [(1,), (63,), (3, 1), (17, 29)])
def test_combine_embedding(shape, padding_idx, dtype):
    ids, e = torch.randint(5, shape), torch.randn(*shape, 6).to(dtype)
    s = coefficients(len(ids), dtype)
    combined = fk.combine_embedding(ids.int(), e, s, 7, padding_idx=padding_idx)
    assert_combined(combined, oracles.embedding_rows(ids, e, 7, padding_idx), s, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (63, 4, 5), (129, 3), (7,)])
def test_combine_rows(shape, dtype):
    g = torch.randn(shape).to(dtype)
    s = coefficients(len(g), dtype)
    combined = fk.combine_rows(g, s)
    assert combined.shape == shape[1:]
    assert_combined(combined, g.double().view(len(g), -1), s, dtype)


def test_any_strides():
    a, e, s = torch.randn(5, 7, 11).mT, torch.randn(11, 5, 12)[..., ::2].transpose(0, 1), torch.randn(10)[::2]
    assert_combined(fk.combine(a, e, s, bias=True), oracles.linear_rows(a, e, True), s, a.dtype)
    ids = torch.randint(4, (11, 5)).T
    assert_combined(fk.combine_embedding(ids, e, s, 4), oracles.embedding_rows(ids, e, 4, None), s, e.dtype)
    assert_combined(fk.combine_rows(a, s), a.double().flatten(1), s, a.dtype)
    shape, last = (6, 4, 3, 3), torch.channels_last
    x, e = conv_case((5, 4, 6, 7), shape, {"padding": 1})
    x, e = x.to(memory_format=last), e.to(memory_format=last)
    combined = fk.combine_conv(x, e, s, shape, padding=1, bias=True)
    assert_combined(combined, oracles.conv_rows(x, e, shape, True, padding=1), s, x.dtype)


def test_bfloat16_convolutions_in_the_order_of_channels():
    """Where torch 2.13's own weight gradient holds memory that was never written."""
    shape, geometry = (2, 3, 3, 2), {"stride": (1, 3), "padding": 1, "groups": 2}
    x, e = conv_case((2, 6, 4, 1), shape, geometry)
    x, e = (t.bfloat16().to(memory_format=torch.channels_last) for t in (x, e))
    x = x.as_strided(x.shape, (24, 1, 6, 6))
    s, rows = torch.tensor([0.5, 2.0]), oracles.conv_rows(x, e, shape, False, **geometry)
    for _ in range(20):
        _ = [torch.full((size,), float("nan"), dtype=torch.bfloat16) for size in (36, 72, 144, 288)]
        assert_combined(fk.combine_conv(x, e, s, shape, **geometry), rows, s, x.dtype)
        layer = torch.randn(shape, dtype=x.dtype, requires_grad=True)
        y = nodes.conv(x, layer, None, s, stride=(1, 3), padding=(1, 1), dilation=(1, 1), groups=2)
        (gradient,) = torch.autograd.grad(y, layer, e)
        assert_combined(gradient, rows, s, x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_samples_are_added_up_in_float32(dtype):
    """Where oneDNN does not serve, torch rounds the sum to 16 bits after every sample."""
    shape = (4, 3, 3, 3)
    x, e = (t.abs() / 16 for t in conv_case((512, 3, 6, 6), shape, {"padding": 1}, dtype))
    s = torch.ones(len(x))
    combined = fk.combine_conv(x, e, s, shape, padding=1, bias=True)
    assert_combined(combined, oracles.conv_rows(x, e, shape, True, padding=1), s, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_strided_convolutions_of_one_tap(memory_format, dtype):
    """Also of one sample, whose contributions are formed by an ordinary convolution."""
    for n, shape, geometry in ((5, (4, 2, 1, 1), {"stride": (2, 3)}), (1, (3, 1, 1, 1), {"stride": 2})):
        x, e = conv_case((n, shape[1], 8, 9), shape, geometry, dtype)
        x, e = (t.contiguous(memory_format=memory_format) for t in (x, e))
        s, rows = coefficients(n, dtype), oracles.conv_rows(x, e, shape, True, **geometry)
        assert_combined(fk.combine_conv(x, e, s, shape, bias=True, **geometry), rows, s, dtype)
        k = fk.gram_conv(x, e, shape, bias=True, **geometry)
        assert oracles.relative_error(k, rows @ rows.T) < TOLERANCE[dtype]


def test_no_gradients_are_recorded():
    a, e = (t.requires_grad_() for t in linear_case(4, 20, 5, 3))
    s = torch.ones(4, requires_grad=True)
    assert not fk.combine(a, e, s).requires_grad
    assert not fk.combine_rows(a, s).requires_grad


def test_empty_batch_is_zero():
    none = torch.ones(0)
    weight, bias = fk.combine(torch.ones(0, 4, 3), torch.ones(0, 4, 2), none, bias=True)
    assert torch.equal(weight, torch.zeros(2, 3))
    assert torch.equal(bias, torch.zeros(2))
    weight, bias = fk.combine_conv(torch.ones(0, 3, 4), torch.ones(0, 2, 2), none, (2, 3, 3), bias=True)
    assert torch.equal(weight, torch.zeros(2, 3, 3))
    assert torch.equal(bias, torch.zeros(2))
    ids = torch.ones(0, 3).long()
    assert torch.equal(fk.combine_embedding(ids, torch.ones(0, 3, 2), none, 4), torch.zeros(4, 2))
    assert torch.equal(fk.combine_rows(torch.ones(0, 3), none), torch.zeros(3))


def test_reference_is_the_definition():
    s = coefficients(5, torch.float64)
    a, e = linear_case(5, 4, 6, 3, torch.float64)
    assert_reference(fk.reference.combine(a, e, s, bias=True), oracles.linear_rows(a, e, True), s)
    ids = torch.randint(5, (5, 4))
    combined = fk.reference.combine_embedding(ids, e, s, 6, padding_idx=2)
    assert_reference(combined, oracles.embedding_rows(ids, e, 6, 2), s)
    assert_reference(fk.reference.combine_rows(a, s), a.flatten(1), s)
    for x_shape, weight_shape, geometry in CONV:
        x, e = conv_case(x_shape, weight_shape, geometry, torch.float64)
        s = coefficients(len(x), torch.float64)
        combined = fk.reference.combine_conv(x, e, s, weight_shape, **geometry, bias=True)
        assert_reference(combined, oracles.conv_rows(x, e, weight_shape, True, **geometry), s)


def assert_reference(actual, expected_rows, s):
    parts = actual if isinstance(actual, tuple) else (actual,)
    flat = torch.cat([part.flatten() for part in parts])
    assert oracles.relative_error(flat, s @ expected_rows) < 1e-12


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a, e, s: fk.combine(a, e, s[:2]), ValueError, r"s: expected shape \(3,\), got \(2,\)"),
        (lambda a, e, s: fk.combine(a, e, s.long()), TypeError, "s: expected float32"),
        (lambda a, e, s: fk.combine(a, e, s.to("meta")), ValueError, "s: expected the device of a"),
        (lambda a, e, s: fk.combine(a, e[:2], s), ValueError, "e: expected shape"),
        (lambda a, e, s: fk.combine_rows(a, s[:1]), ValueError, "s: expected shape"),
        (lambda a, e, s: fk.combine_rows(s.sum(), s), ValueError, "g: expected shape"),
        (lambda a, e, s: fk.combine_embedding(s, e, s, 4), TypeError, "ids: expected int64"),
        (lambda a, e, s: fk.combine_embedding(s.long(), e, s[:2], 4), ValueError, "s: expected shape"),
        (lambda a, e, s: fk.combine_embedding(s.long(), e, s, 0), ValueError, "num_embeddings: .* got 0"),
        (lambda a, e, s: fk.combine_conv(a, e, s, (5, 4, 3)), ValueError, "x: expected shape"),
        (
            lambda a, e, s: fk.combine_conv(a[..., None], e[..., None], s[:2], (5, 4, 1)),
            ValueError,
            r"s: expected shape \(3,\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3, 4), torch.ones(3, 5), torch.ones(3))
