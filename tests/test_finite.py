"""One test of many tensors for NaN and infinity, native and in plain torch."""

import pytest
import torch

from fngd_kernels.ops.finite import _all_finite, all_finite


@pytest.mark.parametrize("function", [all_finite, _all_finite])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_place_and_every_kind(dtype, function):
    largest = torch.finfo(dtype).max / 1e4
    for size in (1, 5, 4096, 40_000):
        tensors = [torch.full((3,), -largest, dtype=dtype), torch.ones(size, dtype=dtype)]
        assert function(tensors).item() is True
        for place in {0, size // 2, size - 1}:
            for poison in (float("nan"), float("inf"), -float("inf")):
                bad = tensors[1].clone()
                bad[place] = poison
                assert function([tensors[0], bad]).item() is False
                assert function([bad, tensors[0]]).item() is False


def test_layouts():
    x = torch.randn(4, 3, 5, 6)
    x[2, 1, 3, 3] = float("nan")
    views = [x, x.to(memory_format=torch.channels_last), x.transpose(0, 2), x[1:, :2, 2:5:1, ::3], x[..., 3]]
    assert not any(all_finite([view]) for view in views)
    assert all_finite([x[..., 4], x[::2][:1], torch.randn(1, 3).expand(5, 3), torch.zeros(0)])


def test_opcheck_and_no_tensors():
    torch.library.opcheck(torch.ops.fngd.all_finite.default, ([torch.ones(3), torch.ones(2, 2)],))
    with pytest.raises(ValueError, match="tensors: expected one or more"):
        all_finite([])
