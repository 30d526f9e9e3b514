"""Cases of linear layers."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import fngd_kernels as fk
from bench.kernels import plain
from bench.kernels.case import Case, Contender, Inputs, Setting
from bench.kernels.roofline import Work
from bench.kernels.shapes import Linear

DEAREST = 8
"""A Gram algorithm with more than this many times the cheapest one's multiply-adds is left out."""


def linear_cases(setting: Setting, layer: Linear) -> Iterator[Case]:
    """Yield the Gram matrix and the weighted gradient without and with bias."""
    n, t, i, o = setting.batch, layer.positions, layer.inputs, layer.outputs

    def inputs() -> tuple[Tensor, ...]:
        return setting.random(n, t, i), setting.random(n, t, o)

    moved = n * t * (i + o) * setting.dtype.itemsize
    yield _gram(setting, layer, inputs, moved + 4 * n * n)
    work = Work(((n * t * i * o, setting.arithmetic),), moved + i * o * setting.dtype.itemsize)
    for bias in (False, True):
        yield _combine(setting, layer, inputs, work, bias)


def _gram(setting: Setting, layer: Linear, inputs: Inputs, moved: int) -> Case:
    n, t, i, o = setting.batch, layer.positions, layer.inputs, layer.outputs
    half = n * n // 2
    pairs = Work(((half * t * t * (i + o), setting.arithmetic),), moved)
    explicit = Work(((n * t * i * o + half * i * o, setting.arithmetic),), moved)
    cheapest = min(pairs, explicit, key=lambda work: work.macs)

    contenders = {
        "fngd": Contender(lambda a, e: fk.gram(a, e, bias=True), cheapest),
        "plain pairs": Contender(lambda a, e: plain.gram_pairs(a, e, True), pairs, "plain"),
        "plain explicit": Contender(lambda a, e: plain.gram_explicit(a, e, True), explicit, "plain"),
    }
    if setting.fused:
        from fngd_kernels.backends.triton.gram_explicit import gram_explicit
        from fngd_kernels.backends.triton.gram_hadamard import gram_hadamard
        from fngd_kernels.backends.triton.gram_pairs import gram_pairs

        if t == 1:
            contenders["fused hadamard"] = Contender(lambda a, e: gram_hadamard(a, e, True), pairs)
        else:
            contenders["fused pairs"] = Contender(lambda a, e: gram_pairs(a, e, True), pairs)
            contenders["fused explicit"] = Contender(lambda a, e: gram_explicit(a, e, True), explicit)
    affordable = {
        name: contender
        for name, contender in contenders.items()
        if contender.work.macs <= DEAREST * cheapest.macs
    }
    return setting.case("gram", layer, inputs, lambda a, e: plain.gram_explicit(a, e, True), affordable)


def _combine(setting: Setting, layer: Linear, inputs: Inputs, work: Work, bias: bool) -> Case:
    def scaled(a: Tensor, e: Tensor, s: Tensor) -> list[Tensor]:
        return plain.combine(a, e, s, bias)

    contenders = {
        "fngd": Contender(lambda a, e, s: fk.combine(a, e, s, bias=bias), work),
        "plain scaled": Contender(scaled, work, "plain"),
        "plain unweighted": Contender(lambda a, e, s: plain.unweighted(a, e, bias), work, "unweighted"),
    }
    op = "combine with bias" if bias else "combine"
    return setting.case(op, layer, lambda: (*inputs(), setting.coefficients()), scaled, contenders)


def hadamard_case(setting: Setting, layers: Sequence[Linear]) -> Case:
    """Return the Gram matrices of all layers with one position."""
    n, columns = setting.batch, sum(layer.inputs + layer.outputs for layer in layers)
    moved = n * columns * setting.dtype.itemsize + 4 * len(layers) * n * n
    work = Work(((n * n // 2 * columns, setting.arithmetic),), moved)

    def inputs() -> tuple[Tensor, ...]:
        return tuple(setting.random(n, size) for layer in layers for size in (layer.inputs, layer.outputs))

    def one_by_one(*rows: Tensor) -> Tensor:
        return torch.stack([fk.gram(a, e, bias=True) for a, e in zip(rows[::2], rows[1::2], strict=True)])

    def plain_loop(*rows: Tensor) -> Tensor:
        return plain.gram_hadamard(list(zip(rows[::2], rows[1::2], strict=True)), True)

    contenders = {
        "fngd": Contender(one_by_one, work),
        "plain loop": Contender(plain_loop, work, "plain"),
    }
    if setting.fused:
        from fngd_kernels.backends.triton.gram_hadamard import gram_hadamard

        def fused_loop(*rows: Tensor) -> Tensor:
            layers = [t.unsqueeze(1) for t in rows]
            pairs = zip(layers[::2], layers[1::2], strict=True)
            return torch.stack([gram_hadamard(a, e, True) for a, e in pairs])

        contenders["fused loop"] = Contender(fused_loop, work)
    return setting.case("gram_hadamard", f"{len(layers)} layers", inputs, plain_loop, contenders)
