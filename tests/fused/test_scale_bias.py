import pytest
import torch
from poison import poisoned

import oracles
from fngd_kernels.fused.scale_bias import scale_bias

# Largest relative deviation of one rounding to the dtype.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_scaled(e, s):
    with poisoned():
        scaled, bias = scale_bias(e, s, True)
        without_bias, none = scale_bias(e, s, False)
    exact = e.double() * s.double().view(-1, *[1] * (e.ndim - 1))
    assert scaled.dtype == bias.dtype == e.dtype
    torch.testing.assert_close(scaled.double(), exact, rtol=ROUNDING[e.dtype] * (1 + 2**-10), atol=0)
    sums = exact.transpose(0, 1).flatten(1).sum(1)
    # Its terms are not rounded to the dtype, their sum is.
    assert oracles.relative_error(bias, sums) <= ROUNDING[e.dtype] + 1e-6
    assert torch.equal(scaled, without_bias)
    assert none is None
    return scaled


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 17, 5, 7), (5, 3, 33, 33), (20, 130, 1, 3), (2, 600, 3, 3)]
)
def test_both_memory_formats(shape, last, dtype, device):
    layout = torch.channels_last if last else torch.contiguous_format
    # Away from zero: half precision would otherwise round to a fixed step, not to a relative one.
    e = torch.randn(shape).sign() * (1 + torch.rand(shape))
    e = e.to(device, dtype).to(memory_format=layout)
    scaled = assert_scaled(e, 1 + torch.rand(shape[0], device=device))
    assert scaled.stride() == e.stride()


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 9), (3, 5, 3, 4, 5)])
def test_any_number_of_axes(shape, device):
    assert_scaled(torch.randn(shape, device=device), torch.randn(shape[0], device=device))


def test_any_strides(device):
    e, s = torch.randn(6, 10, 9, 8, 7, device=device), torch.randn(12, device=device)[::2]
    # As behind zero padding, a crop, a broadcast mean, a transposition.
    assert_scaled(e[:, 1:-1, 2:, :-1, 1:], s)
    assert_scaled(e[:, ::2, :, ::3, ::2], s)
    assert_scaled(e[:, :, :1, :1, :1].expand_as(e), s)
    assert_scaled(e.permute(0, 2, 4, 1, 3), s)


def test_more_samples_than_programs(device):
    assert_scaled(torch.randn(70, 3, 2, 2, device=device), torch.randn(70, device=device))


def test_no_samples_give_zeros(device):
    scaled, bias = scale_bias(torch.zeros(0, 3, 4, 4, device=device), torch.zeros(0, device=device), True)
    assert scaled.shape == (0, 3, 4, 4)
    assert bias.tolist() == [0, 0, 0]


def test_same_bits_every_time(device):
    e, s = torch.randn(5, 3, 40, 40, device=device), torch.randn(5, device=device)
    assert torch.equal(scale_bias(e, s, True)[1], scale_bias(e, s, True)[1])
