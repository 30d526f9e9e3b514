"""What FNGD's operators with Triton kernels do: the layer, and the multiply-adds of their plans."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.kernels.shapes import Conv, Linear
from fngd_kernels import Plan
from fngd_kernels.geometry import ConvGeometry
from fngd_kernels.ops import choose

ARITHMETIC = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float32: "fp32"}
"""Of products, by the dtype of their factors."""


class Described(NamedTuple):
    """The layer, the algorithm and the multiply-adds of one of FNGD's operators, for how many layers."""

    layer: str
    algorithm: str = ""
    macs: Counter[str] = Counter()  # noqa: RUF012 - never changed
    layers: int = 1


def _of_plan(layer: object, plan: Plan, dtype: torch.dtype) -> Described:
    algorithm = f"{plan.algorithm} on patches" if plan.unfolded else plan.algorithm
    return Described(str(layer), algorithm, Counter({ARITHMETIC[dtype]: plan.macs}))


def _linear(a: Tensor, e: Tensor) -> Linear:
    return Linear(a.shape[1] if a.ndim == 3 else 1, a.shape[-1], e.shape[-1])


def _conv(x: Tensor, geometry: ConvGeometry) -> Conv:
    outputs, inputs, kernel, *_ = geometry.weight_shape
    return Conv(inputs, outputs, kernel, geometry.stride[0], x.shape[-1])


def _gram(a: Tensor, e: Tensor, bias: bool, workspace: int, *_: Any) -> Described:
    plan = choose.gram(tuple(a.shape), tuple(e.shape), bias, a.itemsize, workspace, True)
    return _of_plan(_linear(a, e), plan, a.dtype)


def _gram_batch(a: Sequence[Tensor], e: Sequence[Tensor], *arguments: Any) -> Described:
    one = _gram(a[0], e[0], *arguments)
    return one._replace(layers=len(a), macs=Counter({key: len(a) * macs for key, macs in one.macs.items()}))


def _gram_conv(x: Tensor, e: Tensor, *arguments: Any) -> Described:
    geometry, (bias, workspace) = ConvGeometry.from_schema(*arguments[:5]), arguments[5:7]
    plan = choose.gram_conv(tuple(x.shape), tuple(e.shape), geometry, bias, x.itemsize, workspace, True)
    return _of_plan(_conv(x, geometry), plan, x.dtype)


def _gram_embedding(ids: Tensor, e: Tensor, *_: Any) -> Described:
    n, t, d = e.shape
    macs = n * (n + 1) // 2 * t * t * d
    # float32 is multiplied in three terms of tf32.
    work = Counter(tf32=3 * macs) if e.dtype == torch.float32 else Counter({ARITHMETIC[e.dtype]: macs})
    return Described(f"embedding T={t} D={d}", "pairs of equal ids", work)


def _combine(a: Tensor, e: Tensor, *_: Any) -> Described:
    return Described(str(_linear(a, e)), macs=Counter({ARITHMETIC[a.dtype]: a.numel() * e.shape[-1]}))


def _combine_conv(x: Tensor, e: Tensor, s: Tensor, *geometry: Any) -> Described:
    return Described(str(_conv(x, ConvGeometry.from_schema(*geometry[:5]))))


def _combine_embedding(ids: Tensor, e: Tensor, *_: Any) -> Described:
    return Described(f"embedding T={e.shape[-2]} D={e.shape[-1]}")


def _sketch(x: Tensor, *_: Any) -> Described:
    return Described(f"sketch of {x.shape[-1]} channels")


DESCRIPTIONS: dict[str, Callable[..., Described]] = {
    "gram": _gram,
    "gram_batch": _gram_batch,
    "gram_conv": _gram_conv,
    "gram_embedding": _gram_embedding,
    "combine": _combine,
    "combine_conv": _combine_conv,
    "combine_embedding": _combine_embedding,
    "sketch": _sketch,
}
"""By operator, called with the arguments of its schema."""
