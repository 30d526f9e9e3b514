"""Every native operator and node on the CPU, for a build with sanitizers: see test_sanitizers.py.

Results are compared with torch's own in float64. Prints as JSON which extension ran, what was called how
often, and the bytes that every round of calls leaves allocated.
"""

import ctypes
import gc
import itertools
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from fngd_kernels.native import extension
from fngd_kernels.ops import nodes
from fngd_kernels.ops.coefficients import DAMPING_MODES, NORMALIZATIONS, coefficients
from fngd_kernels.ops.finite import DTYPES, found_non_finite
from fngd_kernels.ops.solve import solve

ORDERS = [*range(1, 71), 129, 200]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def close(value, expected, tolerance):
    assert (value.double() - expected.double()).norm() <= tolerance * (1 + expected.double().norm())


def grams(batch, n, dtype):
    """Yield Gram matrices of one batch as matrices of several strides, NaN above the diagonal."""
    rows = torch.randn(batch, n, n + 3, dtype=torch.float64)
    k = (rows @ rows.mT / n).to(dtype)
    poisoned = k.tril() + torch.full_like(k, torch.nan).triu(1)
    wide = torch.full((batch, 2 * n, 3 * n + 1), torch.nan, dtype=dtype)
    wide[:, ::2, 1::3] = poisoned
    for layout in (poisoned, poisoned.mT.contiguous().mT, wide[:, ::2, 1::3], poisoned.flip(0)[:1]):
        yield layout, layout.tril().double() + layout.tril(-1).double().mT


def run_solves(calls):
    for n in ORDERS:
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-11)):
            for k, full in grams(3, n, dtype):
                rhs = torch.randn(len(k), 2 * n, dtype=dtype)[:, ::2]
                damped = full + 0.5 * torch.eye(n)
                for right in (None, rhs):
                    x = solve(k, 0.5, right)
                    expected = torch.ones(len(k), n) if right is None else right
                    close((damped @ x.double()[..., None])[..., 0], expected, tolerance)
                    calls["solve"] += 1
    broken = torch.eye(9).repeat(2, 1, 1)
    broken[1, 4, 4] = -3
    assert solve(broken, 0.5, return_info=True)[1].tolist() == [0, 5]


def run_coefficients(calls):
    for n in (1, 2, 7, 8, 33, 70):
        for dtype in (torch.float32, torch.float64):
            for k, full in grams(3, n, dtype):
                for mode in DAMPING_MODES:
                    v = torch.linalg.solve(
                        n * full + 0.1 * unit(full, mode)[:, None, None] * torch.eye(n),
                        1.0 + 0 * full[..., 0],
                    )
                    for normalize in NORMALIZATIONS:
                        s, info = coefficients(k, 0.1, mode, normalize)
                        assert not info.any()
                        close(F.normalize(s.double(), dim=1), F.normalize(v, dim=1), 1e-3)
                        calls["coefficients"] += 1
            s, info = coefficients(torch.full((2, n, n), torch.nan, dtype=dtype), 0.1)
            assert (s == 1).all()
            assert info.all()


def unit(k, mode):
    trace = k.diagonal(dim1=1, dim2=2).sum(1)
    return {"trace": k.shape[-1] * trace, "mean_eig": trace, "absolute": torch.ones_like(trace)}[mode]


def run_add_gram(calls):
    for n in (1, 5, 6, 48, 50, 131):
        for d in (1, 17, 513, 1025):
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
                rows, k = torch.randn(n, d, dtype=dtype), torch.zeros(n, n, dtype=dtype)
                extension.add_gram(k, rows)
                close(k.triu(), (rows.double() @ rows.double().T).triu(), tolerance)
                calls["add_gram"] += 1


def run_finite(calls):
    for dtype in DTYPES:
        for size in (0, 1, 3, 7, 8, 33, 40_001):
            for start in range(4):
                memory = torch.full((size + 8,), torch.inf, dtype=dtype)
                numbers = memory[start : start + size]
                numbers.fill_(-torch.finfo(dtype).max)
                assert not found_non_finite([numbers, numbers[::2]])
                calls["found_non_finite"] += 1
                if size:
                    numbers[(7 * size) // 8] = -torch.inf
                    assert found_non_finite([torch.ones(3), numbers])
                    calls["found_non_finite"] += 1


class Recorder:
    """A handler of uses that counts its calls and answers each of them with `answer`."""

    def __init__(self, answer):
        self.answer, self.calls = answer, 0

    def __call__(self, a, e, biased, must_return):
        self.calls += 1
        assert a is None or len(a) == len(e)
        return self.answer


def check_node(node, function, x, weight, bias, tolerance, calls, name):
    """Compare values and first and second derivatives with those of the per-sample weighted function."""
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    parameters = leaves[1:]
    s = torch.rand(len(x), 2, dtype=torch.float32)[:, 0] + 0.5
    weights = s.view(-1, *[1] * (x.ndim - 1)).double()
    y = node(x, weight, bias, s)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = function(*wide)
    close(y, exact, tolerance)
    e = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, e, create_graph=True)
    (dx,) = torch.autograd.grad(exact, wide[:1], e.double(), create_graph=True)
    shape = [-1] + [1] * (exact.ndim - 1)
    expected = torch.autograd.grad(
        (exact * e.double() * s.double().view(shape)).sum(), wide[1:], retain_graph=True
    )
    for value, truth in zip(found, (dx, *expected), strict=True):
        close(value, truth, tolerance)
    if len(x):
        (second,) = torch.autograd.grad(found[0].square().sum(), weight)
        (truth,) = torch.autograd.grad((dx.square() * weights).sum(), wide[1])
        close(second, truth, 4 * tolerance)

    on_use = Recorder(
        tuple(torch.ones_like(p) for p in (weight, bias) if p is not None) + (None,) * (bias is None)
    )
    y = node(x, weight, bias, None, on_use)
    y.backward(e)
    assert on_use.calls == 1
    assert all((p.grad == 1).all() for p in parameters)
    calls[name] += 2
    with torch.no_grad():
        node(x, weight, bias, s)


def run_linear(calls):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        for lead in ((5,), (3, 4), (2, 3, 4), (1,), (0,)):
            for inputs, outputs in ((7, 3), (3, 7), (1, 1)):
                for biased in (False, True):
                    x, w = torch.randn(*lead, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
                    b = torch.randn(outputs, dtype=dtype) if biased else None
                    check_node(nodes.linear, F.linear, x, w, b, tolerance, calls, "linear")


def run_convolutions(calls):
    for dims in (1, 2, 3):
        for transposed in (False, True):
            for groups in (1, 2):
                for n, biased in ((3, True), (1, False)):
                    options = {
                        "stride": [2] * dims,
                        "padding": [1] * dims,
                        "dilation": [1] * dims,
                        "groups": groups,
                    }
                    x = torch.randn(n, 4, *[6, 5, 4][:dims], dtype=torch.float64)
                    if dims == 2:
                        x = x.contiguous(memory_format=torch.channels_last)
                    w = torch.randn(
                        4, 6 // groups if transposed else 4 // groups, *[3] * dims, dtype=torch.float64
                    )
                    b = torch.randn(6 if transposed else 4, dtype=torch.float64) if biased else None

                    def node(x, w, b, coefficients=None, on_use=None, options=options, transposed=transposed):
                        return nodes.conv(x, w, b, coefficients, on_use, transposed=transposed, **options)

                    def function(x, w, b=None, dims=dims, options=options, transposed=transposed):
                        return (TRANSPOSED if transposed else CONVOLUTIONS)[dims](x, w, b, **options)

                    check_node(node, function, x, w, b, 1e-12, calls, "conv")


def run_embeddings_and_rows(calls):
    for shape in ((4,), (3, 5), (2, 3, 4), (0, 2)):
        ids, s = torch.randint(0, 6, shape), torch.rand(shape[0])
        w = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        for padding_idx in (-1, 2):
            y = nodes.embedding(ids, w, s, padding_idx=padding_idx)
            e = torch.randn_like(y)
            y.backward(e)
            kept = (ids != padding_idx).double() * s.view(-1, *[1] * (ids.ndim - 1))
            close(
                w.grad,
                torch.zeros_like(w).index_add(0, ids.flatten(), (e * kept[..., None]).flatten(0, -2)),
                1e-6,
            )
            w.grad = None
            on_use = Recorder((torch.ones_like(w), None))
            nodes.embedding(ids, w, None, on_use, padding_idx=padding_idx).backward(e)
            assert on_use.calls == 1
            assert (w.grad == 1).all()
            w.grad = None
            calls["embedding"] += 2
        y = nodes.rows(w, shape[0], s)
        e = torch.randn_like(y)
        y.backward(e)
        close(w.grad, torch.einsum("n,nij->ij", s.double(), e), 1e-6)
        w.grad = None
        on_use = Recorder((None, None))
        nodes.rows(w, shape[0], None, on_use).sum().backward()
        assert on_use.calls == 1
        assert w.grad is None
        calls["rows"] += 2


def run_failing_handlers(calls):
    """Exceptions and wrong answers of a handler reach the caller of backward."""
    x, w = torch.randn(3, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)

    def broken(*_):
        raise KeyError("from the handler")

    for on_use, error in ((broken, KeyError), (lambda *_: 7, RuntimeError), (lambda *_: (w,), RuntimeError)):
        with pytest.raises(error):
            nodes.linear(x, w, None, None, on_use).sum().backward()
        calls["failing handler"] += 1


def run_all(calls):
    torch.manual_seed(0)
    run_solves(calls)
    run_coefficients(calls)
    run_add_gram(calls)
    run_finite(calls)
    run_linear(calls)
    run_convolutions(calls)
    run_embeddings_and_rows(calls)
    run_failing_handlers(calls)


def main():
    assert extension is not None
    calls = Counter()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        run_all(calls)
    # Python's caches fill in some rounds; what is leaked is lost in every round.
    allocated = ctypes.CDLL(None).__sanitizer_get_current_allocated_bytes
    allocated.restype = ctypes.c_size_t
    kept = []
    for _ in range(4):
        run_all(Counter())
        gc.collect()
        kept.append(allocated())
    growth = min(after - before for before, after in itertools.pairwise(kept))
    print(json.dumps({"extension": extension.__file__, "calls": calls, "leaked": growth}))


if __name__ == "__main__":
    main()
