"""From Gram matrices to the coefficient of every sample: one damped solve per layer."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks, native
from ..backends.torch.coefficients import coefficients as torch_coefficients
from ..damping import MODES, alpha_beta
from . import choose
from .registration import call, register

DAMPING_MODES = MODES
NORMALIZATIONS = checks.NORMALIZATIONS

IMPLEMENTATIONS: dict[str, Callable[[Tensor, float, float, str], tuple[Tensor, Tensor]]] = {
    "torch": torch_coefficients,
    "native": lambda k, alpha, beta, normalize: native.extension.coefficients(k, alpha, beta, normalize),
}


def coefficients(
    k: Tensor, damping: float, damping_mode: str = "trace", normalize: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Return the coefficients s of the samples in the natural gradient sum_n s_n C_n, one row per layer.

    With g_n = N C_n and F = (1/N) sum_n g_n g_n^T, (F + lam I)^-1 gbar = sum_n v_n C_n, (lam I + N K) v = 1.
    s is v up to scale: `mean` v / mean(v); `lambda` lam v; `raw` v; `graft` v of the plain gradient's length.

    Source: Ou et al. 2024 (arXiv 2403.03473), Sherman-Morrison-Woodbury in push-through form.

    Args:
        k: (L, N, N) float32 or float64, K_ij = <C_i, C_j> of each layer. The upper triangle has no influence.
        damping: lam in the unit of damping_mode, a finite number >= 0. The units are: `trace` tr(K') / N,
            `mean_eig` tr(K') / N^2, `absolute` 1, with K' = N^2 K the Gram matrix of the g_n.
        damping_mode: One of DAMPING_MODES.
        normalize: One of NORMALIZATIONS.

    Returns:
        s (L, N) in k's dtype, not differentiable, and info (L,) int32:
            0: solved.
            -r: solved after the damping was raised r times: tenfold each time, and the first time to at least
                10 N eps tr(K), which repairs what rounding made indefinite. Orders that go to torch.linalg on
                a GPU are tried only once.
        For all other values of info, s is 1:
            j <= N: the leading minor of order j of the damped matrix is not positive definite or not finite.
            N + 1: tr(K) is not positive and finite, mean(v) <= 0, or s is not finite.
            N + 2: tr(K) is zero, or below N tiny / eps, where K's elements underflow.

    Raises:
        ValueError: The shape does not fit, a number is out of range, or a name is unknown.
        TypeError: The dtype does not fit, or an argument has the wrong type.
    """
    damping = checks.check_coefficients_of(k, damping, damping_mode, normalize, "(L, N, N)")
    alpha, beta = alpha_beta(damping, damping_mode, k.shape[-1])
    return call(torch.ops.fngd.coefficients.default, k, alpha, beta, normalize)


def _coefficients(k: Tensor, alpha: float, beta: float, normalize: str) -> tuple[Tensor, Tensor]:
    name = choose.solve(k.shape[-1], k.device.type, native.serves(k))
    return IMPLEMENTATIONS[name](k, alpha, beta, normalize)


def _fake(k: Tensor, alpha: float, beta: float, normalize: str) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape[:-1]), k.new_empty(k.shape[:1], dtype=torch.int32)


register(
    "coefficients(Tensor k, float alpha, float beta, str normalize) -> (Tensor s, Tensor info)",
    _coefficients,
    _fake,
)
