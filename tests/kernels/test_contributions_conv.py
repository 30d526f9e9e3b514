"""Per-sample contributions of convolutions against autograd, sample by sample, in float64."""

import pytest
import torch
from test_gram import CONV, conv_case

import oracles
from fngd_kernels.ops.contributions_conv import contributions_conv


@pytest.mark.parametrize(("x_shape", "weight_shape", "geometry"), CONV)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_geometry(x_shape, weight_shape, geometry, dtype):
    x, e = conv_case(x_shape, weight_shape, geometry, dtype)
    found = contributions_conv(x, e, weight_shape, **geometry)
    expected = oracles.conv_rows(x, e, weight_shape, False, **geometry)
    assert found.shape == (len(x), *weight_shape)
    assert found.dtype == dtype
    assert oracles.relative_error(found.flatten(1), expected) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_arguments_that_do_not_fit():
    x, e = torch.ones(2, 3, 5, 5), torch.ones(2, 4, 3, 3)
    with pytest.raises(ValueError, match="e: expected shape"):
        contributions_conv(x, e, (4, 3, 3, 3), stride=2)
    with pytest.raises(TypeError, match="e: expected"):
        contributions_conv(x, e.double(), (4, 3, 3, 3))
