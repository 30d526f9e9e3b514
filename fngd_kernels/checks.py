"""Checks of tensors among arguments; each message names the argument, what was expected and what came."""

from typing import Any

import torch
from torch import Tensor

from .arguments import choice, convolution, integer, linear_shapes, non_negative
from .damping import MODES
from .geometry import ConvGeometry
from .workspace import default_workspace

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes that activations, gradients and coefficients may have."""

PRECISIONS = ("ieee", "tf32", "tf32x3")
"""Ways to multiply float32 on a GPU."""

NORMALIZATIONS = ("mean", "lambda", "raw", "graft")
"""Ways to scale the solution of the damped system to coefficients."""


def check_tensor(name: str, tensor: Any) -> None:
    """Require a dense tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Require a dense tensor of a supported floating dtype."""
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Require a dense tensor on the device, and with `dtype` of the dtype, of another argument."""
    check_tensor(name, tensor)
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {tensor.device}")
    if dtype and tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")


def workspace_bytes(workspace: int | None) -> int:
    """Require a number of bytes; return it, or for None the default."""
    if workspace is None:
        return default_workspace()
    return integer("workspace", workspace, 0)


def check_precision(precision: str | None) -> None:
    """Require one of the ways to multiply float32, or None."""
    if precision is not None:
        choice("precision", precision, PRECISIONS)


def check_matrices(k: Tensor, shape: str = "(..., N, N)") -> None:
    """Require square matrices k, of the shape named, of float32 or float64."""
    check_tensor("k", k)
    if k.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"k: expected float32 or float64, got {k.dtype}")
    if k.ndim < 2 or k.shape[-1] != k.shape[-2] or (k.ndim != 3 and "..." not in shape):
        raise ValueError(f"k: expected shape {shape}, got {tuple(k.shape)}")


def check_solve(k: Tensor, damping: float | Tensor, rhs: Tensor | None) -> Tensor:
    """Require a damping and a right-hand side that fit the matrices k; return the damping as a tensor."""
    check_matrices(k)
    if not isinstance(damping, Tensor):
        damping = k.new_full(k.shape[:-2], non_negative("damping", damping, torch.finfo(k.dtype).max))
    for name, tensor, shape in (("damping", damping, k.shape[:-2]), ("rhs", rhs, k.shape[:-1])):
        if tensor is not None:
            check_same(name, tensor, "k", k)
            if tensor.shape != shape:
                raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    return damping


def check_coefficients_of(
    k: Tensor, damping: float, damping_mode: str, normalize: str, shape: str = "(..., N, N)"
) -> float:
    """Require Gram matrices k and how coefficients follow from them; return the damping."""
    check_matrices(k, shape)
    choice("damping_mode", damping_mode, MODES)
    choice("normalize", normalize, NORMALIZATIONS)
    return non_negative("damping", damping, torch.finfo(k.dtype).max)


def check_linear(a: Tensor, e: Tensor) -> None:
    """Require a (N,I) and e (N,O), or a (N,T,I) and e (N,T,O)."""
    check_floating("a", a)
    check_same("e", e, "a", a)
    linear_shapes(("a", "e"), a.shape, e.shape)


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


def check_padding_idx(padding_idx: Any, ids: Tensor) -> int | None:
    """Require an id of the dtype of ids, or None; return it."""
    if padding_idx is None:
        return None
    number = integer("padding_idx", padding_idx, 0)
    if number > torch.iinfo(ids.dtype).max:
        raise ValueError(f"padding_idx: expected an id that {ids.dtype} holds, got {number}")
    return number


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


def check_conv(x: Tensor, e: Tensor, *geometry: Any) -> ConvGeometry:
    """Require x (N,C,*space) and e (N,O,*space_out) of a 1- to 3-d convolution.

    Args:
        x: Input of the convolution.
        e: Gradient at its output.
        *geometry: weight_shape, stride, padding, dilation and groups, as a caller gave them.

    Returns:
        The checked geometry.
    """
    check_floating("x", x)
    check_same("e", e, "x", x)
    return convolution(("x", "e"), x.shape, e.shape, *geometry)
