import dataclasses
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fngd_kernels import plan
from fngd_kernels.geometry import output_size, pixel_grids

SIZES = st.integers(1, 40)


def conv_plan(x_shape, weight_shape, stride=1, padding=0, groups=1, **options):
    space = [
        output_size(s, k, stride, padding, 1) for s, k in zip(x_shape[2:], weight_shape[2:], strict=True)
    ]
    e_shape = (x_shape[0], weight_shape[0], *space)
    return plan(
        x_shape, e_shape, weight_shape=weight_shape, stride=stride, padding=padding, groups=groups, **options
    )


@pytest.mark.parametrize(
    ("a_shape", "e_shape", "algorithm"),
    [
        # One position per sample.
        ((64, 128), (64, 10), "hadamard"),
        ((64, 1, 128), (64, 1, 10), "hadamard"),
        # Sequences: the weight is small beside the pairs of positions ...
        ((64, 32, 128), (64, 32, 512), "explicit"),
        ((64, 32, 128), (64, 32, 1000), "explicit"),
        ((16, 1024, 768), (16, 1024, 768), "explicit"),
        # ... and large where a few positions meet a wide layer.
        ((64, 2, 512), (64, 2, 512), "pairs"),
        ((64, 4, 1024), (64, 4, 1024), "pairs"),
    ],
)
def test_linear_algorithm(a_shape, e_shape, algorithm):
    assert plan(a_shape, e_shape).algorithm == algorithm


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "stride", "algorithm"),
    [
        ((64, 3, 32, 32), (16, 3, 3, 3), 1, "explicit"),
        ((64, 16, 32, 32), (16, 16, 3, 3), 1, "explicit"),
        ((64, 64, 8, 8), (64, 64, 3, 3), 1, "explicit"),
        ((64, 64, 8, 8), (128, 64, 3, 3), 2, "pairs"),
        ((64, 128, 4, 4), (128, 128, 3, 3), 1, "pairs"),
        ((64, 512, 4, 4), (512, 512, 3, 3), 1, "pairs"),
    ],
)
def test_conv_algorithm(x_shape, weight_shape, stride, algorithm):
    assert conv_plan(x_shape, weight_shape, stride, padding=1).algorithm == algorithm


def test_small_layers_on_a_gpu_save_launches_and_large_ones_multiply_adds():
    def algorithm(*size):
        n, t, channels = size
        return plan((n, t, channels), (n, t, channels), itemsize=2, capability=(9, 0)).algorithm

    # 3 times the multiply-adds in one launch instead of three; as many more where a launch is little.
    assert [algorithm(16, 32, 64), algorithm(128, 30, 64), algorithm(128, 64, 512)] == [
        "pairs",
        "pairs",
        "explicit",
    ]


def test_macs_by_hand():
    assert plan((10, 7), (10, 3)).macs == 10 * 10 * (7 + 3)
    # 2 samples of 3 positions in one block: every pair of positions, both factors.
    pairs = plan((2, 3, 500), (2, 3, 400))
    assert (pairs.algorithm, pairs.sample_chunk, pairs.macs) == ("pairs", 2, 6 * 6 * (500 + 400))
    # C_n, then the upper block triangle of 64 samples in two blocks.
    explicit = plan((64, 50, 8), (64, 50, 6))
    assert (explicit.algorithm, explicit.macs) == ("explicit", 64 * 50 * 8 * 6 + 64 * 64 * 8 * 6 * 3 // 4)
    assert plan((64, 50, 8), (64, 50, 6), bias=True).macs == explicit.macs + 64 * 64 * 6 * 3 // 4
    # 4x4 pixels, 3x3 outputs: every pair of pixels and every pair of outputs of 2 samples.
    pairs = conv_plan((2, 300, 4, 4), (200, 300, 2, 2))
    assert (pairs.algorithm, pairs.macs) == ("pairs", 2 * 2 * (16 * 16 * 300 + 9 * 9 * 200))


def test_half_precision_needs_room_for_casts():
    assert plan((8, 64, 32), (8, 64, 16), itemsize=2).workspace > plan((8, 64, 32), (8, 64, 16)).workspace
    assert plan((8, 5), (8, 5), itemsize=8).workspace == 2 * plan((8, 5), (8, 5)).workspace


def test_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan((2, 3), (2, 3)).macs = 0


@settings(max_examples=200, deadline=None)
@given(n=SIZES, t=st.integers(2, 40), inputs=SIZES, outputs=SIZES, workspace=st.integers(0, 1 << 20))
def test_linear_workspace_is_kept(n, t, inputs, outputs, workspace):
    for itemsize in (2, 4, 8):
        chosen = plan((n, t, inputs), (n, t, outputs), itemsize=itemsize, workspace=workspace)
        assert_valid(chosen, n, 1, outputs, inputs, workspace)


@settings(max_examples=200, deadline=None)
@given(
    n=SIZES,
    channels=st.integers(1, 9),
    outputs=st.integers(1, 9),
    groups=st.integers(1, 4),
    size=st.integers(1, 12),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    workspace=st.integers(0, 1 << 20),
)
def test_conv_workspace_is_kept(n, channels, outputs, groups, size, kernel, stride, padding, workspace):
    if output_size(size, kernel, stride, padding, 1) < 1:
        return
    shape = (outputs * groups, channels, kernel, kernel)
    x_shape = (n, channels * groups, size, size)
    chosen = conv_plan(x_shape, shape, stride, padding, groups, workspace=workspace)
    assert_valid(chosen, n, groups, outputs, channels, workspace)


def assert_valid(chosen, n, groups, outputs, inputs, workspace):
    chunks = chosen.sample_chunk, chosen.group_chunk, chosen.out_chunk, chosen.in_chunk
    for chunk, size in zip(chunks, (n, groups, outputs, inputs), strict=True):
        assert 1 <= chunk <= size
    smallest = chosen.algorithm == "explicit" and chunks[1:] == (1, 1, 1)
    assert chosen.workspace <= workspace or smallest
    assert chosen.macs > 0
    assert chosen.bytes_moved > 0


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(1, 9),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    padding=st.integers(0, 4),
    dilation=st.integers(1, 3),
)
def test_pixel_grids_hold_every_read_once(size, kernel, stride, padding, dilation):
    outputs = output_size(size, kernel, stride, padding, dilation)
    if outputs < 1:
        return
    reads = []
    for pixels, count, taps in pixel_grids(size, kernel, stride, padding, dilation):
        real = range(size)[pixels]
        assert len(real) == count
        for tap in taps:
            at, read = range(outputs)[tap.outputs], real[tap.pixels]
            assert len(at) == len(read)
            reads += zip(at, read, strict=True)
    expected = [
        (p, stride * p + dilation * k - padding)
        for p, k in product(range(outputs), range(kernel))
        if 0 <= stride * p + dilation * k - padding < size
    ]
    assert sorted(reads) == sorted(expected)
