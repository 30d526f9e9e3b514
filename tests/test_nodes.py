"""Autograd nodes, native and Python: weighted parameter gradients, any order of differentiation, compile,
autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from fngd_kernels import native
from fngd_kernels.ops import nodes

CONVOLUTIONS = {
    "1d": ((3, 4, 9), (6, 2, 3), {"stride": [2], "padding": [1], "dilation": [2], "groups": 2}),
    "2d": (
        (2, 4, 5, 3),
        (2, 2, 3, 2),
        {"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2], "groups": 2},
    ),
    "3d": (
        (2, 2, 3, 2, 3),
        (2, 2, 2, 1, 2),
        {"stride": [1] * 3, "padding": [0, 1, 1], "dilation": [1] * 3, "groups": 1},
    ),
}


@pytest.fixture(params=["native", "python"])
def implementation(request, monkeypatch):
    if request.param == "native" and not native.AVAILABLE:
        pytest.skip("the native extension is not built")
    monkeypatch.setattr(native, "AVAILABLE", request.param == "native")
    return request.param


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def linear_case():
    return nodes.linear, {}, double(4, 5, 3), double(2, 3), double(2)


def conv_case(dimensions):
    x, weight, geometry = CONVOLUTIONS[dimensions]
    return nodes.conv, geometry, double(*x), double(*weight), double(weight[0])


CASES = {"linear": linear_case, **{f"conv{d}": lambda d=d: conv_case(d) for d in CONVOLUTIONS}}


def torch_function(node, geometry):
    """What torch computes for the same arguments."""
    if node is nodes.linear:
        return F.linear
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(geometry["stride"])]
    return lambda x, w, b: convolve(x, w, b, **geometry)


@pytest.mark.parametrize("case", CASES)
def test_parameter_gradients_are_weighted_and_the_input_gradient_is_not(case, implementation):
    node, geometry, x, weight, bias = CASES[case]()
    function = torch_function(node, geometry)
    scale = torch.randn(len(x), dtype=torch.float64)
    y = node(x, weight, bias, scale, **geometry)
    gradient = torch.randn_like(y)
    torch.testing.assert_close(y, function(x, weight, bias))

    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), gradient)

    expected_dx = torch.autograd.grad(function(x, weight, bias), x, gradient)[0]
    rows = [
        torch.autograd.grad(function(x[n : n + 1], weight, bias), (weight, bias), gradient[n : n + 1])
        for n in range(len(x))
    ]
    torch.testing.assert_close(dx, expected_dx)
    torch.testing.assert_close(dw, sum(s * row[0] for s, row in zip(scale, rows, strict=True)))
    torch.testing.assert_close(db, sum(s * row[1] for s, row in zip(scale, rows, strict=True)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wide", [False, True])
def test_both_ways_of_weighting_agree_in_single_precision(case, wide, implementation):
    """Either operand may carry the weights: the smaller one does."""
    node, geometry, x, weight, _ = CASES[case]()
    if wide:
        weight = weight.repeat(8, *[1] * (weight.ndim - 1))
    bias = torch.zeros(len(weight))
    x, weight = x.detach().float(), weight.detach().float().requires_grad_()
    scale = torch.rand(len(x))
    y = node(x, weight, bias, scale, **geometry)
    gradient = torch.randn_like(y)
    dw = torch.autograd.grad(y, weight, gradient)[0]
    y = torch_function(node, geometry)(x, weight, bias)
    expected = torch.autograd.grad(y, weight, gradient * scale.view(-1, *[1] * (y.ndim - 1)))[0]
    torch.testing.assert_close(dw, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_nodes_are_differentiable_twice(case, implementation):
    node, geometry, x, weight, bias = CASES[case]()
    ones = torch.ones(len(x), dtype=torch.float64)  # with unit weights the node is torch's function
    assert gradcheck(lambda *args: node(*args, ones, **geometry), (x, weight, bias))
    assert gradgradcheck(lambda *args: node(*args, ones, **geometry), (x, weight, bias))


@pytest.mark.parametrize("case", CASES)
def test_uses_inside_derivatives_are_weighted_too(case, implementation):
    """The gradient of a loss on dX: sample n's part of it carries s_n, also where the weight is used in
    backward."""
    node, geometry, x, weight, bias = CASES[case]()
    function = torch_function(node, geometry)
    scale = torch.randn(len(x), dtype=torch.float64)

    def loss(apply, x):
        dx = torch.autograd.grad(apply(x).sin().sum(), x, create_graph=True)[0]
        return dx.square().flatten(1).sum(1)

    x.requires_grad_()
    weighted = torch.autograd.grad(loss(lambda x: node(x, weight, bias, scale, **geometry), x).sum(), weight)[
        0
    ]
    rows = [
        torch.autograd.grad(loss(lambda x: function(x, weight, bias), x[n : n + 1]).sum(), weight)[0]
        for n in range(len(x))
    ]
    torch.testing.assert_close(weighted, sum(s * row for s, row in zip(scale, rows, strict=True)))


@pytest.mark.parametrize("case", CASES)
def test_sink_receives_the_factors_of_every_use(case, implementation):
    node, geometry, x, weight, bias = CASES[case]()
    received = []

    def sink(a, e, biased, selective):
        received.append((a, e))
        return torch.full_like(weight, 2.0), torch.full_like(bias, 3.0)

    y = node(x, weight, bias, sink=sink, **geometry)
    gradient = torch.randn_like(y)
    y.backward(gradient)

    torch.testing.assert_close(received[0][0], x)
    torch.testing.assert_close(received[0][1], gradient)
    assert len(received) == 1
    assert (weight.grad == 2).all()
    assert (bias.grad == 3).all()
    expected = torch.autograd.grad(torch_function(node, geometry)(x, weight, bias), x, gradient)[0]
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("case", CASES)
def test_sink_learns_where_the_bias_takes_part(case, implementation):
    node, geometry, x, weight, bias = CASES[case]()
    received = []

    def sink(a, e, biased, selective):
        received.append(biased)
        return torch.zeros_like(weight), torch.zeros_like(bias) if biased else None

    y = node(x, weight, bias, sink=sink, **geometry).tanh()
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    received.clear()
    dx.square().sum().backward()
    assert sorted(received) == [False, True]  # the derivative's own use, and the map that it goes through


@pytest.mark.skipif(not native.AVAILABLE, reason="Python cannot tell which gradients are asked for")
@pytest.mark.parametrize("case", CASES)
def test_native_sink_is_called_only_for_weight_gradients(case):
    node, geometry, x, weight, bias = CASES[case]()
    calls = []
    y = node(x, weight, bias, sink=lambda a, e, biased, selective: calls.append(selective), **geometry).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    assert calls == []
    torch.autograd.grad(y, weight, retain_graph=True, allow_unused=True)
    y.backward()
    assert calls == [True, False]


def test_embedding_and_rows(implementation):
    weight, scale = double(7, 3), torch.randn(4, dtype=torch.float64)
    ids = torch.tensor([[0, 2, 2], [1, 6, 0], [3, 3, 3], [5, 2, 1]])
    gradient = torch.randn(4, 3, 3, dtype=torch.float64)
    dw = torch.autograd.grad(nodes.embedding(ids, weight, scale, padding_idx=2), weight, gradient)[0]
    y = F.embedding(ids, weight, padding_idx=2)
    torch.testing.assert_close(dw, torch.autograd.grad(y, weight, gradient * scale[:, None, None])[0])

    parameter = double(2, 3)
    rows = nodes.rows(parameter, 4, scale)
    assert rows.shape == (4, 2, 3)
    dp = torch.autograd.grad(rows, parameter, gradient[:, :2])[0]
    torch.testing.assert_close(dp, torch.einsum("n,nij->ij", scale, gradient[:, :2]))


@pytest.mark.parametrize("case", CASES)
def test_compiled_without_graph_breaks(case):
    node, geometry, x, weight, bias = CASES[case]()
    scale = torch.rand(len(x), dtype=torch.float64)
    arguments = (x, weight, bias, scale)
    eager = torch.autograd.grad(node(*arguments, **geometry).relu().sum(), arguments[:3])
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: node(*args, **geometry).relu().sum(), fullgraph=True)
    for actual, expected in zip(torch.autograd.grad(compiled(*arguments), arguments[:3]), eager, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(not native.AVAILABLE, reason="torch ops of the native nodes")
@pytest.mark.parametrize("case", CASES)
def test_operators_are_registered_correctly(case):
    node, geometry, x, weight, bias = CASES[case]()
    scale = torch.rand(len(x), dtype=torch.float64)
    if node is nodes.linear:
        torch.library.opcheck(torch.ops.fngd.linear.default, (x, weight, bias, scale))
    else:
        torch.library.opcheck(torch.ops.fngd.conv.default, (x, weight, bias, scale, *geometry.values()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("captured", [False, True])
def test_autocast_casts_as_torch_does(case, captured, implementation):
    node, geometry, x, weight, bias = CASES[case]()
    x, weight, bias = (t.detach().float().requires_grad_() for t in (x, weight, bias))
    received = []
    extra = {"sink": lambda a, e, *_: received.append((a, e))} if captured else {"scale": torch.ones(len(x))}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = node(x, weight, bias, **extra, **geometry)
        expected = torch_function(node, geometry)(x, weight, bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(expected.float().square().sum(), (x, weight, bias))
    dx, dw, db = torch.autograd.grad(y.float().square().sum(), (x, weight, bias), allow_unused=True)
    assert dx.dtype == torch.float32
    torch.testing.assert_close(dx, gradients[0])
    if captured:
        assert [t.dtype for t in received[0]] == [torch.bfloat16] * 2
    else:
        torch.testing.assert_close(dw, gradients[1])
        torch.testing.assert_close(db, gradients[2])
