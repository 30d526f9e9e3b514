"""The nodes of nodes.py as torch.autograd.Function, for when the native extension was not built."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..backends.torch import convolution
from ..backends.torch.combine import weighted_gradients
from ..backends.torch.convolution import ConvolutionArguments
from ..backends.torch.scaling import scaled
from ..torch_private import will_execute

_EVERYTHING = torch.empty(0, dtype=torch.float32, device="cpu", requires_grad=True)
"""The last tensor of every node that has a handler: a leaf whose gradient nobody asks for by name.

Its gradient is needed only if those of all leaves are, so it tells whether .grad is wanted or some gradients
only.
"""


def _is_needed(ctx: Any, edge: int) -> bool:
    """Return whether the backward that runs now needs the gradient of the node's input number `edge`.

    ctx.needs_input_grad does not tell: it was decided in the forward.
    """
    node = ctx.next_functions[edge][0]
    return node is not None and will_execute(node)


def _told_of_use(
    ctx: Any, first: int, a: Any, e: Tensor, biased: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Tell the handler of a use if a parameter's gradient is needed, and return its answer.

    Args:
        ctx: Context of the node.
        first: Number of the weight among the node's inputs; the bias, if there is one, is the next.
        a: First factor of the contributions.
        e: Second factor of the contributions.
        biased: Whether the bias takes part.
    """
    parameters = range(first, len(ctx.next_functions) - 1)
    if not any(_is_needed(ctx, edge) for edge in parameters):
        return None, None
    return ctx.on_use(a, e, biased, not _is_needed(ctx, -1)) or (None, None)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast as torch's own linear and convolution do under autocast; the first tensor tells the device."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, coefficients: Tensor | None, on_use: Any
) -> Tensor:
    """Return x W^T + b."""
    return Linear.apply(*_autocast(x, weight, bias), coefficients, _everything(on_use), on_use, False)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor | None,
    on_use: Any,
    arguments: ConvolutionArguments,
) -> Tensor:
    """Return the convolution of x."""
    return Conv.apply(*_autocast(x, weight, bias), coefficients, None, _everything(on_use), on_use, arguments)


def embedding(
    ids: Tensor, weight: Tensor, coefficients: Tensor | None, on_use: Any, padding_idx: int
) -> Tensor:
    """Return the rows of weight that ids name."""
    return Embedding.apply(ids, weight, coefficients, _everything(on_use), on_use, padding_idx)


def rows(parameter: Tensor, samples: int, coefficients: Tensor | None, on_use: Any) -> Tensor:
    """Return a copy of the parameter for every sample."""
    return Rows.apply(parameter, coefficients, _everything(on_use), on_use, samples)


def _everything(on_use: Any) -> Tensor | None:
    return None if on_use is None else _EVERYTHING


def _inside_backward(node: type[Function], *arguments: Any) -> Tensor:
    """Run a node in another one's backward; without a graph there is none, and vmap takes no such node."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return node.apply(*arguments)  # type: ignore[no-untyped-call]
    return node.forward(SimpleNamespace(save_for_backward=lambda *tensors: None), *arguments)


class Linear(Function):
    """y = x W^T + b, or its adjoint y = x W."""

    @staticmethod
    def forward(ctx, x, weight, bias, coefficients, everything, on_use, adjoint):
        ctx.save_for_backward(x, weight, coefficients)
        ctx.on_use, ctx.adjoint, ctx.has_bias = on_use, adjoint, bias is not None
        return x @ weight if adjoint else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, coefficients = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_x:
            following = _everything(ctx.on_use), ctx.on_use, not ctx.adjoint
            dx = _inside_backward(Linear, gradient, weight, None, coefficients, *following)
        if needs_w or needs_b:
            a, e = (gradient, x) if ctx.adjoint else (x, gradient)
            if ctx.on_use is not None:
                dw, db = _told_of_use(ctx, 1, a, e, ctx.has_bias)
            else:
                dw, db = weighted_gradients(a, e, coefficients, needs_w, needs_b)
        return dx, dw, db, None, None, None, None


class Conv(Function):
    """The convolution of x or, where `like` with the shape of its input is given, the adjoint."""

    @staticmethod
    def forward(ctx, x, weight, bias, coefficients, like, everything, on_use, arguments):
        ctx.save_for_backward(x, weight, coefficients)
        ctx.on_use, ctx.arguments, ctx.adjoint = on_use, arguments, like is not None
        ctx.has_bias = bias is not None
        if like is not None:
            return convolution.input_gradient(x, like, weight, arguments)
        return convolution.forward(x, weight, bias, arguments)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, coefficients = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_x:
            like = None if ctx.adjoint else x.detach()
            following = _everything(ctx.on_use), ctx.on_use, ctx.arguments
            dx = _inside_backward(Conv, gradient, weight, None, coefficients, like, *following)
        if needs_w or needs_b:
            a, e = (gradient, x) if ctx.adjoint else (x, gradient)
            if ctx.on_use is not None:
                dw, db = _told_of_use(ctx, 1, a, e, ctx.has_bias)
            else:
                e = scaled(e, coefficients, e.dtype)
                dw = convolution.weight_gradient(e, a, weight, ctx.arguments) if needs_w else None
                db = e.sum((0, *range(2, e.ndim))) if needs_b else None
        return dx, dw, db, None, None, None, None, None


class Embedding(Function):
    """y_nt = W[ids_nt]."""

    @staticmethod
    def forward(ctx, ids, weight, coefficients, everything, on_use, padding_idx):
        ctx.save_for_backward(ids, coefficients)
        ctx.on_use, ctx.padding_idx, ctx.size = on_use, padding_idx, weight.shape[0]
        return torch.embedding(weight, ids, padding_idx)

    @staticmethod
    def backward(ctx, gradient):
        ids, coefficients = ctx.saved_tensors
        if ctx.on_use is not None:
            dw, _ = _told_of_use(ctx, 1, ids, gradient, False)
        else:
            e = scaled(gradient, coefficients, gradient.dtype)
            # On a CPU torch by itself rounds the sum to 16 bits after every position.
            wide = e.float() if e.device.type == "cpu" and e.dtype.itemsize == 2 else e
            size, padding_idx = ctx.size, ctx.padding_idx
            dw = torch.ops.aten.embedding_dense_backward(wide, ids, size, padding_idx, False).to(e.dtype)
        return None, dw, None, None, None, None


class Rows(Function):
    """One copy of a parameter for every sample, so that its gradient arrives per sample."""

    @staticmethod
    def forward(ctx, parameter, coefficients, everything, on_use, samples):
        ctx.save_for_backward(coefficients)
        ctx.on_use = on_use
        return parameter.unsqueeze(0).expand(samples, *parameter.shape).contiguous()

    @staticmethod
    def backward(ctx, gradient):
        (coefficients,) = ctx.saved_tensors
        if ctx.on_use is not None:
            dw, _ = _told_of_use(ctx, 0, None, gradient, False)
        else:
            dw = scaled(gradient, coefficients, gradient.dtype).sum(0)
        return dw, None, None, None, None
