import pytest
import torch
from poison import poisoned
from torch.nn import functional as F

import fngd_kernels as fk
import oracles
from fngd_kernels.backends.torch.gram_conv_explicit import gram_conv_explicit as library_gram_conv_explicit
from fngd_kernels.backends.triton.gram_explicit import gram_conv_explicit
from geometries import conv_geometry

# On top of twice the library's error: rounding of sums, and of both factors in C C^T to 10 or 8 bits.
TOLERANCE = {"ieee": 1e-6, "tf32x3": 1e-6, "tf32": 2**-10, None: 2**-7}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONV = {
    "1d": ((3, 4, 11), (6, 4, 3), {}),
    "1d strided in groups": (
        (5, 4, 12),
        (6, 2, 4),
        {"stride": 3, "padding": 2, "dilation": 2, "groups": 2},
    ),
    "2d": ((3, 3, 7, 6), (5, 3, 3, 3), {"padding": 1}),
    "2d one of all": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "2d in groups": ((4, 4, 5, 7), (6, 2, 3, 2), {"stride": (2, 1), "padding": (1, 0), "groups": 2}),
    "2d depthwise": (
        (3, 6, 8, 9),
        (6, 1, 3, 3),
        {"stride": 2, "padding": 2, "dilation": (1, 2), "groups": 6},
    ),
    "2d more padding than image": ((2, 3, 2, 2), (4, 3, 1, 1), {"stride": 2, "padding": 3}),
    "2d many channels": ((3, 40, 5, 1), (17, 40, 3, 1), {"padding": (1, 0)}),
    "2d many channels in groups": ((2, 140, 3, 4), (6, 70, 1, 2), {"groups": 2, "stride": 2}),
    "3d": ((3, 4, 4, 5, 3), (6, 2, 3, 2, 1), {"stride": (1, 2, 1), "padding": (1, 1, 0), "groups": 2}),
    "3d columns that fill no tile": ((2, 23, 5, 2, 2), (3, 23, 3, 1, 1), {}),
    "3d many channels": ((2, 33, 2, 3, 3), (3, 33, 2, 1, 2), {"padding": (1, 0, 1)}),
}


def conv_case(x_shape, weight_shape, geometry, dtype, device):
    x = torch.randn(x_shape)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(weight_shape) - 3]
    e = torch.randn_like(convolution(x, torch.zeros(weight_shape), **geometry))
    return x.to(device, dtype), e.to(device, dtype)


def assert_as_good_as_the_library(x, e, weight_shape, geometry, bias, precision=None, **options):
    rows = oracles.conv_rows(x, e, weight_shape, bias, **geometry)
    truth = rows @ rows.T
    whole = conv_geometry(weight_shape, **geometry)
    with poisoned():
        k = gram_conv_explicit(x, e, whole, bias, precision, **options)
    plan = fk.plan(x.shape, e.shape, weight_shape=weight_shape, **geometry, bias=bias)
    library = library_gram_conv_explicit(x, e, whole, bias, plan)
    assert k.dtype == torch.float32
    assert torch.equal(k, k.T)
    tolerance = TOLERANCE["ieee" if x.dtype == torch.float32 and precision is None else precision]
    assert oracles.relative_error(k, truth) <= 2 * oracles.relative_error(library, truth) + tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONV)
def test_gram(case, dtype, device):
    x_shape, weight_shape, geometry = CONV[case]
    x, e = conv_case(x_shape, weight_shape, geometry, dtype, device)
    assert_as_good_as_the_library(x, e, weight_shape, geometry, True)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precision_without_bias(precision, device):
    x_shape, weight_shape, geometry = CONV["2d in groups"]
    x, e = conv_case(x_shape, weight_shape, geometry, torch.float32, device)
    assert_as_good_as_the_library(x, e, weight_shape, geometry, False, precision)


@pytest.mark.parametrize("case", ["2d in groups", "2d many channels"])
def test_small_workspaces_change_nothing(case, device):
    x_shape, weight_shape, geometry = CONV[case]
    x, e = conv_case(x_shape, weight_shape, geometry, torch.float32, device)
    assert_as_good_as_the_library(x, e, weight_shape, geometry, True, workspace=10_000)


@pytest.mark.parametrize("channels", [3, 33])
def test_any_strides(channels, device):
    shape, geometry = (5, channels, 2, 2), {"padding": 1}
    x, e = conv_case((2, channels, 3, 4), shape, geometry, torch.float32, device)
    last = torch.channels_last
    for x_view, e_view in (
        (x.to(memory_format=last), e.to(memory_format=last)),
        (F.pad(x, (1, 2))[..., 1:-2], e.mT.contiguous().mT),
        (x[:1].expand_as(x), F.pad(e, (0, 1, 1, 0))[..., 1:, :-1]),
        (x, e[:, :1, :1, :1].expand_as(e)),
    ):
        assert_as_good_as_the_library(x_view, e_view, shape, geometry, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="6 GiB that a CPU would have to write")
def test_offsets_beyond_32_bits(device):
    shape = (4, 3, 1, 1)
    x, e = conv_case((2, 3, 5, 5), shape, {}, torch.bfloat16, device)
    storage = torch.empty((2 << 30) + 50, dtype=x.dtype, device=device)
    far = storage.as_strided(x.shape, (25, 1 << 30, 5, 1)).copy_(x)
    assert_as_good_as_the_library(far, e, shape, {}, False)
