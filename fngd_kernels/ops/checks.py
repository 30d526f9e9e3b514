"""Argument checks of the public operators; each message names the argument, what was expected, what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import output_size
from ..workspace import default_workspace

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes that activations, gradients and coefficients may have."""

PRECISIONS = (None, "ieee", "tf32", "tf32x3")
"""Ways to multiply float32 on a GPU."""


def check_floating(name: str, tensor: Tensor) -> None:
    """Require a tensor of a supported floating dtype."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Require the device, and with `dtype` the dtype, of another argument."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {tensor.device}")
    if dtype and tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")


def workspace_bytes(workspace: int | None) -> int:
    """Require a number of bytes; return it, or for None the default."""
    if workspace is None:
        return default_workspace()
    if workspace < 0:
        raise ValueError(f"workspace: expected 0 bytes or more, got {workspace}")
    return workspace


def check_precision(precision: str | None) -> None:
    """Require one of the ways to multiply float32, or None."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected 'ieee', 'tf32', 'tf32x3' or None, got {precision!r}")


def check_linear(a: Tensor, e: Tensor) -> None:
    """Require a (N,I) and e (N,O), or a (N,T,I) and e (N,T,O)."""
    check_floating("a", a)
    check_same("e", e, "a", a)
    if a.ndim not in (2, 3):
        raise ValueError(f"a: expected shape (N,I) or (N,T,I), got {tuple(a.shape)}")
    if e.ndim != a.ndim or e.shape[:-1] != a.shape[:-1]:
        leading = ",".join(map(str, a.shape[:-1]))
        raise ValueError(f"e: expected shape ({leading},O) as a has {tuple(a.shape)}, got {tuple(e.shape)}")


def check_embedding(ids: Tensor, e: Tensor) -> None:
    """Require ids (N,) and e (N,D), or ids (N,T) and e (N,T,D)."""
    check_floating("e", e)
    check_same("ids", ids, "e", e, dtype=False)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected int64 or int32, got {ids.dtype}")
    if ids.ndim not in (1, 2):
        raise ValueError(f"ids: expected shape (N,) or (N,T), got {tuple(ids.shape)}")
    if e.ndim != ids.ndim + 1 or e.shape[:-1] != ids.shape:
        leading = ",".join(map(str, ids.shape))
        raise ValueError(
            f"e: expected shape ({leading},D) as ids has {tuple(ids.shape)}, got {tuple(e.shape)}"
        )


def check_rows(g: Tensor) -> None:
    """Require per-sample gradients g (N,...)."""
    check_floating("g", g)
    if g.ndim < 1:
        raise ValueError("g: expected shape (N,...), got ()")


def check_coefficients(s: Tensor, name: str, like: Tensor) -> None:
    """Require one coefficient per sample of `like`."""
    check_floating("s", s)
    check_same("s", s, name, like, dtype=False)
    if s.shape != like.shape[:1]:
        raise ValueError(f"s: expected shape ({like.shape[0]},), got {tuple(s.shape)}")


def check_conv(
    x: Tensor,
    e: Tensor,
    weight_shape: Sequence[int],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> None:
    """Require x (N,C,*space) and e (N,O,*space_out) of a 1- to 3-d convolution with that weight."""
    check_floating("x", x)
    check_same("e", e, "x", x)
    dims = len(weight_shape) - 2
    if dims not in (1, 2, 3) or min(weight_shape) < 1:
        raise ValueError(
            f"weight_shape: expected (O,C/groups,*kernel) with 1 to 3 kernel sizes, got {tuple(weight_shape)}"
        )
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != dims or min(values) < least:
            raise ValueError(f"{name}: expected an int or {dims} ints, {least} or more, got {values}")
    outputs, inputs, *kernel = weight_shape
    if groups < 1 or outputs % groups:
        raise ValueError(f"groups: expected a divisor of weight_shape[0] = {outputs}, got {groups}")
    if x.ndim != dims + 2 or x.shape[1] != inputs * groups:
        expected = f"(N,{inputs * groups}" + ",size" * dims + ")"
        raise ValueError(
            f"x: expected shape {expected} for that weight_shape and groups, got {tuple(x.shape)}"
        )
    space = tuple(map(output_size, x.shape[2:], kernel, stride, padding, dilation))
    expected_e = (x.shape[0], outputs, *space)
    if min(space) < 1:
        raise ValueError(f"x: expected space that the kernel fits into, got {tuple(x.shape)}")
    if tuple(e.shape) != expected_e:
        raise ValueError(f"e: expected shape {expected_e}, got {tuple(e.shape)}")
