"""Random arguments: tensors of every layout, and values that have no business where they stand."""

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHER_DTYPES = (
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    -1,
    -(10**30),
    2**40,
    2**62,
    2**63,
    10**400,
    0.5,
    -0.25,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
)
OBJECTS = (
    None,
    True,
    False,
    "mean",
    "",
    b"1",
    [],
    (),
    [1, 1],
    (0, -1),
    (1, "2"),
    [0.5],
    {},
    1j,
    object(),
    np.int64(2),
)


def size(rng: random.Random) -> int:
    """Return a small size; 0 and 1 are among them."""
    return rng.choice((0, 1, 1, 2, 2, 3, 3, 4, 5, 7, 9))


def layout(rng: random.Random, tensor: Tensor) -> Tensor:
    """Return the numbers of the tensor in other strides, or other tensors of its shape that share memory."""
    dims = tensor.ndim
    kind = rng.choice(
        ("as it is", "transposed", "sliced", "channels last", "expanded", "negated", "parameter")
    )
    if kind == "transposed" and dims >= 2:
        order = rng.sample(range(dims), dims)
        return tensor.permute(order).contiguous().permute([order.index(axis) for axis in range(dims)])
    if kind == "sliced" and dims:
        memory = tensor.new_zeros([3 * length + 2 for length in tensor.shape])
        view = memory[tuple(slice(rng.randrange(3), None, 3) for _ in range(dims))]
        view = view[tuple(slice(length) for length in tensor.shape)]
        return view.copy_(tensor)
    if kind == "channels last" and dims in (4, 5):
        return tensor.contiguous(memory_format=torch.channels_last if dims == 4 else torch.channels_last_3d)
    if kind == "expanded" and dims and tensor.numel():
        axis = rng.randrange(dims)
        return tensor.narrow(axis, 0, 1).expand(tensor.shape)
    if kind == "negated" and tensor.is_floating_point() and tensor.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(tensor), tensor).conj().imag
    if kind == "parameter" and tensor.is_floating_point():
        return tensor.clone().requires_grad_()
    return tensor


def floats(rng: random.Random, *shape: int, dtype: torch.dtype) -> Tensor:
    """Return normal numbers in any layout."""
    return layout(rng, torch.randn(shape, dtype=torch.float64).to(dtype))


def wrong_value(rng: random.Random, value: Any) -> Any:
    """Return something else in place of the value: near to it, or of another kind altogether."""
    if rng.random() < 0.15:
        return rng.choice((*OBJECTS, *NUMBERS, torch.ones(3), "yes"))
    if isinstance(value, Tensor):
        return wrong_tensor(rng, value)
    if isinstance(value, bool):
        return rng.choice((not value, 0, 1, 2, "yes", None, torch.tensor(True)))
    if isinstance(value, int | float):
        return rng.choice(NUMBERS)
    if isinstance(value, str):
        return rng.choice(("mean", "trace", "raw", "tf32", "nonsense", "", value.upper()))
    if isinstance(value, list | tuple) and value:
        changed = list(value)
        kind = rng.randrange(4)
        if kind == 0:
            changed.append(rng.choice(value))
        elif kind == 1:
            changed.pop()
        else:
            at = rng.randrange(len(changed))
            changed[at] = wrong_value(rng, changed[at])
        return type(value)(changed)
    return rng.choice((*OBJECTS, *NUMBERS))


def wrong_tensor(rng: random.Random, tensor: Tensor) -> Any:
    """Return a tensor that differs in one thing."""
    kind = rng.randrange(9)
    if kind == 0:
        return tensor.detach().to(rng.choice((*FLOATING, *OTHER_DTYPES)))
    if kind == 1:
        return tensor.unsqueeze(rng.randrange(tensor.ndim + 1))
    if kind == 2 and tensor.ndim:
        return tensor.select(0, 0) if len(tensor) else tensor.flatten()
    if kind == 3 and tensor.ndim:
        axis = rng.randrange(tensor.ndim)
        return torch.cat((tensor, tensor), axis) if rng.random() < 0.5 else tensor.narrow(axis, 0, 0)
    if kind == 4:
        return tensor.detach().to("meta")
    if kind == 5 and tensor.ndim and tensor.dtype in FLOATING:
        return tensor.detach().to_sparse()
    if kind == 6:
        changed = tensor.detach().clone(memory_format=torch.contiguous_format)
        if changed.numel():
            changed.view(-1)[rng.randrange(changed.numel())] = (
                rng.choice((-1, 10**6, 2**31 - 1))
                if not (changed.is_floating_point())
                else rng.choice((math.nan, math.inf, -math.inf, 1e4))
            )
        return changed
    if kind == 7:
        return tensor.detach().resolve_neg().numpy() if tensor.dtype == torch.float64 else tensor.tolist()
    return tensor.transpose(0, -1) if tensor.ndim else tensor
