"""The nodes of nodes.py as torch.autograd.Function: what runs where the native extension was not built.

They differ from the native ones in one point: Python cannot tell whether a gradient is really asked for, so a
sink is also called by an autograd.grad that asks for input gradients only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Return s_n x_n, rounded once to x's dtype."""
    return x if scale is None else (x * scale.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast as torch's own linear and convolution do under autocast; the first tensor tells the device."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


class Linear(Function):
    """y = x W^T + b, or its adjoint y = x W."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, sink, adjoint):
        ctx.save_for_backward(x, weight, scale)
        ctx.sink, ctx.adjoint, ctx.has_bias = sink, adjoint, bias is not None
        return x @ weight if adjoint else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_x:
            dx = Linear.apply(gradient, weight, None, scale, ctx.sink, not ctx.adjoint)
        if needs_w or needs_b:
            a, e = (gradient, x) if ctx.adjoint else (x, gradient)
            if ctx.sink is not None:
                dw, db = ctx.sink(a, e, ctx.has_bias, False) or (None, None)
            else:
                e = scaled(e, scale).flatten(0, -2)
                dw = e.T @ a.flatten(0, -2) if needs_w else None
                db = e.sum(0) if needs_b else None
        return dx, dw, db, None, None, None


class Conv(Function):
    """The convolution of x or, where `like` with the shape of its input is given, the adjoint."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, sink, geometry, like):
        ctx.save_for_backward(x, weight, scale)
        ctx.sink, ctx.geometry, ctx.adjoint = sink, geometry, like is not None
        ctx.has_bias = bias is not None
        if like is not None:
            return _conv_backward(x, like, weight, geometry, 0)
        stride, padding, dilation, groups, transposed, output_padding = geometry
        return torch.convolution(
            x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_x:
            like = None if ctx.adjoint else x.detach()
            dx = Conv.apply(gradient, weight, None, scale, ctx.sink, ctx.geometry, like)
        if needs_w or needs_b:
            a, e = (gradient, x) if ctx.adjoint else (x, gradient)
            if ctx.sink is not None:
                dw, db = ctx.sink(a, e, ctx.has_bias, False) or (None, None)
            else:
                e = scaled(e, scale)
                dw = _conv_backward(e, a, weight, ctx.geometry, 1) if needs_w else None
                db = e.transpose(0, 1).flatten(1).sum(1) if needs_b else None
        return dx, dw, db, None, None, None, None


def _conv_backward(e, x, weight, geometry, which):
    """Return the gradient of the convolution's input (which = 0) or weight (which = 1)."""
    stride, padding, dilation, groups, transposed, output_padding = geometry
    mask = [which == 0, which == 1, False]
    if which == 1 and x.dtype == torch.bfloat16 and x.device.type == "cpu":  # see conv_weight_gradient
        e, x, weight = e.contiguous(), x.contiguous(), weight.contiguous()
    return torch.ops.aten.convolution_backward(
        e, x, weight, None, stride, padding, dilation, transposed, output_padding, groups, mask
    )[which]


class Embedding(Function):
    """y_nt = W[ids_nt]."""

    @staticmethod
    def forward(ctx, ids, weight, scale, sink, padding_idx):
        ctx.save_for_backward(ids, scale)
        ctx.sink, ctx.padding_idx, ctx.size = sink, padding_idx, weight.shape[0]
        return torch.embedding(weight, ids, padding_idx)

    @staticmethod
    def backward(ctx, gradient):
        ids, scale = ctx.saved_tensors
        if ctx.sink is not None:
            dw = (ctx.sink(ids, gradient, False, False) or (None, None))[0]
        else:
            dw = torch.ops.aten.embedding_dense_backward(
                scaled(gradient, scale), ids, ctx.size, ctx.padding_idx, False
            )
        return None, dw, None, None, None


class Rows(Function):
    """One copy of a parameter for every sample, so that its gradient arrives per sample."""

    @staticmethod
    def forward(ctx, parameter, samples, scale, sink):
        ctx.save_for_backward(scale)
        ctx.sink = sink
        return parameter.unsqueeze(0).expand(samples, *parameter.shape).contiguous()

    @staticmethod
    def backward(ctx, gradient):
        (scale,) = ctx.saved_tensors
        if ctx.sink is not None:
            dw = (ctx.sink(None, gradient, False, False) or (None, None))[0]
        else:
            dw = scaled(gradient, scale).sum(0)
        return dw, None, None, None
