"""The Gram matrix of a convolution's contributions, and its diagonal; properties as in `gram`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import checks
from ..arguments import flag
from ..backends.torch.gram_conv_explicit import gram_conv_explicit
from ..backends.torch.gram_conv_pairs import gram_conv_pairs
from ..backends.torch.patches import channels_last, patches
from ..backends.torch.squared_norms import conv_norms
from ..backends.triton.costs import WIDE_CHANNELS
from ..geometry import ConvGeometry
from ..plans import Plan
from ..sketch import INPUTS, OUTPUTS, Sketch, as_sketch, sketched_geometry
from . import choose, devices, gram
from .registration import GEOMETRY, call, register, with_geometry
from .sketch import sketched_images

Implementation = Callable[[Tensor, Tensor, ConvGeometry, bool, Plan, int, str | None], Tensor]

IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {
    ("torch", "pairs"): lambda x, e, geometry, bias, plan, *_: gram_conv_pairs(x, e, geometry, bias, plan),
    ("torch", "explicit"): lambda x, e, geometry, bias, plan, *_: gram_conv_explicit(
        x, e, geometry, bias, plan
    ),
}
"""By backend and algorithm of a plan, unless it treats the convolution as a linear layer."""


def gram_conv(
    x: Tensor,
    e: Tensor,
    weight_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
    diag: bool = False,
    workspace: int | None = None,
    precision: str | None = None,
    sketch: int | Sketch | None = None,
) -> Tensor:
    """Return the Gram matrix of a 1-3 d convolution's contributions, without a patch tensor.

    K_ij = <E_i^T P_i, E_j^T P_j> + bias <sum_p E_ip, sum_p E_jp>, with P_n the patches of sample n

    Source: the Gram form of the empirical Fisher, Ou et al. 2024 (arXiv 2403.03473).

    Args:
        x: (N,C,*space) float, layer input, in any memory format.
        e: (N,O,*space_out) float of x's dtype, gradient at the layer output.
        weight_shape: (O,C/groups,*kernel).
        stride: As in torch.conv2d.
        padding: As in torch.conv2d, with zeros.
        dilation: As in torch.conv2d.
        groups: As in torch.conv2d.
        bias: Whether the bias belongs to the block.
        diag: Whether to return only the diagonal, the squared norms ||C_n||^2.
        workspace: Upper bound of scratch memory in bytes, by default 64 MiB.
        precision: How float32 is multiplied on a GPU: "ieee", "tf32" or "tf32x3"; by default what
            torch.backends.cudnn.conv.fp32_precision says. Otherwise as in `gram`.
        sketch: A Sketch, or its size alone, to compress both sides of the contributions,
            within each group; None for the exact K.

    Returns:
        K, (N,N) float32 or float64; with diag (N,).

    Raises:
        ValueError: Shapes or devices do not fit, or a number is out of range.
        TypeError: Dtypes do not fit, or an argument has the wrong type.
    """
    geometry = checks.check_conv(x, e, weight_shape, stride, padding, dilation, groups)
    flag("bias", bias)
    flag("diag", diag)
    workspace = checks.workspace_bytes(workspace)
    checks.check_precision(precision)
    if (sketch := as_sketch(sketch)) is not None:
        x = sketched_images(x, INPUTS, sketch, geometry.groups)
        e = sketched_images(e, OUTPUTS, sketch, geometry.groups)
        geometry = sketched_geometry(geometry, sketch)
    op = torch.ops.fngd.gram_conv_diag if diag else torch.ops.fngd.gram_conv
    return call(op.default, x, e, *geometry, bias, workspace, precision)


@with_geometry(2)
def _gram_conv(
    x: Tensor,
    e: Tensor,
    geometry: ConvGeometry,
    bias: bool,
    workspace: int,
    precision: str | None = None,
) -> Tensor:
    if not x.shape[0]:
        return gram.empty_gram(x)
    triton = devices.triton_serves(x, e)
    plan = choose.gram_conv(tuple(x.shape), tuple(e.shape), geometry, bias, x.itemsize, workspace, triton)
    if triton:
        x, e, workspace = _for_wide_loads(x, e, geometry.groups, workspace)
        precision = precision or _library_precision(x.dtype)
    if plan.unfolded:
        run = gram.IMPLEMENTATIONS[plan.backend, plan.algorithm]
        return run(patches(x, geometry), e.flatten(2).mT, bias, plan, workspace, precision)
    return IMPLEMENTATIONS[plan.backend, plan.algorithm](x, e, geometry, bias, plan, workspace, precision)


def _for_wide_loads(x: Tensor, e: Tensor, groups: int, workspace: int) -> tuple[Tensor, Tensor, int]:
    """Return both with neighbouring channels, where they have many and copies fit, and the workspace left."""
    wide, left = [], workspace
    for t in (x, e):
        if t.stride(1) != 1 and t.shape[1] // groups >= WIDE_CHANNELS and t.nbytes <= workspace // 4:
            t, left = channels_last(t), left - t.nbytes
        wide.append(t)
    return wide[0], wide[1], left


def _library_precision(dtype: torch.dtype) -> str | None:
    """Return how float32 is multiplied in convolutions, as torch was told for its own."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return devices.float32_precision(convolutions) if dtype == torch.float32 else None


@with_geometry(2)
def _gram_conv_diag(
    x: Tensor,
    e: Tensor,
    geometry: ConvGeometry,
    bias: bool,
    workspace: int,
    precision: str | None = None,
) -> Tensor:
    if not x.shape[0]:
        return gram.empty_diagonal(x)
    return conv_norms(x, e, geometry, bias, workspace)


register(
    f"gram_conv(Tensor x, Tensor e, {GEOMETRY}, bool bias, int workspace, str? precision=None) -> Tensor",
    _gram_conv,
    gram.empty_gram,
)
register(
    f"gram_conv_diag(Tensor x, Tensor e, {GEOMETRY}, bool bias, int workspace, str? precision=None) "
    "-> Tensor",
    _gram_conv_diag,
    gram.empty_diagonal,
)
