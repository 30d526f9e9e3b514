"""Which implementation of an operator runs: one pure function for each operator that has several.

A registered operator describes its tensors to its function here and runs what is named, from a table beside
the operator; `fngd_kernels.plan` asks the same functions. Two facts about tensors come from outside, since
the functions know no tensors: `triton`, whether Triton kernels serve them (`devices.triton_serves`), and
`native`, whether the compiled extension has kernels for their device (`native.serves`).

The nodes and `found_non_finite` run in every step of a training loop, where a detour through Python would
cost some microseconds. The extension registers their kernels with torch's dispatcher itself; nothing but its
presence decides. Inside their backward, csrc/scale_bias_op.h tells whether the kernel behind `scale_bias` can
be used.
"""

from ..cost_model import plan_conv, plan_linear

NATIVE_MAX_ORDER = {"cpu": 2048, "cuda": 1024}
"""Larger matrices go to torch.linalg, which uses the whole device for one. The native kernels use one core or
one thread block for a matrix.
"""

gram = plan_linear
"""Returns a plan, which names backend and algorithm."""

gram_conv = plan_conv
"""Returns a plan, which also tells whether the convolution is treated as a linear layer on its patches."""


def gram_diag(a_shape: tuple[int, ...], e_shape: tuple[int, ...], triton: bool) -> str:
    """Return "triton", which takes pairs of positions, if that is cheaper than forming contributions."""
    positions, inputs, outputs = a_shape[1] if len(a_shape) == 3 else 1, a_shape[-1], e_shape[-1]
    return "triton" if triton and positions * (inputs + outputs) < inputs * outputs else "torch"


def gram_embedding(triton: bool) -> str:
    """Return "triton" or "torch", for the Gram matrix and for its diagonal."""
    return "triton" if triton else "torch"


def combine(triton: bool) -> str:
    """Return "one pass", which scales e and sums the bias in one pass over e, or "torch"."""
    return "one pass" if triton else "torch"


combine_conv = combine
"""As for linear layers."""


def combine_embedding(triton: bool) -> str:
    """Return "triton" or "torch"."""
    return "triton" if triton else "torch"


def scale_bias(native: bool) -> str:
    """Return "native" or "torch"."""
    return "native" if native else "torch"


def sketch(triton: bool) -> str:
    """Return "triton" or "torch"."""
    return "triton" if triton else "torch"


def solve(order: int, device: str, native: bool) -> str:
    """Return "native" or "torch", for a solve and for coefficients of matrices of this order."""
    return "native" if native and order <= NATIVE_MAX_ORDER.get(device, 0) else "torch"


def node(native: bool) -> str:
    """Return "native", nodes of the extension, or "python", nodes that are torch.autograd.Functions."""
    return "native" if native else "python"
