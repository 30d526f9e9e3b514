"""Autograd nodes, native and Python: weighted parameter gradients, any order of differentiation, compile,
autocast."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck, gradgradcheck

import oracles
from fngd_kernels import native
from fngd_kernels.backends.torch.convolution import ConvolutionArguments
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
for _, _, geometry in CONVOLUTIONS.values():
    geometry |= {"transposed": False, "output_padding": [0] * len(geometry["stride"])}
CONVOLUTIONS["2d-transposed"] = (
    (2, 4, 3, 2),
    (4, 3, 3, 2),
    {
        "stride": [2, 3],
        "padding": [1, 0],
        "dilation": [1, 2],
        "groups": 2,
        "transposed": True,
        "output_padding": [1, 2],
    },
)


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
    return nodes.conv, geometry, double(*x), double(*weight), double(outputs(weight, geometry))


def outputs(weight, geometry):
    return weight[1] * geometry["groups"] if geometry.get("transposed") else weight[0]


CASES = {"linear": linear_case, **{f"conv{d}": lambda d=d: conv_case(d) for d in CONVOLUTIONS}}


def torch_function(node, geometry):
    """What torch computes for the same arguments."""
    if node is nodes.linear:
        return F.linear
    options = dict(geometry)
    transposed = options.pop("transposed", False)
    if not transposed:
        options.pop("output_padding", None)
    name = f"conv_transpose{len(geometry['stride'])}d" if transposed else f"conv{len(geometry['stride'])}d"
    return lambda x, w, b: getattr(F, name)(x, w, b, **options)


@pytest.mark.parametrize("case", CASES)
def test_parameter_gradients_are_weighted_and_the_input_gradient_is_not(case, implementation):
    node, geometry, x, weight, bias = CASES[case]()
    function = torch_function(node, geometry)
    coefficients = torch.randn(len(x), dtype=torch.float64)
    y = node(x, weight, bias, coefficients, **geometry)
    gradient = torch.randn_like(y)
    torch.testing.assert_close(y, function(x, weight, bias))

    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), gradient)

    expected_dx = torch.autograd.grad(function(x, weight, bias), x, gradient)[0]
    rows = [
        torch.autograd.grad(function(x[n : n + 1], weight, bias), (weight, bias), gradient[n : n + 1])
        for n in range(len(x))
    ]
    torch.testing.assert_close(dx, expected_dx)
    torch.testing.assert_close(dw, sum(s * row[0] for s, row in zip(coefficients, rows, strict=True)))
    torch.testing.assert_close(db, sum(s * row[1] for s, row in zip(coefficients, rows, strict=True)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wide", [False, True])
def test_both_ways_of_weighting_agree_in_single_precision(case, wide, implementation):
    """Either operand may carry the weights: the smaller one does."""
    node, geometry, x, weight, _ = CASES[case]()
    if wide:
        times = (1, 8) if geometry.get("transposed") else (8, 1)
        weight = weight.repeat(*times, *[1] * (weight.ndim - 2))
    bias = torch.zeros(outputs(weight.shape, geometry))
    x, weight = x.detach().float(), weight.detach().float().requires_grad_()
    coefficients = torch.rand(len(x))
    y = node(x, weight, bias, coefficients, **geometry)
    gradient = torch.randn_like(y)
    dw = torch.autograd.grad(y, weight, gradient)[0]
    y = torch_function(node, geometry)(x, weight, bias)
    expected = torch.autograd.grad(y, weight, gradient * coefficients.view(-1, *[1] * (y.ndim - 1)))[0]
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
    coefficients = torch.randn(len(x), dtype=torch.float64)

    def loss(apply, x):
        dx = torch.autograd.grad(apply(x).sin().sum(), x, create_graph=True)[0]
        return dx.square().flatten(1).sum(1)

    x.requires_grad_()
    weighted = torch.autograd.grad(
        loss(lambda x: node(x, weight, bias, coefficients, **geometry), x).sum(), weight
    )[0]
    rows = [
        torch.autograd.grad(loss(lambda x: function(x, weight, bias), x[n : n + 1]).sum(), weight)[0]
        for n in range(len(x))
    ]
    torch.testing.assert_close(weighted, sum(s * row for s, row in zip(coefficients, rows, strict=True)))


@pytest.mark.parametrize("case", CASES)
def test_the_handler_receives_the_factors_of_every_use(case, implementation):
    node, geometry, x, weight, bias = CASES[case]()
    received = []

    def on_use(a, e, biased, must_return):
        received.append((a, e))
        return torch.full_like(weight, 2.0), torch.full_like(bias, 3.0)

    y = node(x, weight, bias, on_use=on_use, **geometry)
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
def test_the_handler_learns_where_the_bias_takes_part_and_what_is_asked_for(case, implementation):
    node, geometry, x, weight, bias = CASES[case]()
    received = []

    def on_use(a, e, biased, must_return):
        received.append((biased, must_return))
        return torch.zeros_like(weight), torch.zeros_like(bias) if biased else None

    y = node(x, weight, bias, on_use=on_use, **geometry).tanh()
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    received.clear()
    dx.square().sum().backward()
    # The derivative's own use, and the map that it goes through.
    assert sorted(received) == [(False, False), (True, False)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("leaf", [True, False])
def test_the_handler_is_called_only_for_parameter_gradients(case, leaf, implementation):
    node, geometry, x, weight, bias = CASES[case]()
    given = (weight, bias) if leaf else (weight * 2, bias * 2)
    calls = []
    y = node(x, *given, on_use=lambda a, e, biased, must_return: calls.append(must_return), **geometry).sum()
    options = {"retain_graph": True, "allow_unused": True}
    torch.autograd.grad(y, x, **options)
    y.backward(inputs=[x], retain_graph=True)
    assert calls == []
    for inputs in (weight, bias, given[0], (x, bias)):
        torch.autograd.grad(y, inputs, **options)
    y.backward(inputs=[weight, x], retain_graph=True)
    assert calls == [True] * 5
    y.backward()
    assert calls == [True] * 5 + [False]


def test_handlers_of_embeddings_and_rows_are_called_only_for_parameter_gradients(implementation):
    weight, shift, calls = double(7, 3), double(4, 3), []
    on_use = lambda a, e, biased, must_return: calls.append(must_return)  # noqa: E731
    y = (
        nodes.embedding(torch.arange(4), weight, on_use=on_use)
        + nodes.rows(weight[0], 4, on_use=on_use)
        + shift
    )
    torch.autograd.grad(y.sum(), shift, retain_graph=True)
    assert calls == []
    torch.autograd.grad(y.sum(), weight, retain_graph=True, allow_unused=True)
    y.sum().backward()
    assert calls == [True, True, False, False]


ORDERS = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "rows, channels, columns": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("transposed", "further"), [(False, 0), (True, 0), (True, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_convolutions_of_one_tap(order, transposed, further, dtype, implementation):
    """Their weight gradient is that of an unstrided one on the pixels that are read."""
    geometry = ConvolutionArguments([2, 3], [0, 0], [1, 1], transposed, [further] * 2, 1)._asdict()
    x, weight = torch.randn(3, 2, 7, 8), torch.randn(*((2, 4) if transposed else (4, 2)), 1, 1)
    x, weight = ORDERS[order](x.to(dtype)), ORDERS[order](weight.to(dtype)).requires_grad_()
    y = nodes.conv(x, weight, None, torch.ones(3), **geometry)
    e = ORDERS[order](torch.randn(y.shape).to(dtype))
    (dw,) = torch.autograd.grad(y, weight, e)
    exact = weight.detach().double().requires_grad_()
    y = torch_function(nodes.conv, geometry)(x.double(), exact, None)
    (truth,) = torch.autograd.grad(y, exact, e.double())
    assert oracles.relative_error(dw, truth) < (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_convolutions_with_a_weight_in_any_order(order, dtype, implementation):
    """Where oneDNN misreads the weight: forward, and gradient at the input."""
    geometry = {"stride": [2, 2], "padding": [1, 1], "dilation": [2, 2], "groups": 2}
    x, weight = torch.randn(8, 16, 4, 4).to(dtype), ORDERS[order](torch.randn(20, 8, 2, 1).to(dtype))
    x = ORDERS["channels last"](x).requires_grad_()
    y = nodes.conv(x, weight, None, torch.ones(8), **geometry)
    e = torch.randn(y.shape).to(dtype)
    (dx,) = torch.autograd.grad(y, x, e)
    exact = x.detach().double().requires_grad_()
    truth = F.conv2d(exact, weight.double(), None, *geometry.values())
    bound = 1e-6 if dtype == torch.float32 else 2**-7
    assert oracles.relative_error(y, truth) < bound
    assert oracles.relative_error(dx, torch.autograd.grad(truth, exact, e.double())[0]) < bound


def test_embedding_and_rows(implementation):
    weight, coefficients = double(7, 3), torch.randn(4, dtype=torch.float64)
    ids = torch.tensor([[0, 2, 2], [1, 6, 0], [3, 3, 3], [5, 2, 1]])
    gradient = torch.randn(4, 3, 3, dtype=torch.float64)
    dw = torch.autograd.grad(nodes.embedding(ids, weight, coefficients, padding_idx=2), weight, gradient)[0]
    y = F.embedding(ids, weight, padding_idx=2)
    torch.testing.assert_close(dw, torch.autograd.grad(y, weight, gradient * coefficients[:, None, None])[0])

    parameter = double(2, 3)
    rows = nodes.rows(parameter, 4, coefficients)
    assert rows.shape == (4, 2, 3)
    dp = torch.autograd.grad(rows, parameter, gradient[:, :2])[0]
    torch.testing.assert_close(dp, torch.einsum("n,nij->ij", coefficients, gradient[:, :2]))


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 7), (7, 3)])
def test_an_empty_batch_has_gradients_of_zero(inputs, outputs, implementation):
    leaves = double(0, inputs), double(outputs, inputs), double(outputs)
    nodes.linear(*leaves, torch.empty(0)).sum().backward()
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("coefficients", [torch.ones(1), torch.ones(0), torch.ones(4, 1), torch.ones(())])
def test_coefficients_of_other_samples_are_refused(coefficients, implementation):
    calls = [
        lambda: nodes.linear(double(4, 3), double(2, 3), None, coefficients),
        lambda: nodes.conv(
            double(4, 2, 5), double(3, 2, 2), None, coefficients, **CONVOLUTIONS["1d"][2] | {"groups": 1}
        ),
        lambda: nodes.embedding(torch.arange(4), double(7, 3), coefficients),
        lambda: nodes.rows(double(3), 4, coefficients),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^coefficients: expected shape \(4,\), got"):
            call()


@pytest.mark.parametrize("case", CASES)
def test_compiled_without_graph_breaks(case):
    node, geometry, x, weight, bias = CASES[case]()
    coefficients = torch.rand(len(x), dtype=torch.float64)
    arguments = (x, weight, bias, coefficients)
    eager = torch.autograd.grad(node(*arguments, **geometry).relu().sum(), arguments[:3])
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: node(*args, **geometry).relu().sum(), fullgraph=True)
    for actual, expected in zip(torch.autograd.grad(compiled(*arguments), arguments[:3]), eager, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(not native.AVAILABLE, reason="torch ops of the native nodes")
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_backward_is_made_of_torch_operations(case):
    """So that the compiler fuses the scaling into its neighbours."""
    node, geometry, x, weight, bias = CASES[case]()
    called = set()

    def keep(graph, _):
        called.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    coefficients = torch.rand(len(x), dtype=torch.float64)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=keep)
    compiled = torch.compile(lambda *args: node(*args, **geometry).sum(), backend=backend, fullgraph=True)
    compiled(x, weight, bias, coefficients).backward()
    assert "aten.mul.Tensor" in called
    assert not [name for name in called if name.startswith("fngd")]


@pytest.mark.skipif(not native.AVAILABLE, reason="torch ops of the native nodes")
@pytest.mark.parametrize("case", CASES)
def test_operators_are_registered_correctly(case):
    node, geometry, x, weight, bias = CASES[case]()
    coefficients = torch.rand(len(x), dtype=torch.float64)
    if node is nodes.linear:
        torch.library.opcheck(torch.ops.fngd.linear.default, (x, weight, bias, coefficients))
    else:
        torch.library.opcheck(
            torch.ops.fngd.conv.default, (x, weight, bias, coefficients, *ConvolutionArguments(**geometry))
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("captured", [False, True])
def test_autocast_casts_as_torch_does(case, captured, implementation):
    node, geometry, x, weight, bias = CASES[case]()
    x, weight, bias = (t.detach().float().requires_grad_() for t in (x, weight, bias))
    received = []
    extra = (
        {"on_use": lambda a, e, *_: received.append((a, e))}
        if captured
        else {"coefficients": torch.ones(len(x))}
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = node(x, weight, bias, **extra, **geometry)
        expected = torch_function(node, geometry)(x, weight, bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    e = 2 * y.detach()
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), e, allow_unused=True)
    assert dx.dtype == torch.float32
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x, e)[0])
    if captured:
        assert [t.dtype for t in received[0]] == [torch.bfloat16] * 2
        return
    # Rounded once, as torch's own are not where oneDNN does not serve bfloat16.
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (x, weight, bias)]
    exact = torch.autograd.grad(torch_function(node, geometry)(*rounded), rounded[1:], e.double())
    sizes = [t.detach().abs().requires_grad_() for t in rounded]
    sums = torch.autograd.grad(torch_function(node, geometry)(*sizes), sizes[1:], e.double().abs())
    for actual, truth, size in zip((dw, db), exact, sums, strict=True):
        assert ((actual - truth).abs() <= 2**-8 * truth.abs() + 2**-20 * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_many_samples_are_added_up_in_float32(case, dtype, implementation):
    node, geometry, x, weight, bias = CASES[case]()
    x = torch.rand(512, *x.shape[1:], dtype=dtype)
    weight, bias = (t.detach().to(dtype).requires_grad_() for t in (weight, bias))
    coefficients = torch.ones(len(x))
    y = node(x, weight, bias, coefficients, **geometry)
    e = torch.rand(y.shape).to(dtype) / 256
    dw, db = torch.autograd.grad(y, (weight, bias), e)
    exact = [t.detach().double().requires_grad_() for t in (weight, bias)]
    truth = torch.autograd.grad(torch_function(node, geometry)(x.double(), *exact), exact, e.double())
    for actual, expected in zip((dw, db), truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_uses_of_a_word_are_added_up_in_float32(dtype, implementation):
    weight, ids = torch.zeros(3, 4, dtype=dtype, requires_grad=True), torch.arange(1024).view(-1, 2) % 3
    e = (torch.rand(512, 2, 4) / 64).to(dtype)
    (dw,) = torch.autograd.grad(nodes.embedding(ids, weight, torch.ones(512)), weight, e)
    truth = torch.zeros(3, 4, dtype=torch.float64).index_add_(0, ids.flatten(), e.flatten(0, 1).double())
    torch.testing.assert_close(dw.double(), truth, rtol=torch.finfo(dtype).eps, atol=0)


# Whichever operand is smaller is scaled: wide and narrow outputs.
GPU_CASES = {
    **{f"linear {i} to {o}": (nodes.linear, {}, (9, 5, i), (o, i)) for i, o in ((24, 8), (8, 40), (7, 3))},
    "linear without positions": (nodes.linear, {}, (129, 16), (8, 16)),
    **{f"conv{d}": (nodes.conv, geometry, x, w) for d, (x, w, geometry) in CONVOLUTIONS.items()},
    "wide conv": (
        nodes.conv,
        {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1},
        (5, 3, 8, 8),
        (16, 3, 3, 3),
    ),
}


def on_gpu(case, dtype, last):
    """A node's call, its leaves, its output's gradient, the weights, and what the leaves' gradients are."""
    node, geometry, x_shape, weight_shape = GPU_CASES[case]
    x, weight = torch.randn(x_shape).to(dtype), torch.randn(weight_shape).to(dtype)
    bias = torch.randn(outputs(weight_shape, geometry)).to(dtype)
    coefficients = torch.rand(x_shape[0]) + 0.5
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = torch_function(node, geometry)(*exact)
    gradient = torch.randn(y.shape).to(dtype)
    (dx,) = torch.autograd.grad(y, exact[0], gradient.double(), retain_graph=True)
    weighted = gradient.double() * coefficients.double().view(-1, *[1] * (y.ndim - 1))
    expected = [dx, *torch.autograd.grad(y, exact[1:], weighted)]
    x, weight, bias, gradient = (t.cuda() for t in (x, weight, bias, gradient))
    if last:
        x, gradient = (t.to(memory_format=torch.channels_last) for t in (x, gradient))
    leaves, coefficients = [t.requires_grad_() for t in (x, weight, bias)], coefficients.cuda()
    return (lambda: node(*leaves, coefficients, **geometry)), leaves, gradient, coefficients, expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.parametrize("wanted", [(0, 1, 2), (1,), (2,)])
def test_cuda_gradients_equal_float64(case, last, dtype, wanted):
    if last and len(GPU_CASES[case][2]) != 4:
        pytest.skip("channels last has four dimensions")
    call, leaves, gradient, _, expected = on_gpu(case, dtype, last)
    with torch.backends.cudnn.flags(allow_tf32=False):
        actual = torch.autograd.grad(call(), [leaves[i] for i in wanted], gradient)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    for i, result in zip(wanted, actual, strict=True):
        assert result.dtype == dtype
        assert oracles.relative_error(result.cpu(), expected[i]) < bound


@pytest.mark.gpu
def test_cuda_embedding_and_rows():
    weight, coefficients = torch.randn(7, 16), torch.rand(4)
    ids, gradient = torch.randint(7, (4, 3)), torch.randn(4, 3, 16)
    exact = weight.double().requires_grad_()
    (expected,) = torch.autograd.grad(
        F.embedding(ids, exact), exact, (gradient * coefficients[:, None, None]).double()
    )
    leaf = weight.cuda().requires_grad_()
    y = nodes.embedding(ids.cuda(), leaf, coefficients.cuda())
    (dw,) = torch.autograd.grad(y, leaf, gradient.cuda())
    assert oracles.relative_error(dw.cpu(), expected) < 1e-5
    parameter = torch.randn(3, 16, device="cuda").requires_grad_()
    (dp,) = torch.autograd.grad(nodes.rows(parameter, 4, coefficients.cuda()), parameter, gradient.cuda())
    assert oracles.relative_error(dp.cpu(), torch.einsum("n,nij->ij", coefficients, gradient)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["linear 8 to 40", "wide conv"])
def test_cuda_gradients_can_be_differentiated(case):
    call, (x, weight, bias), gradient, coefficients, _ = on_gpu(case, torch.float64, False)
    function = torch_function(*GPU_CASES[case][:2])
    (dw,) = torch.autograd.grad(call(), weight, gradient, create_graph=True)
    (actual,) = torch.autograd.grad(dw.square().sum(), x)
    weighted = gradient * coefficients.double().view(-1, *[1] * (gradient.ndim - 1))
    (dw,) = torch.autograd.grad(function(x, weight, bias), weight, weighted, create_graph=True)
    (expected,) = torch.autograd.grad(dw.square().sum(), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
def test_captured_in_a_cuda_graph(case):
    call, leaves, gradient, coefficients, _ = on_gpu(case, torch.float64, False)

    def step():
        return torch.autograd.grad(call(), leaves, gradient)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    coefficients.copy_(2 * torch.rand(len(coefficients)))  # read from its static buffer
    graph.replay()
    for actual, direct in zip(captured, step(), strict=True):
        torch.testing.assert_close(actual, direct)
