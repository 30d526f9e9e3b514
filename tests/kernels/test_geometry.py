"""The one value that describes a convolution, from the public functions to the algorithms."""

import pytest
import torch

import fngd_kernels as fk
from fngd_kernels import checks
from fngd_kernels.geometry import ConvGeometry
from fngd_kernels.ops import gram_conv
from fngd_kernels.ops.registration import with_geometry

GEOMETRY = ConvGeometry((6, 2, 3, 1), (2, 1), (1, 0), (1, 2), 2)


def test_it_comes_back_from_the_arguments_of_a_schema():
    weight_shape, stride, padding, dilation, groups = GEOMETRY
    lists = list(weight_shape), list(stride), list(padding), list(dilation), groups
    assert ConvGeometry.from_schema(*lists) == GEOMETRY
    assert hash(ConvGeometry.from_schema(*lists)) == hash(GEOMETRY)
    assert GEOMETRY.kernel == (3, 1)


@pytest.mark.parametrize("place", [0, 2])
def test_an_operator_receives_it_whole(place):
    taken = with_geometry(place)(lambda *arguments: arguments)
    before, after = ("x", "e")[:place], (True, None)
    assert taken(*before, *GEOMETRY, *after) == (*before, GEOMETRY, *after)


def test_the_algorithms_receive_what_the_public_function_checked(monkeypatch):
    received = []
    for name in gram_conv.IMPLEMENTATIONS:
        monkeypatch.setitem(
            gram_conv.IMPLEMENTATIONS, name, lambda x, e, geometry, *_: received.append(geometry) or x.sum()
        )
    x, e = torch.ones(2, 4, 5, 4), torch.ones(2, 6, 3, 4)
    options = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
    fk.gram_conv(x, e, [6, 2, 3, 1], **options)
    assert received == [GEOMETRY]
    assert checks.check_conv(x, e, [6, 2, 3, 1], *options.values()) == GEOMETRY


@pytest.mark.parametrize(
    ("geometry", "pointwise"),
    [
        (ConvGeometry((6, 2, 1, 1), (1, 1), (0, 0), (3, 1), 1), True),
        (ConvGeometry((6, 2, 1), (1,), (0,), (1,), 1), True),
        (ConvGeometry((6, 2, 1, 2), (1, 1), (0, 0), (1, 1), 1), False),
        (ConvGeometry((6, 2, 1, 1), (1, 2), (0, 0), (1, 1), 1), False),
        (ConvGeometry((6, 2, 1, 1), (1, 1), (0, 1), (1, 1), 1), False),
        (ConvGeometry((6, 2, 1, 1), (1, 1), (0, 0), (1, 1), 2), False),
    ],
)
def test_which_convolutions_are_linear_layers_on_pixels(geometry, pointwise):
    assert geometry.is_pointwise == pointwise
