"""One test of many tensors for NaN and infinity, native and in plain torch."""

import pytest
import torch

from fngd_kernels.ops.finite import _found_non_finite, found_non_finite

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
POISONS = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("function", [found_non_finite, _found_non_finite])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_place_and_every_kind(dtype, function):
    largest = torch.finfo(dtype).max
    for size in (1, 5, 63, 4096, 40_000):
        tensors = [torch.full((3,), -largest, dtype=dtype), torch.full((size,), largest, dtype=dtype)]
        found = function(tensors)
        assert (found.tolist(), found.dtype) == ([0.0], torch.float32)
        for place in {0, size // 2, size - 1}:
            for poison in POISONS:
                bad = tensors[1].clone()
                bad[place] = poison
                assert function([tensors[0], bad]).tolist() == [1.0]
                assert function([bad, tensors[0]]).tolist() == [1.0]


@pytest.mark.parametrize("function", [found_non_finite, _found_non_finite])
def test_layouts_dtypes_and_empty_tensors(function):
    x = torch.randn(4, 3, 5, 6)
    x[2, 1, 3, 3] = float("nan")
    views = [x, x.to(memory_format=torch.channels_last), x.transpose(0, 2), x[1:, :2, 2:5:1, ::3], x[..., 3]]
    assert all(function([view]).item() == 1 for view in views)
    sound = [x[..., 4], x[::2][:1], torch.randn(1, 3).expand(5, 3), torch.zeros(0)]
    assert function(sound).item() == 0
    mixed = [torch.ones(3, dtype=dtype) for dtype in DTYPES]
    assert function([*sound, *mixed]).item() == 0
    assert function([*sound, *mixed, views[-1]]).item() == 1
    assert function([torch.zeros(0)]).tolist() == [0.0]


def test_opcheck_and_bad_arguments():
    torch.library.opcheck(torch.ops.fngd.found_non_finite.default, ([torch.ones(3), torch.ones(2, 2)],))
    with pytest.raises(ValueError, match="tensors: expected one or more"):
        found_non_finite([])
    for function in (found_non_finite, _found_non_finite):
        with pytest.raises(TypeError, match=r"tensors: expected float64, .*got"):
            function([torch.ones(3), torch.ones(3, dtype=torch.int64)])


@pytest.mark.gpu
def test_on_a_device_as_on_the_host():
    for dtype in DTYPES:
        for size in (1, 5, 129, 40_000):
            for start in (0, 1, 3):
                for place in (None, 0, size // 2, size - 1):
                    x = torch.full((start + size,), torch.finfo(dtype).max, dtype=dtype, device="cuda")[
                        start:
                    ]
                    if place is not None:
                        x[place] = float("nan")
                    found = found_non_finite([torch.ones(3, device="cuda"), x])
                    assert found.device.type == "cuda"
                    assert found.item() == (place is not None), (dtype, size, start, place)


@pytest.mark.gpu
def test_many_tensors_strides_and_devices():
    tensors = [torch.randn(n % 7, 5, device="cuda").to(DTYPES[n % 4]) for n in range(300)]
    assert found_non_finite(tensors).item() == 0
    assert found_non_finite([torch.ones(2), *tensors]).device.type == "cpu"
    bad = torch.randn(4, 6, 5, device="cuda")
    bad[2, 3, 1] = float("inf")
    for view in (bad, bad.transpose(0, 2), bad[1:, 2:5, 1::2], bad[2:3, 3:4, 1:2].expand(4, 6, 5)):
        assert found_non_finite([*tensors, view]).item() == 1
        assert found_non_finite([torch.ones(2), *tensors, view]).item() == 1


@pytest.mark.gpu
def test_captured_in_a_graph():
    x = torch.ones(1000, device="cuda")
    found_non_finite([x])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = found_non_finite([x])
    for value, expected in ((2.0, 0), (float("nan"), 1), (3.0, 0)):
        x[7] = value
        graph.replay()
        assert found.item() == expected
