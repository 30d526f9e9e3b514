"""The damped solve, judged by residuals and errors in float64, on the native and the library route."""

import math

import pytest
import torch
from torch import Tensor

import fngd_kernels as fk
from fngd_kernels import native
from fngd_kernels.ops import choose

ORDERS = (1, 2, 3, 31, 64, 65, 129, 256, 513, 1024)
EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
DTYPES = (torch.float32, torch.float64)


def gram(*shape: int, rank: int | None = None, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return random Gram matrices (..., N, N) of unit mean eigenvalue."""
    generator = torch.Generator().manual_seed(seed)
    *_, n = shape
    features = torch.randn(*shape, rank or 2 * n, dtype=torch.float64, generator=generator)
    k = features @ features.mT
    return (k / k.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]).to(dtype)


def backward_error(k: Tensor, damping: Tensor, x: Tensor, rhs: Tensor) -> float:
    """Return the largest |rhs - (K + damping I) x| / (|K + damping I| |x|), in float64 and infinity norms."""
    k, damping, x, rhs = (t.double() for t in (k, damping, x, rhs))
    shifted = k + damping[..., None, None] * torch.eye(k.shape[-1], dtype=torch.float64)
    residual = (rhs - (shifted @ x[..., None])[..., 0]).abs().amax(-1)
    return (residual / (shifted.abs().sum(-1).amax(-1) * x.abs().amax(-1))).max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", ORDERS)
def test_residual_is_that_of_a_stable_solve(route, n, dtype):
    k = gram(2, n, dtype=dtype)
    damping = torch.tensor([0.0, 0.1], dtype=dtype)
    rhs = torch.randn(2, n, dtype=dtype, generator=torch.Generator().manual_seed(1))
    x, info = fk.solve(k, damping, rhs, return_info=True)
    assert info.tolist() == [0, 0]
    assert backward_error(k, damping, x, rhs) <= 4 * EPS[dtype]


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_batch_shapes_and_default_right_hand_side(route, batch):
    k = gram(*batch, 17, dtype=torch.float64)
    x, info = fk.solve(k, 0.1, return_info=True)
    assert x.shape == (*batch, 17)
    assert info.shape == batch
    assert info.dtype == torch.int32
    torch.testing.assert_close(x, fk.reference.solve(k, 0.1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fk.solve(k, 0.1, torch.ones_like(x)), x, rtol=0, atol=0)


def test_one_damping_for_each_matrix(route):
    k = gram(3, 20, dtype=torch.float64)
    damping = torch.tensor([0.0, 0.5, 10.0], dtype=torch.float64)
    x = fk.solve(k, damping)
    for i in range(3):
        expected = torch.linalg.solve(
            k[i] + damping[i] * torch.eye(20, dtype=k.dtype), torch.ones(20, dtype=k.dtype)
        )
        torch.testing.assert_close(x[i], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", ["column major", "every second", "expanded", "permuted batch", "offset"])
def test_strides(route, layout):
    wide = gram(2, 3, 66, dtype=torch.float64)
    k = {
        "column major": wide.mT,
        "every second": wide[..., ::2, ::2],
        "expanded": wide[0, 0].expand(4, 66, 66),
        "permuted batch": wide.transpose(0, 1),
        "offset": wide[:, 1, 3:, 3:],
    }[layout]
    before = k.clone()
    damping = torch.full((2, *k.shape[:-2]), 0.1, dtype=k.dtype)[0]
    rhs = torch.randn(k.shape[-1], *k.shape[:-2], dtype=k.dtype).movedim(0, -1)
    x = fk.solve(k, damping, rhs)
    assert backward_error(k, damping, x, rhs) <= 4 * EPS[k.dtype]
    assert torch.equal(k, before)


@pytest.mark.parametrize("n", [5, 40])
def test_upper_triangle_has_no_influence(route, n):
    k = gram(2, n, dtype=torch.float32)
    poisoned = k.tril() + torch.full_like(k, math.nan).triu(1)
    assert torch.equal(fk.solve(poisoned, 0.1), fk.solve(k, 0.1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_duplicate_samples_are_solved_with_damping(route, dtype):
    k = gram(3, 48, rank=8, dtype=dtype).repeat_interleave(2, -1).repeat_interleave(2, -2)
    damping = torch.full((3,), 0.1, dtype=dtype)
    x, info = fk.solve(k, damping, return_info=True)
    assert info.tolist() == [0, 0, 0]
    assert backward_error(k, damping, x, torch.ones_like(x)) <= 4 * EPS[dtype]
    torch.testing.assert_close(x[:, ::2], x[:, 1::2], rtol=1e3 * EPS[dtype], atol=1e3 * EPS[dtype])


@pytest.mark.parametrize(
    ("row", "column", "value", "minor"),
    [
        (0, 0, math.nan, 1),
        (40, 3, math.nan, 41),
        (69, 69, math.inf, 70),
        (40, 3, math.inf, 41),
        (64, 64, -math.inf, 65),
        (20, 20, -5.0, 21),
        (0, 0, -5.0, 1),
        (50, 1, 1e30, 51),
        (69, 0, math.nan, 70),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_failed_matrix_is_reported_and_leaves_its_neighbours_alone(route, dtype, row, column, value, minor):
    k = gram(3, 70, dtype=dtype)
    clean = fk.solve(k, 0.1)
    k[1, row, column] = value
    x, info = fk.solve(k, 0.1, return_info=True)
    assert info.tolist() == [0, minor, 0]
    assert x[1].isnan().all()
    assert torch.equal(x[0], clean[0])
    assert torch.equal(x[2], clean[2])


@pytest.mark.parametrize("damping", [math.nan, math.inf, -3.0])
def test_a_bad_damping_tensor_fails_its_own_matrix(route, damping):
    k = gram(2, 9, dtype=torch.float64)
    x, info = fk.solve(k, torch.tensor([0.1, damping], dtype=k.dtype), return_info=True)
    assert info.tolist() == [0, 1]
    assert x[0].isfinite().all()
    assert x[1].isnan().all()


def test_singular_matrix_without_damping(route):
    x, info = fk.solve(torch.zeros(2, 3, 3), 0.0, return_info=True)
    assert info.tolist() == [1, 1]
    assert x.isnan().all()


@pytest.mark.parametrize("shape", [(0, 0), (4, 0, 0), (0, 7, 7), (2, 0, 3, 3)])
def test_empty(route, shape):
    x, info = fk.solve(torch.empty(shape), 0.1, return_info=True)
    assert x.shape == shape[:-1]
    assert info.shape == shape[:-2]
    assert not info.any()


@pytest.mark.parametrize("n", [32, 64, 128, 256])
@pytest.mark.parametrize("damping", [0.1, 1e-6], ids="{} tr(K)/N".format)
def test_float32_error_of_the_coefficients(route, n, damping):
    k = gram(4, n, rank=n // 2, dtype=torch.float32)
    exact = fk.reference.solve(k.double(), damping)
    error = (fk.solve(k, damping) - exact).abs().amax(-1) / exact.abs().amax(-1)
    condition = torch.linalg.cond(k.double() + damping * torch.eye(n), p=math.inf)
    assert (error <= 4 * EPS[torch.float32] * condition).all()
    if damping == 0.1:
        assert error.max() <= 6e-6


def test_two_threads_give_the_same_bits(route):
    k = gram(7, 65, dtype=torch.float32)
    k[3, 5, 5] = -1
    results = []
    before = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(fk.solve(k, 0.1, return_info=True))
    torch.set_num_threads(before)
    (x, info), (x_two, info_two) = results
    assert torch.equal(info, info_two)
    assert torch.equal(x.nan_to_num(), x_two.nan_to_num())
    assert info.tolist() == [0, 0, 0, 6, 0, 0, 0]


def test_no_gradient_is_recorded(route):
    assert not fk.solve(gram(4, dtype=torch.float32).requires_grad_(), 0.1).requires_grad


def test_large_orders_go_to_the_library():
    n = choose.NATIVE_MAX_ORDER["cpu"] + 1
    k = torch.diag(torch.linspace(1, 2, n))
    torch.testing.assert_close(fk.solve(k, 1.0), 1 / (1 + torch.linspace(1, 2, n)))


K = torch.eye(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3), 0.1), ValueError, r"k: expected shape \(\.\.\., N, N\), got \(3,\)"),
        ((torch.ones(2, 3), 0.1), ValueError, r"k: expected shape \(\.\.\., N, N\), got \(2, 3\)"),
        ((K.half(), 0.1), TypeError, "k: expected float32 or float64, got torch.float16"),
        ((K.long(), 0.1), TypeError, "k: expected float32 or float64, got torch.int64"),
        ((K, -0.1), ValueError, "damping: expected a finite number >= 0, got -0.1"),
        ((K, math.nan), ValueError, "damping: expected a finite number >= 0, got nan"),
        ((K, math.inf), ValueError, "damping: expected a finite number >= 0, got inf"),
        ((K, torch.ones(2)), ValueError, r"damping: expected shape \(\), got \(2,\)"),
        ((K, torch.ones((), dtype=torch.float64)), TypeError, "damping: expected the dtype of k"),
        ((K, 0.1, torch.ones(2)), ValueError, r"rhs: expected shape \(3,\), got \(2,\)"),
        ((K, 0.1, torch.ones(3, 1)), ValueError, r"rhs: expected shape \(3,\), got \(3, 1\)"),
        ((K, 0.1, torch.ones(3, dtype=torch.float64)), TypeError, "rhs: expected the dtype of k"),
        ((K, 0.1, torch.ones(3, device="meta")), ValueError, "rhs: expected the device of k"),
    ],
)
def test_arguments_that_do_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        fk.solve(*arguments)


@pytest.mark.skipif(not native.AVAILABLE, reason="the native extension is not built")
@pytest.mark.parametrize(
    ("k", "damping", "rhs", "name"),
    [
        (torch.ones(2, 3), torch.ones(()), None, "k"),
        (K, torch.ones(2), None, "damping"),
        (K, torch.ones((), dtype=torch.float64), None, "damping"),
        (K, torch.ones(()), torch.ones(2), "rhs"),
        (K, torch.ones(()), torch.ones(3, dtype=torch.float64), "rhs"),
    ],
)
def test_the_operator_itself_never_reads_out_of_bounds(k, damping, rhs, name):
    with pytest.raises((ValueError, TypeError), match=f"{name}: expected"):
        torch.ops.fngd.solve(k, damping, rhs)


@pytest.mark.parametrize("with_rhs", [False, True])
@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 5, 5)])
def test_opcheck(shape, with_rhs):
    k = gram(*shape[:-1], dtype=torch.float64)
    rhs = torch.ones(shape[:-1], dtype=k.dtype) if with_rhs else None
    damping = torch.full(shape[:-2], 0.1, dtype=k.dtype)
    torch.library.opcheck(torch.ops.fngd.solve.default, (k, damping, rhs))


def test_compiles_in_one_graph(route):
    k = gram(2, 5, dtype=torch.float64)
    run = torch.compile(lambda k: fk.solve(k, 0.1, return_info=True), backend="eager", fullgraph=True)
    x, info = run(k)
    torch.testing.assert_close(x, fk.solve(k, 0.1), rtol=1e-13, atol=1e-13)
    assert info.tolist() == [0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not native.AVAILABLE, reason="the native extension is not built")
def test_cuda_tensors_have_a_native_kernel():
    k = torch.ones(1, 1, 1, device="cuda")
    assert native.serves(k)
    assert choose.solve(1, "cuda", native.serves(k)) == "native"
    assert native.extension.solve(k, k[:, 0, 0], None)[0].item() == 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 31, 64, 129, 256, 320, 321, 513, 1024, 1025])
def test_residual_on_a_device(n, dtype):
    k, damping = gram(2, n, dtype=dtype), torch.tensor([0.0, 0.1], dtype=dtype)
    rhs = torch.randn(2, n, dtype=dtype)
    x, info = fk.solve(k.cuda(), damping.cuda(), rhs.cuda(), return_info=True)
    assert info.tolist() == [0, 0]
    # Twice the host's bound: the device takes its own reciprocal square root.
    assert backward_error(k, damping, x.cpu(), rhs) <= 8 * EPS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [70, 400])
def test_failures_and_strides_on_a_device(n, dtype):
    wide = gram(5, 2 * n, dtype=dtype).cuda()
    k = wide[:, 1::2, 1::2]
    clean = fk.solve(k, 0.1)
    broken = wide.clone()[:, 1::2, 1::2]
    broken[1, 40, 40] = -1
    broken[3, 69, 3] = math.nan
    x, info = fk.solve(broken, 0.1, return_info=True)
    assert info.tolist() == [0, 41, 0, 70, 0]
    assert x[[1, 3]].isnan().all()
    assert torch.equal(x[[0, 2, 4]], clean[[0, 2, 4]])
    transposed, damping = fk.solve(k.mT, 0.1).cpu(), torch.full((5,), 0.1, dtype=dtype)
    assert backward_error(k.mT.cpu(), damping, transposed, torch.ones(5, n)) <= 8 * EPS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("n", [96, 512])
def test_solve_in_a_cuda_graph(n):
    k, damping = gram(4, n, dtype=torch.float32).cuda(), torch.full((4,), 0.1, device="cuda")
    fk.solve(k, damping)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, info = fk.solve(k, damping, return_info=True)
    for seed, failed in ((1, 0), (2, 1), (3, 0)):
        fresh = gram(4, n, dtype=torch.float32, seed=seed)
        fresh[2, 50, 50] *= -1 if failed else 1
        k.copy_(fresh)
        graph.replay()
        assert info.tolist() == [0, 0, 51 * failed, 0]
        assert torch.equal(x.nan_to_num(), fk.solve(k, damping).nan_to_num())
