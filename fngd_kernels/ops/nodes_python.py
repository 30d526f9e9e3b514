"""The nodes of nodes.py as torch.autograd.Function: what runs where the native extension was not built."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..backends.torch import convolution
from ..backends.torch.convolution import Geometry

_EVERYTHING = torch.empty(0, device="cpu", requires_grad=True)
"""A leaf behind every captured use, and in nobody's list of inputs: asked for only where all leaves are.

It is the last tensor that a node is given.
"""


def _is_asked_for(ctx: Any, edge: int) -> bool:
    """Return whether the backward that runs now needs what a node hands to its edge-th input.

    ctx.needs_input_grad does not tell: it was settled in the forward.
    """
    node = ctx.next_functions[edge][0]
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that autograd.grad was asked for
        return True


def _received(ctx: Any, first: int, a: Any, e: Tensor, biased: bool) -> tuple[Tensor | None, Tensor | None]:
    """Hand a use to the sink where a parameter's gradient is asked for; return what it answers.

    first: the edge of the weight; the bias, where there is one, has the next
    """
    parameters = range(first, len(ctx.next_functions) - 1)
    if not any(_is_asked_for(ctx, edge) for edge in parameters):
        return None, None
    return ctx.sink(a, e, biased, not _is_asked_for(ctx, -1)) or (None, None)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Return s_n x_n, rounded once to x's dtype."""
    return x if scale is None else (x * scale.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast as torch's own linear and convolution do under autocast; the first tensor tells the device."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, sink: Any) -> Tensor:
    """Return x W^T + b."""
    return Linear.apply(*_autocast(x, weight, bias), scale, _everything(sink), sink, False)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, sink: Any, geometry: Geometry
) -> Tensor:
    """Return the convolution of x."""
    return Conv.apply(*_autocast(x, weight, bias), scale, None, _everything(sink), sink, geometry)


def embedding(ids: Tensor, weight: Tensor, scale: Tensor | None, sink: Any, padding_idx: int) -> Tensor:
    """Return the rows of weight that ids name."""
    return Embedding.apply(ids, weight, scale, _everything(sink), sink, padding_idx)


def rows(parameter: Tensor, samples: int, scale: Tensor | None, sink: Any) -> Tensor:
    """Return a copy of the parameter for every sample."""
    return Rows.apply(parameter, scale, _everything(sink), sink, samples)


def _everything(sink: Any) -> Tensor | None:
    return None if sink is None else _EVERYTHING


class Linear(Function):
    """y = x W^T + b, or its adjoint y = x W."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, everything, sink, adjoint):
        ctx.save_for_backward(x, weight, scale)
        ctx.sink, ctx.adjoint, ctx.has_bias = sink, adjoint, bias is not None
        return x @ weight if adjoint else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_x:
            following = _everything(ctx.sink), ctx.sink, not ctx.adjoint
            dx = Linear.apply(gradient, weight, None, scale, *following)
        if needs_w or needs_b:
            a, e = (gradient, x) if ctx.adjoint else (x, gradient)
            if ctx.sink is not None:
                dw, db = _received(ctx, 1, a, e, ctx.has_bias)
            else:
                e = _scaled(e, scale).flatten(0, -2)
                dw = e.T @ a.flatten(0, -2) if needs_w else None
                db = e.sum(0) if needs_b else None
        return dx, dw, db, None, None, None, None


class Conv(Function):
    """The convolution of x or, where `like` with the shape of its input is given, the adjoint."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, like, everything, sink, geometry):
        ctx.save_for_backward(x, weight, scale)
        ctx.sink, ctx.geometry, ctx.adjoint = sink, geometry, like is not None
        ctx.has_bias = bias is not None
        if like is not None:
            return convolution.input_gradient(x, like, weight, geometry)
        return convolution.forward(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_x:
            like = None if ctx.adjoint else x.detach()
            following = _everything(ctx.sink), ctx.sink, ctx.geometry
            dx = Conv.apply(gradient, weight, None, scale, like, *following)
        if needs_w or needs_b:
            a, e = (gradient, x) if ctx.adjoint else (x, gradient)
            if ctx.sink is not None:
                dw, db = _received(ctx, 1, a, e, ctx.has_bias)
            else:
                e = _scaled(e, scale)
                dw = convolution.weight_gradient(e, a, weight, ctx.geometry) if needs_w else None
                db = e.transpose(0, 1).flatten(1).sum(1) if needs_b else None
        return dx, dw, db, None, None, None, None, None


class Embedding(Function):
    """y_nt = W[ids_nt]."""

    @staticmethod
    def forward(ctx, ids, weight, scale, everything, sink, padding_idx):
        ctx.save_for_backward(ids, scale)
        ctx.sink, ctx.padding_idx, ctx.size = sink, padding_idx, weight.shape[0]
        return torch.embedding(weight, ids, padding_idx)

    @staticmethod
    def backward(ctx, gradient):
        ids, scale = ctx.saved_tensors
        if ctx.sink is not None:
            dw, _ = _received(ctx, 1, ids, gradient, False)
        else:
            e = _scaled(gradient, scale)
            # On a CPU torch by itself rounds the sum to 16 bits after every position.
            wide = e.float() if e.device.type == "cpu" and e.dtype.itemsize == 2 else e
            size, padding_idx = ctx.size, ctx.padding_idx
            dw = torch.ops.aten.embedding_dense_backward(wide, ids, size, padding_idx, False).to(e.dtype)
        return None, dw, None, None, None, None


class Rows(Function):
    """One copy of a parameter for every sample, so that its gradient arrives per sample."""

    @staticmethod
    def forward(ctx, parameter, scale, everything, sink, samples):
        ctx.save_for_backward(scale)
        ctx.sink = sink
        return parameter.unsqueeze(0).expand(samples, *parameter.shape).contiguous()

    @staticmethod
    def backward(ctx, gradient):
        (scale,) = ctx.saved_tensors
        if ctx.sink is not None:
            dw, _ = _received(ctx, 0, None, gradient, False)
        else:
            dw = _scaled(gradient, scale).sum(0)
        return dw, None, None, None, None
