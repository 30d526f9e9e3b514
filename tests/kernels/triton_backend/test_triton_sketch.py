"""The kernel against dense sign matrices, and that operators take it."""

import pytest
import torch
from poison import poisoned

import fngd_kernels as fk
import oracles
from fngd_kernels.backends.triton import common
from fngd_kernels.backends.triton.sketch import sketch
from fngd_kernels.ops import devices, triton
from fngd_kernels.ops import sketch as operator
from fngd_kernels.sketch import OUTPUTS

SEED = 3
KEY = fk.Sketch(1, SEED).key(OUTPUTS)
# Sums in float32 of at most 40 numbers, then one rounding.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_compressed(x, groups, size, *, innermost=True):
    matrix = oracles.sketch_matrix(x.shape[2], size, SEED, OUTPUTS, groups)
    parts = x.cpu().double().unflatten(2, (groups, -1))
    expected = torch.einsum("npgc,gcr->npgr", parts, matrix).flatten(2)
    shape = [*x.shape[:2], groups * size]
    with poisoned():
        y = x.new_empty(shape) if innermost else x.new_empty(shape).mT.contiguous().mT
    sketch(x, groups, size, KEY, y)
    assert oracles.relative_error(y.cpu(), expected) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups", "size"),
    [((1, 1, 5), 1, 4), ((3, 5, 64), 1, 16), ((2, 130, 63), 1, 10), ((3, 4, 30), 3, 2), ((5, 1, 129), 1, 40)],
    ids=str,
)
def test_sketch(shape, groups, size, innermost, dtype, device):
    assert_compressed(torch.randn(shape, device=device).to(dtype), groups, size, innermost=innermost)


def test_any_strides(device):
    assert_compressed(torch.randn(3, 20, 7, device=device).mT, 1, 6)
    assert_compressed(torch.randn(6, 9, 44, device=device)[::2, 1:, ::3], 1, 4)
    assert_compressed(torch.randn(7, 1, 33, device=device).expand(7, 5, 33), 1, 4)
    assert_compressed(torch.randn(20, 3, 7, device=device).permute(2, 1, 0), 5, 3)


def test_the_operators_take_it(device, monkeypatch):
    launched = []

    def spy(x, *arguments):
        launched.append(x.shape)
        triton.triton_sketch(x, *arguments)

    monkeypatch.setitem(operator.IMPLEMENTATIONS, "triton", spy)
    if common.INTERPRET:
        monkeypatch.setattr(devices, "runs_triton", lambda device: True)
    a, e = torch.randn(4, 3, 20, device=device), torch.randn(4, 3, 17, device=device)
    x, y = torch.randn(3, 18, 5, 4, device=device), torch.randn(3, 20, 4, 3, device=device)
    found = [
        fk.gram(a, e, bias=True, sketch=2),
        fk.gram_conv(x, y, (20, 9, 2, 2), groups=2, sketch=2, precision="ieee"),
        fk.gram_rows(a, sketch=2),
    ]
    assert launched == [(4, 3, 20), (4, 3, 17), (3, 20, 18), (3, 12, 20), (4, 1, 60)]
    # Equal to those of wider numbers, which another implementation compresses.
    a, e, x, y = (t.double() for t in (a, e, x, y))
    expected = [
        fk.gram(a, e, bias=True, sketch=2),
        fk.gram_conv(x, y, (20, 9, 2, 2), groups=2, sketch=2, precision="ieee"),
        fk.gram_rows(a, sketch=2),
    ]
    for k, truth in zip(found, expected, strict=True):
        assert oracles.relative_error(k, truth) < 1e-5
