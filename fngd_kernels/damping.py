"""The damping of a Gram matrix as two numbers; standard library only.

The coefficients solve (lam I + N K) v = 1. Divided by N and by tr(K), what is added to the diagonal of
K / tr(K) is alpha + beta / tr(K): `alpha` damps in proportion to the trace, `beta` by a constant.
"""

from collections.abc import Callable

_MODES: dict[str, Callable[[float, int], tuple[float, float]]] = {
    # With K' = N^2 K, the Gram matrix of the per-sample gradients: lam = damping * tr(K') / N.
    "trace": lambda damping, samples: (damping, 0.0),
    # lam = damping * tr(K') / N^2.
    "mean_eig": lambda damping, samples: (damping / samples, 0.0),
    # lam = damping.
    "absolute": lambda damping, samples: (0.0, damping / samples),
}

MODES = tuple(_MODES)


def alpha_beta(damping: float, mode: str, samples: int) -> tuple[float, float]:
    """Return alpha and beta of a damping in one of the MODES, for the Gram matrix of `samples` samples."""
    return _MODES[mode](damping, max(samples, 1))
