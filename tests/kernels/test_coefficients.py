"""The coefficients of the samples, against a float64 solve, on the native and the library route."""

import math

import pytest
import torch
from torch import Tensor

import fngd_kernels as fk
from fngd_kernels import native
from fngd_kernels.backends.torch.coefficients import coefficients as torch_coefficients
from fngd_kernels.damping import alpha_beta
from fngd_kernels.ops.coefficients import DAMPING_MODES, NORMALIZATIONS, coefficients

DTYPES = (torch.float32, torch.float64)


def gram(layers: int, n: int, *, rank: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return Gram matrices (L, N, N) of contributions that do not average to zero."""
    c = torch.randn(layers, n, rank or 2 * n, dtype=torch.float64) + 0.2
    return (c @ c.mT / n).to(dtype)


def exact(k: Tensor, damping: float, damping_mode: str, normalize: str) -> Tensor:
    """Solve (lam I + N K) v = 1 in float64, layer by layer, and scale v."""
    n, rows = k.shape[-1], []
    for layer in k.double():
        trace = n**2 * layer.trace()
        lam = damping * {"trace": trace / n, "mean_eig": trace / n**2, "absolute": 1.0}[damping_mode]
        v = torch.linalg.solve(lam * torch.eye(n, dtype=torch.float64) + n * layer, layer.new_ones(n))
        scale = {
            "mean": 1 / v.mean(),
            "lambda": lam,
            "raw": 1.0,
            "graft": (layer.sum() / (v @ layer @ v)).sqrt(),
        }[normalize]
        rows.append(v * scale)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("damping_mode", DAMPING_MODES)
def test_every_mode_and_normalization(route, damping_mode, normalize, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for n in (1, 2, 33, 64):
        k = gram(3, n, dtype=dtype)
        s, info = coefficients(k, 0.1, damping_mode, normalize)
        assert s.shape == (3, n)
        assert s.dtype == dtype
        assert info.dtype == torch.int32
        assert info.tolist() == [0, 0, 0]
        expected = exact(k, 0.1, damping_mode, normalize)
        assert ((s - expected).abs().amax(-1) <= tolerance * expected.abs().amax(-1)).all()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_the_operator_takes_a_damping_by_the_trace_and_a_constant_one(route, normalize):
    """A damping that is no mode: lam / N = alpha tr(K) + beta."""
    alpha, beta = 0.03, 0.2
    k = gram(3, 33)
    s, info = torch.ops.fngd.coefficients(k, alpha, beta, normalize)
    assert info.tolist() == [0, 0, 0]
    for layer, actual in zip(k, s, strict=True):
        lam = 33 * (alpha * layer.trace().item() + beta)
        expected = exact(layer[None], lam, "absolute", normalize)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("damping_mode", "numbers"),
    [("trace", (0.3, 0.0)), ("mean_eig", (0.3 / 7, 0.0)), ("absolute", (0.0, 0.3 / 7))],
)
def test_a_mode_is_two_numbers(damping_mode, numbers):
    assert alpha_beta(0.3, damping_mode, 7) == numbers


@pytest.mark.parametrize("n", [129, 256, 513])
def test_float32_error_at_the_default_damping(route, n):
    k = gram(2, n, rank=n // 2, dtype=torch.float32)
    expected = exact(k, 0.1, "trace", "mean")
    s, info = coefficients(k, 0.1)
    assert info.tolist() == [0, 0]
    assert ((s - expected).abs().amax(-1) <= 6e-6 * expected.abs().amax(-1)).all()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15, 1e30])
def test_the_size_of_the_gradient_does_not_matter(route, scale, normalize):
    k = gram(2, 20)
    small, info = coefficients((k * scale).float(), 0.1, "trace", normalize)
    expected = exact(k * scale, 0.1, "trace", normalize)
    assert info.tolist() == [0, 0]
    assert ((small - expected).abs().amax(-1) <= 1e-4 * expected.abs().amax(-1)).all()


@pytest.mark.parametrize(
    ("scale", "code"), [(0.0, 7), (1e-44, 7), (1e-40, 7), (0.9e-31, 7), (1.1e-31, 0), (1e36, 0), (2e38, 6)]
)
def test_at_the_ends_of_float32_weights_are_finite_and_underflow_is_told(route, scale, code):
    k = (torch.eye(5, dtype=torch.float64).expand(2, 5, 5) * scale).float()
    s, info = coefficients(k, 0.1)
    assert info.tolist() == [code, code]
    torch.testing.assert_close(s, torch.ones(2, 5))


def test_a_zero_gradient_takes_plain_weights_and_says_so(route):
    k = gram(3, 6)
    k[1] = 0
    s, info = coefficients(k, 0.0, "absolute", "raw")
    assert info.tolist() == [0, 8, 0]
    assert torch.equal(s[1], torch.ones(6, dtype=k.dtype))
    assert not torch.equal(s[0], torch.ones(6, dtype=k.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("damping_mode", DAMPING_MODES)
@pytest.mark.parametrize("raises", [1, 2, 3])
def test_the_damping_of_an_indefinite_matrix_is_raised(route, raises, damping_mode, normalize, dtype):
    k = gram(3, 12)
    values, vectors = torch.linalg.eigh(k[1])
    lam = 1e-3 * k[1].trace()
    values[0] = -0.4 * 10**raises * lam
    k[1] = vectors @ values.diag() @ vectors.mT
    k = k.to(dtype)
    trace = 12**2 * k.double().diagonal(dim1=-2, dim2=-1).sum(-1)
    unit = {"trace": trace / 12, "mean_eig": trace / 144, "absolute": trace / trace}[damping_mode]
    damping = float(12 * lam / unit[1])
    clean, _ = coefficients(k[::2], damping, damping_mode, normalize)
    s, info = coefficients(k, damping, damping_mode, normalize)
    if normalize == "graft" and info[1] == -raises - 1:  # v^T K v, a squared length, was negative before
        raises += 1
    assert info.tolist() == [0, -raises, 0]
    expected = exact(k[1:2], damping * 10**raises, damping_mode, normalize)[0]
    tolerance = 2e-4 if dtype == torch.float32 else 1e-10
    assert (s[1] - expected).abs().amax() <= tolerance * expected.abs().amax()
    assert torch.equal(s[::2], clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_damping_raising_begins_above_rounding(route, dtype):
    """One direction, 16 samples: exact arithmetic would leave pivots that are zero."""
    k = torch.ones(1, 16, 16, dtype=dtype)
    s, info = coefficients(k, 0.0)
    assert info.tolist() == [-1]
    torch.testing.assert_close(s, torch.ones(1, 16, dtype=dtype), rtol=0.02, atol=0)  # condition times eps


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("row", "column", "value", "code"),
    [(6, 2, math.nan, 7), (6, 2, math.inf, 7), (8, 8, math.nan, 21), (8, 8, math.inf, 21), (4, 4, -30.0, 5)],
)
def test_a_failed_layer_takes_plain_weights_and_leaves_the_others_alone(
    route, row, column, value, code, dtype, normalize
):
    k = gram(3, 20, dtype=dtype)
    clean, _ = coefficients(k, 1e-3, "mean_eig", normalize)
    k[1, row, column] = value
    s, info = coefficients(k, 1e-3, "mean_eig", normalize)
    assert info.tolist() == [0, code, 0]
    assert torch.equal(s[1], torch.ones(20, dtype=dtype))
    assert torch.equal(s[::2], clean[::2])


def test_a_negative_trace_is_no_gram_matrix(route):
    s, info = coefficients(-torch.eye(4)[None], 0.1)
    assert info.tolist() == [5]
    assert torch.equal(s, torch.ones(1, 4))


def test_duplicate_samples_have_equal_weights(route):
    k = gram(2, 10, dtype=torch.float64).repeat_interleave(2, -1).repeat_interleave(2, -2)
    s, info = coefficients(k, 0.1)
    assert info.tolist() == [0, 0]
    torch.testing.assert_close(s[:, ::2], s[:, 1::2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["every second", "expanded", "transposed", "upper triangle poisoned"])
def test_strides(route, layout):
    wide = gram(4, 30)
    k = {
        "every second": wide[::2, ::2, ::2],
        "expanded": wide[0].expand(3, 30, 30),
        "transposed": wide.mT,
        "upper triangle poisoned": wide.tril() + torch.full_like(wide, math.nan).triu(1),
    }[layout]
    for normalize in NORMALIZATIONS:
        s, info = coefficients(k, 0.1, "trace", normalize)
        full = k.tril() + k.tril(-1).mT
        torch.testing.assert_close(s, exact(full, 0.1, "trace", normalize), rtol=1e-11, atol=1e-13)
        assert not info.any()


@pytest.mark.parametrize("shape", [(0, 3, 3), (3, 0, 0)])
def test_empty(route, shape):
    s, info = coefficients(torch.empty(shape), 0.1)
    assert s.shape == shape[:2]
    assert info.tolist() == [0] * shape[0]


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("damping_mode", DAMPING_MODES)
def test_reference_is_the_definition(damping_mode, normalize):
    k = gram(2, 12)
    torch.testing.assert_close(
        fk.reference.coefficients(k, 0.3, damping_mode, normalize),
        exact(k, 0.3, damping_mode, normalize),
        rtol=1e-11,
        atol=1e-13,
    )


def test_two_threads_give_the_same_bits():
    k = gram(7, 65, dtype=torch.float32)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(coefficients(k, 0.1, "trace", "graft")[0])
    torch.set_num_threads(1)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 3), 0.1), ValueError, r"k: expected shape \(L, N, N\), got \(3, 3\)"),
        ((torch.ones(1, 2, 3), 0.1), ValueError, r"k: expected shape \(L, N, N\), got \(1, 2, 3\)"),
        ((torch.ones(1, 2, 2).half(), 0.1), TypeError, "k: expected float32 or float64, got torch.float16"),
        ((torch.ones(1, 2, 2), -1.0), ValueError, "damping: expected a finite number >= 0, got -1.0"),
        ((torch.ones(1, 2, 2), math.nan), ValueError, "damping: expected a finite number >= 0, got nan"),
        ((torch.ones(1, 2, 2), 0.1, "tr"), ValueError, "damping_mode: expected one of .*, got 'tr'"),
        ((torch.ones(1, 2, 2), 0.1, "trace", "l2"), ValueError, "normalize: expected one of .*, got 'l2'"),
    ],
)
def test_arguments_that_do_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        coefficients(*arguments)


@pytest.mark.skipif(not native.AVAILABLE, reason="the native extension is not built")
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((torch.ones(1, 2, 3), 0.1, 0.0, "mean"), "k"),
        ((torch.ones(1, 2, 2), 0.1, 0.0, "l2"), "normalize"),
    ],
)
def test_the_operator_itself_checks_its_arguments(arguments, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        torch.ops.fngd.coefficients(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.fngd.coefficients.default, (gram(2, 5, dtype=dtype), 0.1, 0.2, "graft"))


def test_compiles_in_one_graph_and_records_no_gradient(route):
    k = gram(2, 5).requires_grad_()
    run = torch.compile(lambda k: coefficients(k, 0.1), backend="eager", fullgraph=True)
    s, info = run(k)
    assert not s.requires_grad
    torch.testing.assert_close(s, exact(k.detach(), 0.1, "trace", "mean"), rtol=1e-11, atol=1e-13)
    assert not info.any()


@pytest.mark.skipif(not native.AVAILABLE, reason="the native extension is not built")
def test_both_forms_report_the_same(monkeypatch):
    k = gram(6, 24, dtype=torch.float32)
    k[1] = 0
    k[2, 5, 5] = -1
    k[3, 9, 2] = math.nan
    k[4, 0, 0] = math.inf
    for damping_mode in DAMPING_MODES:
        for normalize in NORMALIZATIONS:
            s, info = coefficients(k, 0.1, damping_mode, normalize)
            library = torch_coefficients(k, *alpha_beta(0.1, damping_mode, 24), normalize)
            torch.testing.assert_close((s, info), library, rtol=2e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 31, 64, 129, 256, 320, 321, 513, 1024, 1025])
def test_every_mode_and_normalization_on_a_device(n, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    k = gram(3, n, dtype=dtype)
    for damping_mode in DAMPING_MODES:
        for normalize in NORMALIZATIONS:
            s, info = coefficients(k.cuda(), 0.1, damping_mode, normalize)
            expected = exact(k, 0.1, damping_mode, normalize)
            assert info.tolist() == [0, 0, 0]
            assert ((s.cpu() - expected).abs().amax(-1) <= tolerance * expected.abs().amax(-1)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_failures_zeros_and_strides_on_a_device(dtype):
    wide = gram(6, 70, dtype=dtype)
    k = wide[:, ::2, ::2]
    k[1] = 0
    k[2, 5, 5] = -1
    k[3, 9, 2] = math.nan
    k[4, 0, 0] = math.inf
    for normalize in NORMALIZATIONS:
        expected, codes = coefficients(k, 0.1, "trace", normalize)
        s, info = coefficients(wide.cuda()[:, ::2, ::2], 0.1, "trace", normalize)
        assert info.tolist() == codes.tolist()
        tolerance = 1e-4 if dtype == torch.float32 else 1e-10
        assert ((s.cpu() - expected).abs().amax(-1) <= tolerance * expected.abs().amax(-1)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [96, 512])
def test_coefficients_in_a_cuda_graph(n):
    k = gram(4, n, dtype=torch.float32).cuda()
    coefficients(k, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        s, info = coefficients(k, 0.1, "trace", "graft")
    for failed in (0, 1, 0):
        k.copy_(gram(4, n, dtype=torch.float32))
        if failed:
            k[2, 50, 50] = math.nan
        graph.replay()
        expected, codes = coefficients(k, 0.1, "trace", "graft")
        assert (info > 0).tolist() == [False, False, bool(failed), False]
        assert torch.equal(info, codes)
        assert torch.equal(s, expected)


@pytest.mark.gpu
def test_one_launch_and_no_wait_for_the_device():
    k = gram(20, 64, dtype=torch.float32).cuda()
    coefficients(k, 0.1)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            coefficients(k, 0.1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels
    assert "run_kernel" in kernels[0]
