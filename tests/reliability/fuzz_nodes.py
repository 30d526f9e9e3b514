"""Random calls of the autograd nodes, which stand in for torch's own layers and are held to what those do.

Where torch's function raises, the node must raise as well; otherwise values and input gradients equal torch's
in float64, and parameter gradients the weighted sum over samples, also of a derivative.
"""

import random
from collections import Counter

import torch
import torch.nn.functional as F
from fuzz_targets import draw_conv, near, size
from fuzz_values import FLOATING, floats, wrong_tensor
from torch import Tensor

from fngd_kernels.ops import nodes

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def draw_linear(rng: random.Random):
    dtype, inputs, outputs = rng.choice(FLOATING), size(rng), size(rng)
    lead = [size(rng) for _ in range(rng.choice((1, 2, 3)))]
    bias = floats(rng, outputs, dtype=dtype) if rng.random() < 0.5 else None
    return [floats(rng, *lead, inputs, dtype=dtype), floats(rng, outputs, inputs, dtype=dtype), bias], {}


def inside(given: dict) -> bool:
    """Return whether every window of the convolution reaches out of the padding."""
    axes = zip(given["weight_shape"][2:], given["padding"], given["dilation"], strict=True)
    return all(padding <= dilation * (kernel - 1) for kernel, padding, dilation in axes)


def plain_bfloat16(t: Tensor) -> Tensor:
    """Return t, bfloat16 without gaps and in order.

    The weight gradient that is the truth here, torch 2.13's own, holds unwritten memory for some layouts.
    """
    if t.dtype != torch.bfloat16:
        return t
    return torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()).requires_grad_(t.requires_grad)


def draw_convolution(rng: random.Random):
    # Torch 2.13 itself reads foreign memory on a CPU where windows lie in the padding alone.
    while not inside(given := draw_conv(rng)):
        pass
    x, shape = plain_bfloat16(given["x"]), given["weight_shape"]
    bias = floats(rng, shape[0], dtype=x.dtype) if rng.random() < 0.5 else None
    geometry = {name: given[name] for name in ("stride", "padding", "dilation", "groups")}
    return [x, plain_bfloat16(floats(rng, *shape, dtype=x.dtype)), bias], geometry


def draw_embedding(rng: random.Random):
    count, shape = rng.choice((1, 2, 5)), [size(rng) for _ in range(rng.choice((1, 2, 3)))]
    ids = torch.randint(0, count, shape, dtype=rng.choice((torch.int64, torch.int32)))
    padding_idx = rng.choice((-1, 0, count - 1))
    return [ids, floats(rng, count, size(rng), dtype=rng.choice(FLOATING))], {"padding_idx": padding_idx}


def torch_embedding(ids, weight, padding_idx):
    return F.embedding(ids, weight, padding_idx if 0 <= padding_idx < len(weight) else None)


def torch_convolution(x, weight, bias, **geometry):
    return CONVOLUTIONS.get(x.ndim - 2, F.conv2d)(x, weight, bias, **geometry)


NODES = {
    "nodes.linear": (nodes.linear, F.linear, draw_linear),
    "nodes.conv": (nodes.conv, torch_convolution, draw_convolution),
    "nodes.embedding": (nodes.embedding, torch_embedding, draw_embedding),
}


def outcome_of(function, *arguments, **geometry):
    """Return (result, None), or (None, what was raised)."""
    try:
        return function(*arguments, **geometry), None
    except Exception as error:
        return None, error


def is_layer(name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether a layer has such parameters, and x samples."""
    if name != "nodes.linear":
        return True
    parameters = [weight] if bias is None else [weight, bias]
    shapes = x.ndim > 1 and weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])
    return shapes and all(t.dtype == x.dtype and t.is_floating_point() for t in parameters)


def call(name: str, seed: int) -> str:
    """Make the call that the seed describes; return what happened, raise AssertionError for a finding."""
    node, function, draw = NODES[name]
    rng = random.Random(f"{name} {seed}")
    torch.manual_seed(rng.getrandbits(31))
    leaves, geometry = draw(rng)
    leaves = [t if t is None or not t.is_floating_point() else t.detach().requires_grad_() for t in leaves]
    wrong_scale = rng.random() < 0.1
    if not wrong_scale and rng.random() < 0.4:
        at = rng.choice([index for index, leaf in enumerate(leaves) if leaf is not None])
        changed = wrong_tensor(rng, leaves[at])
        leaves[at] = changed if isinstance(changed, Tensor) and not changed.is_sparse else leaves[at]
    samples = leaves[0].shape[:1]
    scale = torch.rand(samples, dtype=torch.float64) + 0.5
    if wrong_scale:
        scale = rng.choice((scale.repeat(2), scale.unsqueeze(0), scale[:0]))
    extra = (None,) * (3 - len(leaves)) if name != "nodes.embedding" else ()
    y, error = outcome_of(node, *leaves, *extra, scale, **geometry)
    expected, torch_error = outcome_of(function, *leaves, **geometry)
    if scale.shape != samples:
        assert isinstance(error, ValueError), f"weights of shape {tuple(scale.shape)}: {error!r}"
        assert str(error).startswith("coefficients:")
        return "ValueError"
    assert (error is None) == (torch_error is None), f"{error!r} where torch gives {torch_error!r}"
    if error is not None:
        assert isinstance(error, RuntimeError | IndexError | TypeError | ValueError)
        return f"{type(error).__name__}, as torch does"
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    if any(t is not None and t.is_meta for t in leaves):
        return "right shape on the meta device"
    if not is_layer(name, *leaves):
        return "what no layer of torch holds: no crash"
    if not y.requires_grad:
        return "right answer"
    compare(y, leaves, scale, function, geometry, rng)
    return "right answer"


def compare(y, leaves, scale, function, geometry, rng):
    """Compare the values and gradients of a node with those of torch's function in float64."""
    wide = [
        t.detach().double().requires_grad_() if t is not None and t.is_floating_point() else t for t in leaves
    ]
    if not all(t.isfinite().all() for t in wide if t is not None):
        return
    exact = function(*wide, **geometry)
    magnitude = function(
        *[t.detach().abs() if t is not None and t.is_floating_point() else t for t in wide], **geometry
    )
    near(y, exact.detach(), magnitude, y.dtype)
    e = plain_bfloat16(floats(rng, *y.shape, dtype=y.dtype)).detach()
    parameters = [index for index, t in enumerate(leaves) if t is not None and t.requires_grad]
    found = torch.autograd.grad(y, [leaves[index] for index in parameters], e)
    weights = scale.view(-1, *[1] * (y.ndim - 1))
    sizes = [t if t is None or not t.is_floating_point() else t.detach().abs().requires_grad_() for t in wide]
    bound = function(*sizes, **geometry)
    for index, gradient in zip(parameters, found, strict=True):
        weighted = e.double() if index == 0 else e.double() * weights
        (truth,) = torch.autograd.grad(exact, wide[index], weighted, retain_graph=True)
        (size_of,) = torch.autograd.grad(bound, sizes[index], weighted.abs(), retain_graph=True)
        lost = 1e-3 if y.dtype == torch.float16 else 0.0
        near(gradient, truth, size_of + lost, leaves[index].dtype)


def campaign(calls: int, seed: int) -> tuple[dict[str, Counter], list[str]]:
    """Make so many calls, in turns; return {node: {outcome: calls}}, and the findings."""
    outcomes = {name: Counter() for name in NODES}
    findings = []
    for number in range(calls):
        name = list(NODES)[number % len(NODES)]
        try:
            outcomes[name][call(name, seed + number)] += 1
        except Exception as finding:
            findings.append(f"{name}, seed {seed + number}: {type(finding).__name__}: {finding}")
    return outcomes, findings
