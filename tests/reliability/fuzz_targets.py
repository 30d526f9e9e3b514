"""The functions that are fuzzed: how sound arguments are drawn, and what the right answer is.

The right answers are formed sample by sample in float64, by loops and torch's own convolutions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_values import FLOATING, floats, layout, size
from torch import Tensor

import fngd_kernels as fk
from fngd_kernels.ops.coefficients import DAMPING_MODES, NORMALIZATIONS, coefficients
from fngd_kernels.ops.finite import found_non_finite
from fngd_kernels.ops.scale_bias import scale_bias

Arguments = dict[str, Any]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
REFUSED = (ValueError, TypeError)


@dataclass(frozen=True)
class Target:
    """A function, how sound arguments are drawn, and a judge of results that raises AssertionError."""

    name: str
    call: Callable[..., Any]
    draw: Callable[[random.Random], Arguments]
    judge: Callable[[Any, Arguments], None]
    errors: tuple[type[Exception], ...] = REFUSED


# ---- right answers ------------------------------------------------------------


def linear_rows(a: Tensor, e: Tensor, bias: bool) -> Tensor:
    """Return C_n as rows."""
    rows = []
    for a_n, e_n in zip(a, e, strict=True):
        a_n, e_n = (t if t.ndim == 2 else t.unsqueeze(0) for t in (a_n, e_n))
        ones = [torch.ones(len(a_n), 1, dtype=a.dtype)] if bias else []
        rows.append((e_n.T @ torch.cat([a_n, *ones], 1)).flatten())
    return torch.stack(rows) if rows else a.new_zeros(0, e.shape[-1] * (a.shape[-1] + bias))


def conv_rows(x: Tensor, e: Tensor, weight_shape, bias, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """Return C_n as rows, the weight's part first."""
    weight = torch.zeros(tuple(weight_shape), dtype=x.dtype, requires_grad=True)
    dims = weight.ndim - 2
    pads = padding if isinstance(padding, tuple) else (padding,) * dims
    # Torch's own padding asks for space that is not empty.
    x = F.pad(x, [size for pad in reversed(pads) for size in (pad, pad)])
    rows = [e.new_zeros(0, weight.numel() + bias * weight.shape[0])]
    for x_n, e_n in zip(x, e, strict=True):
        y = CONVOLUTIONS[dims](x_n[None], weight, None, stride, 0, dilation, groups)
        parts = [torch.autograd.grad(y, weight, e_n[None])[0].flatten()]
        rows.append(torch.cat(parts + [e_n.flatten(1).sum(1)] * bool(bias))[None])
    return torch.cat(rows)


def embedding_rows(ids: Tensor, e: Tensor, names: list[int], padding_idx: int | None) -> Tensor:
    """Return C_n as rows, for the ids in `names` one after the other."""
    rows = e.new_zeros(len(ids), len(names), e.shape[-1])
    for n, ids_n in enumerate(ids):
        for token, e_nt in zip(
            ids_n.reshape(-1).tolist(), e[n] if e.ndim == 3 else e[n : n + 1], strict=True
        ):
            if token != padding_idx:
                rows[n, names.index(token)] += e_nt
    return rows.flatten(1)


def ints(value: Any) -> Any:
    """Return plain ints for what only counts as such: True, or numpy's."""
    return tuple(map(int, value)) if isinstance(value, list | tuple) else int(value)


def rows_of(given: Arguments, magnitudes: bool = False) -> Tensor:
    """Return C_n as rows for the arguments of any gram or combine; with magnitudes of |inputs|."""
    exact = {name: value.detach().double() for name, value in given.items() if isinstance(value, Tensor)}
    if magnitudes:
        exact = {name: value.abs() for name, value in exact.items()}
    bias = given.get("bias", False)
    if "g" in given:
        return exact["g"].unsqueeze(1).flatten(1)
    if "ids" in given:
        ids = given["ids"]
        if not exact["e"].shape[-1]:
            return exact["e"].new_zeros(len(ids), 0)
        names = list(range(given["num_embeddings"])) if "num_embeddings" in given else ids.unique().tolist()
        return embedding_rows(ids, exact["e"], names, given.get("padding_idx"))
    if "x" in given:
        keys = ("weight_shape", "stride", "padding", "dilation", "groups")
        return conv_rows(exact["x"], exact["e"], bias=bias, **{k: ints(given[k]) for k in keys if k in given})
    return linear_rows(exact["a"], exact["e"], bias)


def finite(given: Arguments) -> bool:
    return all(value.isfinite().all() for value in given.values() if isinstance(value, Tensor))


def near(value: Tensor, exact: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    """Require value = exact up to roundings of the dtype, relative to the sum of magnitudes."""
    assert value.dtype == dtype, f"{value.dtype} instead of {dtype}"
    assert value.shape == exact.shape, f"{tuple(value.shape)} instead of {tuple(exact.shape)}"
    assert not value.requires_grad or value.grad_fn is not None
    limits = torch.finfo(dtype)
    bound = 64 * limits.eps * magnitude + 1e4 * limits.tiny
    wrong = ~((value.detach().double() - exact).abs() <= bound) & (magnitude < limits.max)
    assert not wrong.any(), f"off by {(value.double() - exact).abs().max().item():.3g}"


def judge_gram(result: Tensor, given: Arguments) -> None:
    inputs = given.get("g", given.get("e"))
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    rows, sizes = rows_of(given), rows_of(given, magnitudes=True)
    if not finite(given):
        assert result.dtype == dtype
        assert len(result) == len(rows)
        return
    k, magnitude = rows @ rows.T, sizes @ sizes.T
    if given.get("diag"):
        k, magnitude = k.diagonal(), magnitude.diagonal()
    near(result, k, magnitude, dtype)


def judge_symmetric(result: Tensor, given: Arguments) -> None:
    """Judge a gram whose result is symmetric to the last bit."""
    judge_gram(result, given)
    assert given.get("diag") or torch.equal(result.nan_to_num(), result.T.nan_to_num())


def judge_combine(result: Any, given: Arguments) -> None:
    dtype = given.get("g", given.get("e")).dtype
    parts = [part.reshape(-1) for part in (result if isinstance(result, tuple) else (result,))]
    if "a" in given and given.get("bias"):
        parts = [torch.cat((result[0], result[1][:, None]), 1).flatten()]
    rows, sizes = rows_of(given), rows_of(given, magnitudes=True)
    total = torch.cat(parts)
    assert total.dtype == dtype
    assert total.numel() == rows.shape[1]
    if finite(given):
        s = given["s"].detach().double()
        near(total, s @ rows, s.abs() @ sizes + half_step(dtype) * sizes.sum(0), dtype)


def half_step(dtype: torch.dtype) -> float:
    """What scaled gradients of half precision lose where they underflow, over eps."""
    return 1e-3 if dtype == torch.float16 else 0.0


def judge_rows(result: Tensor, given: Arguments) -> None:
    """Judge reference.contributions*."""
    rows, sizes = rows_of(given), rows_of(given, magnitudes=True)
    assert result.numel() == rows.numel()
    if finite(given):
        near(result.reshape(rows.shape), rows, sizes, torch.promote_types(given["e"].dtype, torch.float32))


def as_double(value: Any) -> Tensor:
    return (
        value.detach().double()
        if isinstance(value, Tensor)
        else torch.tensor(float(value), dtype=torch.float64)
    )


def judge_solve(result: Any, given: Arguments, lower: bool = True) -> None:
    x, info = result if isinstance(result, tuple) else (result, None)
    k = given["k"].detach().double()
    assert x.dtype == given["k"].dtype
    assert x.shape == k.shape[:-1]
    if lower:
        k = k.tril() + k.tril(-1).mT
    damping = as_double(given["damping"])
    damped = k + damping[..., None, None] * torch.eye(k.shape[-1], dtype=torch.float64)
    rhs = torch.ones(x.shape).double() if given.get("rhs") is None else as_double(given["rhs"])
    solved = x.isfinite().all(-1)
    assert info is None or not lower or torch.equal(info == 0, solved) or not rhs.isfinite().all()
    if not (damped.isfinite().all() and rhs.isfinite().all()) or not x.numel():
        return
    x = x.detach().double()
    scale = damped.abs().sum(-1).amax(-1) * x.abs().amax(-1) + rhs.abs().amax(-1)
    residual = ((damped @ x[..., None])[..., 0] - rhs).abs().amax(-1)
    bound = 100 * k.shape[-1] ** 2 * torch.finfo(given["k"].dtype).eps * scale
    assert (residual <= bound)[solved].all(), f"residual {residual}"
    if lower:
        definite = torch.linalg.eigvalsh(damped)[..., 0] > 1e-5 * damped.abs().amax((-2, -1))
        assert solved[definite].all(), "a definite matrix was not solved"


def judge_coefficients(result: Any, given: Arguments) -> None:
    s, info = result if isinstance(result, tuple) else (result, None)
    k = given["k"].detach().double()
    assert s.dtype == given["k"].dtype
    assert s.shape == k.shape[:-1]
    if info is not None:
        assert s.isfinite().all()
        assert (s == 1).all(-1)[info > 0].all()
        k = k.tril() + k.tril(-1).mT
    n, trace = k.shape[-1], k.diagonal(dim1=-2, dim2=-1).sum(-1)
    mode, normalize = given.get("damping_mode", "trace"), given.get("normalize", "mean")
    lam = given["damping"] * {"trace": n * trace, "mean_eig": trace, "absolute": trace * 0 + 1}[mode]
    damped = n * k + lam[..., None, None] * torch.eye(n, dtype=torch.float64)
    for index in range(len(k) if k.ndim == 3 else 0):
        # Ill-conditioned systems are judged by the campaign on numerics.
        if not k[index].isfinite().all() or not n or (info is not None and info[index] != 0):
            continue
        if torch.linalg.cond(damped[index]) > 1e3:
            continue
        v = torch.linalg.solve(damped[index], torch.ones(n, dtype=torch.float64))
        if normalize == "graft":
            v = v * (k[index].sum() / (v @ k[index] @ v)).sqrt()
        v = v * {"mean": 1 / v.mean(), "lambda": lam[index], "raw": 1, "graft": 1}[normalize]
        if not 0 < v.norm() < torch.finfo(s.dtype).max or not s[index].isfinite().all():
            continue
        error = (s[index].detach().double() - v).norm() / v.norm()
        assert not error > 1e5 * torch.finfo(s.dtype).eps, f"relative error {error:.3g}"


def judge_plan(plan: fk.Plan, given: Arguments) -> None:
    n = given["a_shape"][0]
    assert plan.algorithm in ("hadamard", "pairs", "explicit")
    assert 1 <= plan.sample_chunk <= n
    assert min(plan.group_chunk, plan.out_chunk, plan.in_chunk) >= 1
    assert plan.macs > 0
    assert plan.bytes_moved > 0
    assert plan.workspace >= 0


def judge_finite(result: Tensor, given: Arguments) -> None:
    assert result.shape == (1,)
    assert result.dtype == torch.float32
    assert bool(result) == (not all(t.isfinite().all() for t in given["tensors"]))


def judge_scale_bias(result: Any, given: Arguments) -> None:
    e, s = given["e"].detach().double(), given["s"].detach().double()
    product = e * s.view(-1, *[1] * (e.ndim - 1))
    scaled, bias = result
    assert (scaled is None) == (not given["scaled"])
    assert (bias is None) == (not given["bias"])
    if not finite(given):
        return
    others = [axis for axis in range(e.ndim) if axis != given["channel"]]
    if scaled is not None:
        near(scaled, product, product.abs() + half_step(given["e"].dtype), given["e"].dtype)
    if bias is not None:
        near(
            bias,
            product.sum(others),
            product.abs().sum(others) + half_step(given["e"].dtype),
            given["e"].dtype,
        )


# ---- sound arguments ------------------------------------------------------------


def options(rng: random.Random, **choices: tuple) -> Arguments:
    """Return each of the keyword arguments, or leave it out."""
    return {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.5}


WORKSPACES = (None, 0, 1, 1000, 64 << 20)
PRECISIONS = (None, "ieee", "tf32", "tf32x3")


def draw_linear(rng: random.Random, *, combine: bool = False, **choices: tuple) -> Arguments:
    dtype, n = rng.choice(FLOATING), size(rng)
    lead = (n,) if rng.random() < 0.4 else (n, size(rng))
    given = {"a": floats(rng, *lead, size(rng), dtype=dtype), "e": floats(rng, *lead, size(rng), dtype=dtype)}
    return given | weights(rng, n, combine) | options(rng, bias=(False, True), **choices)


def weights(rng: random.Random, n: int, wanted: bool) -> Arguments:
    return {"s": floats(rng, n, dtype=rng.choice(FLOATING))} if wanted else {}


def draw_conv(rng: random.Random, *, combine: bool = False, **choices: tuple) -> Arguments:
    dtype, n, dims = rng.choice(FLOATING), size(rng), rng.choice((1, 2, 2, 3))
    groups, inputs, outputs = rng.choice((1, 1, 2, 3)), rng.choice((1, 2, 3)), rng.choice((1, 2, 3))
    kernel, stride, padding, dilation = (
        [rng.choice(v) for _ in range(dims)] for v in ((1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2))
    )
    space = [
        max(1, d * (k - 1) + 1 - 2 * p) + rng.randrange(4)
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    out = [
        (length + 2 * p - d * (k - 1) - 1) // step + 1
        for length, k, step, p, d in zip(space, kernel, stride, padding, dilation, strict=True)
    ]
    return {
        "x": floats(rng, n, groups * inputs, *space, dtype=dtype),
        "e": floats(rng, n, groups * outputs, *out, dtype=dtype),
        **weights(rng, n, combine),
        "weight_shape": (groups * outputs, inputs, *kernel),
        "stride": stride,
        "padding": tuple(padding),
        "dilation": dilation,
        "groups": groups,
        **options(rng, bias=(False, True), **choices),
    }


def draw_embedding(
    rng: random.Random, *, combine: bool = False, rows: bool = False, **choices: tuple
) -> Arguments:
    shape = (size(rng),) if rng.random() < 0.4 else (size(rng), size(rng))
    count = rng.choice((1, 2, 5, 9))
    ids = torch.randint(0, count, shape, dtype=rng.choice((torch.int64, torch.int32)))
    given = {"ids": layout(rng, ids), "e": floats(rng, *shape, size(rng), dtype=rng.choice(FLOATING))}
    given |= weights(rng, shape[0], combine)
    if combine or rows:
        given["num_embeddings"] = count
    return given | options(rng, padding_idx=(None, 0, count - 1), **choices)


def draw_rows(rng: random.Random, *, combine: bool = False, **choices: tuple) -> Arguments:
    shape = [size(rng) for _ in range(rng.choice((1, 2, 2, 3)))]
    return (
        {"g": floats(rng, *shape, dtype=rng.choice(FLOATING))}
        | weights(rng, shape[0], combine)
        | options(rng, **choices)
    )


def draw_matrices(rng: random.Random, lead: tuple[int, ...]) -> Tensor:
    n = rng.choice((0, 1, 2, 3, 8, 9, 17))
    features = torch.randn(*lead, n, n + 2, dtype=torch.float64)
    return layout(rng, (features @ features.mT).to(rng.choice((torch.float32, torch.float64))))


def draw_solve(rng: random.Random, **choices: tuple) -> Arguments:
    k = draw_matrices(rng, tuple(size(rng) for _ in range(rng.randrange(3))))
    damping = rng.choice((0.01, 1, 30.0))
    if rng.random() < 0.3:
        damping = layout(rng, torch.rand(k.shape[:-2], dtype=k.dtype) + 0.1)
    rhs = {"rhs": rng.choice((None, floats(rng, *k.shape[:-1], dtype=k.dtype)))} if rng.random() < 0.5 else {}
    return {"k": k, "damping": damping} | rhs | options(rng, **choices)


def draw_coefficients(rng: random.Random) -> Arguments:
    given = {"k": draw_matrices(rng, (size(rng),)), "damping": rng.choice((0.01, 0.1, 1, 30.0))}
    return given | options(rng, damping_mode=DAMPING_MODES, normalize=NORMALIZATIONS)


def draw_plan(rng: random.Random) -> Arguments:
    drawn = draw_conv(rng) if rng.random() < 0.5 else draw_linear(rng)
    shapes = [
        [max(1, length) for length in drawn.pop(name).shape] for name in ("x" if "x" in drawn else "a", "e")
    ]
    drawn |= {"a_shape": tuple(shapes[0]), "e_shape": shapes[1]}
    capabilities = (None, (8, 0), (9, 0), (10, 0))
    drawn |= options(rng, workspace=(0, 1000, 1 << 26), capability=capabilities)
    return drawn | options(rng, itemsize=(2, 4, 8))


def draw_finite(rng: random.Random) -> Arguments:
    tensors = [
        floats(rng, *[size(rng) for _ in range(rng.randrange(4))], dtype=rng.choice(FLOATING))
        for _ in range(3)
    ]
    if rng.random() < 0.5:
        tensors.append(torch.tensor([1.0, rng.choice((torch.nan, torch.inf, -torch.inf))]))
    return {"tensors": tensors}


def draw_scale_bias(rng: random.Random) -> Arguments:
    e = floats(rng, *[size(rng) for _ in range(rng.choice((2, 3, 4)))], dtype=rng.choice(FLOATING))
    given = {"e": e, **weights(rng, len(e), True), "channel": rng.randrange(1, e.ndim)}
    return given | {"scaled": rng.random() < 0.7, "bias": rng.random() < 0.7}


SINGULAR = (*REFUSED, torch.linalg.LinAlgError)
GRAM = {"diag": (False, True), "workspace": WORKSPACES}
KERNELS = [
    Target("gram", fk.gram, partial(draw_linear, precision=PRECISIONS, **GRAM), judge_symmetric),
    Target("gram_conv", fk.gram_conv, partial(draw_conv, precision=PRECISIONS, **GRAM), judge_symmetric),
    Target(
        "gram_embedding",
        fk.gram_embedding,
        partial(draw_embedding, precision=PRECISIONS, **GRAM),
        judge_symmetric,
    ),
    Target("gram_rows", fk.gram_rows, partial(draw_rows, **GRAM), judge_symmetric),
    Target("combine", fk.combine, partial(draw_linear, combine=True), judge_combine),
    Target("combine_conv", fk.combine_conv, partial(draw_conv, combine=True), judge_combine),
    Target("combine_embedding", fk.combine_embedding, partial(draw_embedding, combine=True), judge_combine),
    Target("combine_rows", fk.combine_rows, partial(draw_rows, combine=True), judge_combine),
    Target("solve", fk.solve, partial(draw_solve, return_info=(False, True)), judge_solve),
    Target("coefficients", coefficients, draw_coefficients, judge_coefficients),
    Target("plan", fk.plan, draw_plan, judge_plan),
    Target("found_non_finite", found_non_finite, draw_finite, judge_finite),
    Target("scale_bias", scale_bias, draw_scale_bias, judge_scale_bias),
]
REFERENCE = [
    Target("reference.gram", fk.reference.gram, draw_linear, judge_gram),
    Target("reference.gram_conv", fk.reference.gram_conv, draw_conv, judge_gram),
    Target("reference.gram_embedding", fk.reference.gram_embedding, draw_embedding, judge_gram),
    Target("reference.gram_rows", fk.reference.gram_rows, draw_rows, judge_gram),
    Target("reference.combine", fk.reference.combine, partial(draw_linear, combine=True), judge_combine),
    Target(
        "reference.combine_conv", fk.reference.combine_conv, partial(draw_conv, combine=True), judge_combine
    ),
    Target(
        "reference.combine_embedding",
        fk.reference.combine_embedding,
        partial(draw_embedding, combine=True),
        judge_combine,
    ),
    Target(
        "reference.combine_rows", fk.reference.combine_rows, partial(draw_rows, combine=True), judge_combine
    ),
    Target("reference.contributions", fk.reference.contributions, draw_linear, judge_rows),
    Target("reference.contributions_conv", fk.reference.contributions_conv, draw_conv, judge_rows),
    Target(
        "reference.contributions_embedding",
        fk.reference.contributions_embedding,
        partial(draw_embedding, rows=True),
        judge_rows,
    ),
    Target("reference.solve", fk.reference.solve, draw_solve, partial(judge_solve, lower=False), SINGULAR),
    Target(
        "reference.coefficients", fk.reference.coefficients, draw_coefficients, judge_coefficients, SINGULAR
    ),
]
TARGETS = [*KERNELS, *REFERENCE]
