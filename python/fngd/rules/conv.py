"""Convolutions and transposed ones: C_n is the weight gradient of sample n's own convolution."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fngd_kernels as fk
from fngd_kernels.ops import nodes
from fngd_kernels.ops.contributions_conv import contributions_conv
from fngd_kernels.ops.nodes import Gradients, UseHandler

from ..torch_private import (
    computes_own_convolution,
    convolution_without_bias,
    output_padding,
    padding_around,
)
from .base import Rule, Use, added, bias_contributions, biased, combined_bias, pair, with_bias


class ConvRule(Rule):
    """Convolutions with any stride, dilation, groups and padding mode; output pixels are positions."""

    name = "conv"
    channel = 1
    """The dimension of the output that the bias belongs to."""

    def reason_against(self, module: Any) -> str | None:
        if computes_own_convolution(module):
            return f"{type(module).__name__} computes its own convolution"
        return None

    def batched(self, module: Any, x: Tensor) -> bool:
        return x.ndim == len(module.kernel_size) + 2

    def forward(
        self, module: Any, x: Tensor, coefficients: Tensor | None, on_use: UseHandler | None
    ) -> Tensor:
        before, _ = split_padding(module)
        if before is not None:
            x = F.pad(x, before, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        return nodes.conv(x, module.weight, module.bias, coefficients, on_use, **geometry(module))

    def without_bias(self, module: Any, x: Tensor) -> Tensor:
        """Return torch's own output, without the bias."""
        return convolution_without_bias(module, x)

    def gram(self, module: Any, uses: Sequence[Use], sketch: fk.Sketch | None = None) -> Tensor:
        if len(uses) == 1:
            (use,) = uses
            some = bool(biased(module, uses))
            options = geometry(module)
            return fk.gram_conv(use.a, use.e, module.weight.shape, bias=some, sketch=sketch, **options)
        # A sample's contributions are summed over the uses before the inner product, cross terms included.
        weight, bias = self.contributions(module, uses)
        assert weight is not None
        return with_bias(fk.gram_rows(weight, sketch=sketch), bias, sketch)

    def contributions(self, module: Any, uses: Sequence[Use]) -> Gradients:
        shape, options = module.weight.shape, geometry(module)
        weight = [contributions_conv(use.a, use.e, shape, **options) for use in uses]
        return torch.stack(weight).sum(0), bias_contributions(module, uses, self.channel)

    def combine(self, module: Any, uses: Sequence[Use], s: Tensor) -> Gradients:
        shape, options = module.weight.shape, geometry(module)
        parts = [
            pair(fk.combine_conv(use.a, use.e, s, shape, bias=bool(biased(module, [use])), **options))
            for use in uses
        ]
        weight, bias_gradient = added(parts)
        return weight, bias_gradient


class ConvTransposeRule(ConvRule):
    """Transposed convolutions: their weight sees a convolution from output gradient to input."""

    name = "conv_transpose"

    def reason_against(self, module: Any) -> str | None:
        if any(p >= s for p, s in zip(module.output_padding, module.stride, strict=True)):
            return f"{type(module).__name__} with output_padding of its stride or more"
        return None

    def forward(
        self,
        module: Any,
        x: Tensor,
        coefficients: Tensor | None,
        on_use: UseHandler | None,
        output_size: list[int] | None = None,
    ) -> Tensor:
        return nodes.conv(
            x,
            module.weight,
            module.bias,
            coefficients,
            on_use,
            **geometry(module),
            transposed=True,
            output_padding=output_padding(module, x, output_size),
        )

    def without_bias(self, module: Any, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        convolution = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
        padding = module.padding, output_padding(module, x, output_size)
        return convolution(x, module.weight, None, module.stride, *padding, module.groups, module.dilation)

    def gram(self, module: Any, uses: Sequence[Use], sketch: fk.Sketch | None = None) -> Tensor:
        k = super().gram(module, _exchanged(uses), sketch)
        return with_bias(k, bias_contributions(module, uses, self.channel), sketch)

    def contributions(self, module: Any, uses: Sequence[Use]) -> Gradients:
        weight, _ = super().contributions(module, _exchanged(uses))
        return weight, bias_contributions(module, uses, self.channel)

    def combine(self, module: Any, uses: Sequence[Use], s: Tensor) -> Gradients:
        weight, _ = super().combine(module, _exchanged(uses), s)
        return weight, combined_bias(bias_contributions(module, uses, self.channel), s)


def _exchanged(uses: Sequence[Use]) -> list[Use]:
    """Return the uses of the convolution of which the transposed one is the input gradient."""
    return [Use(use.e, use.a, False) for use in uses]


def split_padding(module: Any) -> tuple[list[int] | None, tuple[int, ...]]:
    """Return F.pad's argument for what is padded beforehand, or None, and the convolution's own padding."""
    if module.padding_mode == "zeros" and isinstance(module.padding, tuple):
        return None, module.padding
    nothing = (0,) * len(module.kernel_size)
    around = padding_around(module)
    if module.padding_mode != "zeros":
        return around, nothing
    if module.padding == "valid":
        return None, nothing
    if around[::2] != around[1::2]:
        return around, nothing
    return None, tuple(reversed(around[::2]))


def geometry(module: Any) -> dict[str, Any]:
    """Return how nodes.conv, fk.gram_conv and fk.combine_conv are told of the convolution."""
    _, padding = split_padding(module)
    return {"stride": module.stride, "padding": padding, "dilation": module.dilation, "groups": module.groups}
