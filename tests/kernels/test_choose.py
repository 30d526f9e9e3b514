"""Which implementation of an operator runs: what is named is what runs, and fngd_kernels.plan tells it."""

from dataclasses import replace
from math import prod

import pytest
import torch
from torch.nn import functional as F

import fngd_kernels as fk
from fngd_kernels import native
from fngd_kernels.ops import choose, coefficients, combine, gram, gram_conv, scale_bias, solve
from fngd_kernels.ops.coefficients import coefficients as find_coefficients
from fngd_kernels.workspace import WORKSPACE


def record(monkeypatch, table):
    """Return a list of the names in the table whose functions run from now on."""
    names = []

    def recording(name, function):
        def run(*arguments):
            names.append(name)
            return function(*arguments)

        return run

    for name, function in table.items():
        monkeypatch.setitem(table, name, recording(name, function))
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, None, 5, 3), (9, 1, 5, 3), (9, 2, 200, 100), (9, 40, 5, 3)], ids=str)
def test_the_plan_of_a_linear_layer_says_what_runs_on_a_cpu(shape, dtype, monkeypatch):
    n, t, inputs, outputs = shape
    positions = () if t is None else (t,)
    a, e = torch.randn(n, *positions, inputs).to(dtype), torch.randn(n, *positions, outputs).to(dtype)
    ran = record(monkeypatch, gram.IMPLEMENTATIONS)
    fk.gram(a, e)
    plan = fk.plan(a.shape, e.shape, itemsize=a.itemsize)
    assert ran == [(plan.backend, plan.algorithm)] == [("torch", plan.algorithm)]


@pytest.mark.parametrize(
    ("x_shape", "weight_shape"),
    [((9, 60, 3, 3), (80, 60, 3, 3)), ((9, 3, 12, 12), (4, 3, 3, 3)), ((9, 3, 4, 4), (4, 3, 1, 1))],
)
def test_the_plan_of_a_convolution_says_what_runs_on_a_cpu(x_shape, weight_shape, monkeypatch):
    padding = weight_shape[2] // 2
    x = torch.randn(x_shape)
    e = torch.randn_like(F.conv2d(x, torch.zeros(weight_shape), padding=padding))
    linear, ran = record(monkeypatch, gram.IMPLEMENTATIONS), record(monkeypatch, gram_conv.IMPLEMENTATIONS)
    fk.gram_conv(x, e, weight_shape, padding=padding)
    plan = fk.plan(x.shape, e.shape, weight_shape=weight_shape, padding=padding)
    assert (plan.backend, plan.unfolded) == ("torch", False)
    assert (linear, ran) == ([], [("torch", plan.algorithm)])


def test_a_pointwise_convolution_on_a_gpu_is_planned_as_the_linear_layer_that_runs():
    x, e, weight = (16, 512, 2, 2), (16, 512, 2, 2), (512, 512, 1, 1)
    plan = fk.plan(x, e, weight_shape=weight, itemsize=2, capability=(9, 0))
    assert plan.unfolded
    linear = fk.plan((16, 4, 512), (16, 4, 512), itemsize=2, capability=(9, 0))
    assert plan == replace(linear, unfolded=True)
    assert (plan.backend, plan.algorithm) == ("triton", "pairs")


@pytest.mark.parametrize(
    ("x", "weight", "options", "unfolded"),
    [
        # Stages 4 and 3 of ResNet-18, batch 128: 4 x 4 and 8 x 8 positions.
        ((128, 512, 4, 4), (512, 512, 3, 3), {"padding": 1}, True),
        ((128, 256, 8, 8), (512, 256, 3, 3), {"padding": 1, "stride": 2}, True),
        ((128, 256, 8, 8), (256, 256, 3, 3), {"padding": 1}, False),
        ((16, 512, 2, 2), (512, 512, 1, 1), {"padding": 1}, True),
        ((16, 512, 2, 2), (512, 256, 1, 1), {"groups": 2}, False),
        # Patches of 75 MB.
        ((512, 512, 4, 4), (512, 512, 3, 3), {"padding": 1}, False),
    ],
)
def test_convolutions_of_few_positions_on_a_gpu_take_pairs_on_patches(x, weight, options, unfolded):
    space = F.conv2d(torch.empty(x, device="meta"), torch.empty(weight, device="meta"), **options).shape[2:]
    e = (x[0], weight[0], *space)
    plan = fk.plan(x, e, weight_shape=weight, itemsize=2, capability=(9, 0), **options)
    assert (plan.backend, plan.algorithm) == ("triton", "pairs" if unfolded else "explicit")
    assert plan.unfolded == unfolded
    if unfolded:
        positions, columns = prod(space), prod(weight[1:])
        assert plan.macs == x[0] * (x[0] + 1) // 2 * positions**2 * (columns + weight[0])
        assert 2 * x[0] * positions * columns < plan.workspace <= WORKSPACE


@pytest.mark.parametrize("weight_shape", [None, (6, 4, 1, 1)])
def test_float64_takes_the_products_of_torch_on_a_gpu_too(weight_shape):
    shapes = ((3, 4, 5, 5), (3, 6, 5, 5)) if weight_shape else ((3, 25, 4), (3, 25, 6))
    plan = fk.plan(*shapes, weight_shape=weight_shape, itemsize=8, capability=(9, 0))
    assert plan == fk.plan(*shapes, weight_shape=weight_shape, itemsize=8)
    assert plan.backend == "torch"


@pytest.mark.parametrize(
    ("order", "device", "has_native", "name"),
    [
        (2048, "cpu", True, "native"),
        (2049, "cpu", True, "torch"),
        (1024, "cuda", True, "native"),
        (1025, "cuda", True, "torch"),
        (5, "cpu", False, "torch"),
        (5, "xpu", True, "torch"),
    ],
)
def test_solves(order, device, has_native, name):
    assert choose.solve(order, device, has_native) == name


@pytest.mark.parametrize("has_native", [False, True])
def test_the_operators_run_what_is_named(has_native, monkeypatch):
    if has_native and not native.AVAILABLE:
        pytest.skip("the native extension is not built")
    monkeypatch.setattr(native, "serves", lambda tensor: has_native)
    ran = [record(monkeypatch, module.IMPLEMENTATIONS) for module in (solve, coefficients, scale_bias)]
    k = torch.eye(3)[None]
    fk.solve(k, 1.0)
    find_coefficients(k, 0.1)
    scale_bias.scale_bias(k, k[:, 0, 0], 1, True, True)
    assert ran == [["native" if has_native else "torch"]] * 3


@pytest.mark.skipif(not native.AVAILABLE, reason="the native extension is not built")
def test_the_operator_itself_leaves_large_orders_to_torch(monkeypatch):
    monkeypatch.setattr(choose, "NATIVE_MAX_ORDER", {"cpu": 4})
    ran = record(monkeypatch, solve.IMPLEMENTATIONS)
    for n in (4, 5):
        torch.ops.fngd.solve(torch.eye(n), torch.tensor(1.0), None)
    assert ran == ["native", "torch"]


def test_pairs_of_positions_are_named_for_diagonals_where_they_cost_less():
    assert choose.gram_diag((8, 100), (8, 100), True) == "triton"
    assert choose.gram_diag((8, 50, 100), (8, 50, 100), True) == "torch"
    assert choose.gram_diag((8, 100), (8, 100), False) == "torch"


def test_weighted_gradients_on_a_gpu_are_products_of_torch_after_one_pass(monkeypatch):
    assert [choose.combine(triton) for triton in (True, False)] == ["one pass", "torch"]
    ran = record(monkeypatch, combine.IMPLEMENTATIONS)
    fk.combine(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2))
    assert ran == ["torch"]
