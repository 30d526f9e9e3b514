import pytest
import torch
from torch.nn import functional as F

from fngd_kernels.backends.torch.patches import channels_last, patches
from geometries import conv_geometry


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "geometry"),
    [
        ((3, 2), {"padding": (1, 0)}),
        ((2, 3), {"stride": (2, 1), "dilation": (3, 2), "padding": (2, 1)}),
        ((1, 1), {"stride": 2}),
        ((1, 1), {}),
    ],
)
def test_patches_are_those_of_unfold(kernel, geometry, memory_format):
    x = torch.randn(3, 5, 7, 6).contiguous(memory_format=memory_format)
    found = patches(x, conv_geometry((4, 5, *kernel), **geometry))
    expected = F.unfold(x, kernel, **geometry).unflatten(1, (5, -1)).transpose(1, 2).flatten(1, 2).mT
    assert torch.equal(found, expected)


def test_patches_in_one_and_three_dimensions():
    x = torch.arange(10.0).view(1, 2, 5)
    found = patches(x, conv_geometry((1, 2, 2), stride=2, padding=1))
    assert found.tolist() == [[[0, 0, 0, 5], [1, 6, 2, 7], [3, 8, 4, 9]]]
    x = torch.randn(2, 3, 2, 3, 4)
    found = patches(x, conv_geometry((1, 3, 2, 3, 4)))
    assert torch.equal(found, x.movedim(1, -1).flatten(1).unsqueeze(1))


def test_channels_last_copies_only_what_is_not():
    x = torch.randn(2, 3, 4, 5)
    last = channels_last(x)
    assert torch.equal(last, x)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert channels_last(last).data_ptr() == last.data_ptr()
