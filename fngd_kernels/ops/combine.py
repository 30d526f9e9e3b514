"""The weighted gradient of a linear layer.

All weighted gradients of this package are sums sum_n s_n C_n, computed without forming any C_n. With s = 1
each function returns the ordinary gradient of the layer's parameters. The result has the dtype of the inputs.
It is not differentiable; `fngd_kernels.reference` is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks
from ..arguments import flag
from ..backends.torch.combine import weighted_gradients
from . import choose, devices
from .registration import call, register
from .scale_bias import scale_bias


def _torch(a: Tensor, e: Tensor, s: Tensor, bias: bool) -> list[Tensor]:
    return [sums for sums in weighted_gradients(a, e, s, True, bias) if sums is not None]


def _one_pass(a: Tensor, e: Tensor, s: Tensor, bias: bool) -> list[Tensor]:
    """Scale e and sum it for the bias in one pass, then take the library's product."""
    scaled, bias_gradient = scale_bias(e, s, e.ndim - 1, True, bias)
    weight, _ = weighted_gradients(a, scaled, None, True, False)
    return [sums for sums in (weight, bias_gradient) if sums is not None]


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], list[Tensor]]] = {
    "torch": _torch,
    "one pass": _one_pass,
}


def combine(a: Tensor, e: Tensor, s: Tensor, *, bias: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Return the weighted gradient of a linear layer.

    W = sum_n s_n E_n^T A_n, b = sum_n s_n sum_t E_nt

    Source: the natural gradient as a weighted sum, Ou et al. 2024 (arXiv 2403.03473).

    Args:
        a: (N,I) or (N,T,I) float, layer input.
        e: (N,O) or (N,T,O) float of a's dtype, gradient at the layer output.
        s: (N,) float, coefficients.
        bias: Whether to return b as well.

    Returns:
        W, (O,I); with bias the pair of W and b (O,).

    Raises:
        ValueError: Shapes or devices do not fit.
        TypeError: Dtypes do not fit, or an argument has the wrong type.
    """
    checks.check_linear(a, e)
    flag("bias", bias)
    checks.check_coefficients(s, "a", a)
    sums = call(torch.ops.fngd.combine.default, a, e, s, bias)
    return (sums[0], sums[1]) if bias else sums[0]


def _combine(a: Tensor, e: Tensor, s: Tensor, bias: bool) -> list[Tensor]:
    return IMPLEMENTATIONS[choose.combine(devices.triton_serves(a, e))](a, e, s, bias)


def _fake(a: Tensor, e: Tensor, s: Tensor, bias: bool) -> list[Tensor]:
    outputs = e.shape[-1]
    return [a.new_empty((outputs, a.shape[-1])), *([e.new_empty(outputs)] if bias else [])]


register("combine(Tensor a, Tensor e, Tensor s, bool bias) -> Tensor[]", _combine, _fake)
