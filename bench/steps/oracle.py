"""What samples contribute to a layer's gradient, in float64, by formulas that share no code with FNGD."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def contributions(layer: nn.Module, a: Tensor, e: Tensor) -> dict[str, Tensor]:
    """Return each sample's share (N, *shape) of the gradient of every parameter, in float64.

    Args:
        layer: Linear, two-dimensional convolution without groups, embedding, LayerNorm, or BatchNorm
            in training.
        a: Its input; e: the gradient of the loss at its output. Both axes of samples come first.

    A share is the gradient of <output, e> of that sample; behind BatchNorm the normalisation, which couples
    the samples and has no parameters, counts as given.

    Raises:
        TypeError: Another layer.
    """
    a, e = (t.double() if t.is_floating_point() else t for t in (a, e))
    shape = len(a), *layer.get_parameter("weight").shape
    if isinstance(layer, nn.Linear):
        rows, columns = (t.reshape(len(t), -1, t.shape[-1]) for t in (e, a))
        weight, bias = rows.mT @ columns, rows.sum(1)
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1 and isinstance(layer.padding, tuple):
        patches = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = e.flatten(2)
        weight, bias = rows @ patches.mT, rows.sum(2)
    elif isinstance(layer, nn.Embedding):
        rows = e.new_zeros(len(a) * len(layer.weight), e.shape[-1])
        first = torch.arange(len(a), device=a.device).unsqueeze(1) * len(layer.weight)
        weight, bias = rows.index_add_(0, (first + a).flatten(), e.flatten(0, 1)), None
    elif isinstance(layer, nn.LayerNorm):
        normalised = F.layer_norm(a, layer.normalized_shape, eps=layer.eps)
        rows, columns = (t.reshape(len(t), -1, *layer.normalized_shape) for t in (e, normalised))
        weight, bias = (rows * columns).sum(1), rows.sum(1)
    elif isinstance(layer, nn.BatchNorm2d):
        normalised = F.batch_norm(a, None, None, training=True, eps=layer.eps)
        weight, bias = (e * normalised).sum((2, 3)), e.sum((2, 3))
    else:
        raise TypeError(f"layer: expected one that the oracle has a formula for, got {layer}")
    parts = {"weight": weight.view(shape)}
    if bias is not None and getattr(layer, "bias", None) is not None:
        parts["bias"] = bias
    return parts


def gram(parts: dict[str, Tensor]) -> Tensor:
    """Return K (N,N) of the contributions, K_ij = sum over parameters of <C_i, C_j>."""
    rows = [part.flatten(1) for part in parts.values()]
    return sum((r @ r.T for r in rows), start=torch.zeros((), dtype=torch.float64, device=rows[0].device))


def coefficients(k: Tensor, damping: float) -> Tensor:
    """Solve (damping tr(F) I + F) v = 1 with F = N K, F_ij = <g_i, g_j> / N and g_n = N C_n; v / mean(v)."""
    fisher = len(k) * k
    fisher.diagonal().add_(damping * fisher.trace())
    v = torch.linalg.solve(fisher, fisher.new_ones(len(k)))
    return v / v.mean()
