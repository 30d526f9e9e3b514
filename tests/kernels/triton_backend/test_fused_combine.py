import pytest
import torch
from poison import poisoned

import oracles
from fngd_kernels.backends.torch.combine import weighted_gradients
from fngd_kernels.backends.triton import combine as fused

# On top of twice the library's error: one rounding of the result.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}
SHAPES = [(1, 1, 1, 1), (3, 1, 17, 33), (17, 3, 33, 17), (20, 1, 130, 5), (5, 33, 7, 129)]
# Rows that start at multiples of 16 bytes.
ALIGNED = [(3, 33, 16, 136), (17, 1, 136, 8)]


def linear_case(n, t, inputs, outputs, dtype, device):
    a, e = torch.randn(n, t, inputs), torch.randn(n, t, outputs)
    return a.to(device, dtype), e.to(device, dtype), torch.randn(n).to(device)


def assert_as_good_as_the_library(a, e, s, bias):
    with poisoned():
        combined = fused.combine(a, e, s, bias)
    rows = oracles.linear_rows(a, e, bias)
    truth = (s.double() @ rows).split([e.shape[-1] * a.shape[-1], e.shape[-1]][: 1 + bias])
    library = [part for part in weighted_gradients(a, e, s, True, bias) if part is not None]
    assert [part.shape for part in combined] == [part.shape for part in library]
    for part, peer, exact in zip(combined, library, truth, strict=True):
        assert part.dtype == a.dtype
        assert part.is_contiguous()
        allowed = 2 * oracles.relative_error(peer.flatten(), exact) + TOLERANCE[a.dtype]
        assert oracles.relative_error(part.flatten(), exact) <= allowed


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES + ALIGNED)
def test_weighted_gradient(shape, bias, dtype, device):
    assert_as_good_as_the_library(*linear_case(*shape, dtype, device), bias)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("parts", [2, 5])
def test_rows_split_over_programs(parts, dtype, device, monkeypatch):
    monkeypatch.setattr(fused, "parts_of", lambda *_: parts)
    # The last part of five is empty, as a part is a multiple of 16 rows or more.
    assert_as_good_as_the_library(*linear_case(3, 62, 8, 16, dtype, device), True)


def test_any_strides(device):
    a = torch.randn(5, 7, 11, device=device).mT
    e = torch.randn(11, 5, 12, device=device)[..., ::2].transpose(0, 1)
    s = torch.randn(10, device=device)[::2]
    assert_as_good_as_the_library(a, e, s, True)
    assert_as_good_as_the_library(a, e[:, :1].expand_as(e), s, True)


def test_one_position_without_its_axis(device):
    a, e, s = linear_case(9, 1, 4, 6, torch.float32, device)
    assert_as_good_as_the_library(a[:, 0], e[:, 0], s, True)


def test_no_samples_give_zeros(device):
    a, e, s = linear_case(0, 3, 4, 6, torch.float32, device)
    with poisoned():
        weight, bias = fused.combine(a, e, s, True)
    assert not weight.count_nonzero()
    assert not bias.count_nonzero()


def test_same_bits_every_time(device, monkeypatch):
    monkeypatch.setattr(fused, "parts_of", lambda *_: 3)
    case = linear_case(3, 62, 5, 3, torch.float32, device)
    first, second = fused.combine(*case, True), fused.combine(*case, True)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precision(precision, device):
    a, e, s = linear_case(3, 17, 5, 3, torch.float32, device)
    exact = (s.double() @ oracles.linear_rows(a, e, False)).view(3, 5)
    (weight,) = fused.combine(a, e, s, False, precision)
    # tf32 keeps 10 bits of each factor.
    assert oracles.relative_error(weight, exact) <= (2**-10 if precision == "tf32" else 1e-6)


def test_parts_fill_the_device_within_the_workspace():
    # A tile for each processor or more: nothing to split.
    assert fused.parts_of(1000, 132, 132, 64) == 1
    # Too short to be worth a second launch.
    assert fused.parts_of(8, 1, 132, 64) == 1
    # 12 tiles leave 120 of 132 processors idle: one wave of 11 parts.
    assert fused.parts_of(1024, 12, 132, 64) == 11
    assert fused.parts_of(1024, 12, 132, 4) == 4
    assert fused.parts_of(0, 12, 132, 0) == 1


def test_too_many_positions():
    a = torch.empty(1, 1, 1, device="meta").expand(1 << 16, 1 << 15, 1)
    with pytest.raises(ValueError, match="a: expected at most 2\\^30 positions"):
        fused.combine(a, a, torch.empty(1, device="meta").expand(1 << 16), False)
