"""Cases of convolutions."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import fngd_kernels as fk
from bench.kernels import plain
from bench.kernels.case import Case, Contender, Inputs, Setting
from bench.kernels.roofline import Work
from bench.kernels.shapes import Conv
from fngd_kernels.geometry import ConvGeometry
from fngd_kernels.ops.scale_bias import scale_bias

LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}


def conv_cases(setting: Setting, layer: Conv) -> Iterator[Case]:
    """Yield the Gram matrix, the scaled output gradient and the weighted gradient, each in both layouts."""
    for layout in LAYOUTS:
        yield from _layout_cases(setting, layer, layout)


def _layout_cases(setting: Setting, layer: Conv, layout: str) -> Iterator[Case]:
    n, name = setting.batch, f"{layer} {layout}"

    def inputs() -> tuple[Tensor, ...]:
        x = setting.random(n, layer.inputs, layer.image, layer.image)
        e = setting.random(n, layer.outputs, layer.space, layer.space)
        return x.to(memory_format=LAYOUTS[layout]), e.to(memory_format=LAYOUTS[layout])

    elements_x = n * layer.inputs * layer.image**2
    elements_e = n * layer.outputs * layer.space**2
    moved = (elements_x + elements_e) * setting.dtype.itemsize
    yield _gram(setting, layer, name, inputs, moved)
    yield _scale_bias(setting, name, inputs, 2 * elements_e * setting.dtype.itemsize)
    yield _combine(setting, layer, name, inputs, moved)


def _gram(setting: Setting, layer: Conv, name: str, inputs: Inputs, moved: int) -> Case:
    n = setting.batch
    positions, columns = layer.space**2, layer.weights // layer.outputs
    pairs = n * n // 2 * positions**2 * (columns + layer.outputs)
    explicit = n * positions * layer.weights + n * n // 2 * layer.weights
    work = Work(((min(pairs, explicit), setting.arithmetic),), moved + 4 * n * n)

    def unfolded(x: Tensor, e: Tensor) -> Tensor:
        return plain.gram_conv(x, e, layer, False)

    def gram(x: Tensor, e: Tensor) -> Tensor:
        return fk.gram_conv(x, e, layer.weight_shape, stride=layer.stride, padding=layer.padding)

    contenders = {"fngd": Contender(gram, work), "plain unfold": Contender(unfolded, work, "plain")}
    if setting.fused:
        from fngd_kernels.backends.triton.gram_explicit import gram_conv_explicit

        stride, padding = (layer.stride,) * 2, (layer.padding,) * 2
        geometry = ConvGeometry(layer.weight_shape, stride, padding, (1, 1), 1)
        formed = Work(((explicit, setting.arithmetic),), moved + 4 * n * n)
        run = partial(gram_conv_explicit, geometry=geometry, bias=False)
        contenders["fused explicit"] = Contender(run, formed)
    return setting.case("gram_conv", name, inputs, unfolded, contenders)


def _scale_bias(setting: Setting, name: str, inputs: Inputs, moved: int) -> Case:
    work = Work((), moved)
    contenders = {
        "fngd": Contender(lambda e, s: scale_bias(e, s, 1, True, True), work),
        "plain": Contender(plain.scale_bias, work, "plain"),
    }
    return setting.case(
        "scale_bias", name, lambda: (inputs()[1], setting.coefficients()), plain.scale_bias, contenders
    )


def _combine(setting: Setting, layer: Conv, name: str, inputs: Inputs, moved: int) -> Case:
    macs = setting.batch * layer.space**2 * layer.weights
    work = Work(((macs, setting.arithmetic),), moved + layer.weights * setting.dtype.itemsize)

    def scaled(x: Tensor, e: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        return plain.unweighted_conv(x, plain.scale_bias(e, s)[0], layer, True)

    def combine(x: Tensor, e: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = fk.combine_conv(
            x, e, s, layer.weight_shape, stride=layer.stride, padding=layer.padding, bias=True
        )
        return weight, bias

    contenders = {
        "fngd": Contender(combine, work),
        "plain scaled": Contender(scaled, work, "plain"),
        "plain unweighted": Contender(
            lambda x, e, s: plain.unweighted_conv(x, e, layer, True), work, "unweighted"
        ),
    }
    return setting.case("combine_conv", name, lambda: (*inputs(), setting.coefficients()), scaled, contenders)
