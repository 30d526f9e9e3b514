"""Samples scaled by their weights and the weighted sum: the definition, and the kernel on a GPU."""

import pytest
import torch

import oracles
from fngd_kernels.ops.scale_bias import scale_bias

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Largest relative deviation of one rounding to the dtype.
ROUNDING = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_scaled(e, s, channel):
    scaled, bias = scale_bias(e, s, channel, True, True)
    exact = e.double() * s.double().view(-1, *[1] * (e.ndim - 1))
    assert scaled.dtype == bias.dtype == e.dtype
    torch.testing.assert_close(scaled.double(), exact, rtol=ROUNDING[e.dtype] * (1 + 2**-10), atol=0)
    sums = exact.sum([axis for axis in range(e.ndim) if axis != channel])
    # Its terms are not rounded to the dtype, their sum is.
    assert bias.shape == (e.shape[channel],)
    assert oracles.relative_error(bias, sums) <= ROUNDING[e.dtype] + (1e-14 if bias.itemsize == 8 else 1e-6)
    alone, none = scale_bias(e, s, channel, True, False)
    assert torch.equal(scaled, alone)
    assert none is None
    none, alone = scale_bias(e, s, channel, False, True)
    assert none is None
    assert torch.equal(bias, alone)
    return scaled


def away_from_zero(shape, device, dtype):
    # Half precision would otherwise round to a fixed step, not to a relative one.
    return (torch.randn(shape).sign() * (1 + torch.rand(shape))).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 17, 5, 7), (5, 3, 33, 33), (20, 130, 1, 3), (129, 64, 4, 4), (2, 600, 3, 3)]
)
def test_both_memory_formats(shape, layout, dtype, device):
    e = away_from_zero(shape, device, dtype).to(memory_format=layout)
    scaled = assert_scaled(e, 1 + torch.rand(shape[0], device=device), 1)
    assert scaled.stride() == e.stride()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(1, 1), (63, 10), (129, 512), (5, 63, 129), (4, 256, 64), (3, 5, 7, 16)])
def test_channels_last_of_all_dimensions(shape, dtype, device):
    assert_scaled(
        away_from_zero(shape, device, dtype), 1 + torch.rand(shape[0], device=device), len(shape) - 1
    )


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides(device):
    e, s = torch.randn(6, 10, 9, 8, 7, device=device), torch.randn(12, device=device)[::2]
    # As behind zero padding, a crop, a broadcast mean, transpositions; then a start that is not aligned.
    for view in (
        e[:, 1:-1, 2:, :-1, 1:],
        e[:, ::2, :, ::3, ::2],
        e[:, :, :1, :1, :1].expand_as(e),
        e.permute(0, 2, 4, 1, 3),
        e.flatten(2).transpose(0, 1)[:6].transpose(1, 2),
        e.flatten()[1:385].view(6, 8, 8),
    ):
        for channel in (1, view.ndim - 1):
            assert_scaled(view, s, channel)


@pytest.mark.parametrize("device", DEVICES)
def test_no_samples_give_zeros(device):
    none = torch.zeros(0, 3, 4, 4, device=device)
    scaled, bias = scale_bias(none, torch.zeros(0, device=device), 1, True, True)
    assert scaled.shape == (0, 3, 4, 4)
    assert bias.tolist() == [0, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    e, s = torch.randn(3, 4, 5, device=device), torch.rand(3, device=device)
    for arguments in ((1, True, True), (2, True, False), (2, False, True)):
        torch.library.opcheck(torch.ops.fngd.scale_bias.default, (e, s, *arguments))


@pytest.mark.gpu
def test_same_bits_every_time():
    e, s = torch.randn(64, 300, 40, 40, device="cuda"), torch.randn(64, device="cuda")
    first = scale_bias(e, s, 1, False, True)[1]
    assert all(torch.equal(scale_bias(e, s, 1, False, True)[1], first) for _ in range(5))


@pytest.mark.parametrize("device", DEVICES)
def test_arguments_that_do_not_fit(device):
    e, s = torch.randn(3, 4, device=device), torch.rand(3, device=device)
    for arguments, match in (((e, s[:2], 1), "s: expected shape"), ((e, s, 2), "channel: expected 1 to 1")):
        with pytest.raises(ValueError, match=match):
            scale_bias(*arguments, True, True)
