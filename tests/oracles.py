"""Truths that share no code with the package: float64 gradients per sample, memory by the profiler."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_gradients(forward: Callable[..., Tensor], shapes: Sequence[tuple], x: Tensor, e: Tensor) -> Tensor:
    """Return row n = d<forward(x_n, parameters), e_n>/d parameters, for zero parameters of these shapes.

    Every layer tested is linear in its parameters, so their values do not matter.
    """
    x, e = (t.double() if t.is_floating_point() else t for t in (x, e))
    parameters = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    rows = []
    for n in range(len(x)):
        y = forward(x[n : n + 1], *parameters)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(y, parameters, e[n : n + 1])]))
    return torch.stack(rows)


def linear_rows(a: Tensor, e: Tensor, bias: bool) -> Tensor:
    inputs, outputs = a.shape[-1], e.shape[-1]
    return sample_gradients(F.linear, [(outputs, inputs), (outputs,)][: 1 + bias], a, e)


def conv_rows(x: Tensor, e: Tensor, weight_shape: tuple, bias: bool, **geometry) -> Tensor:
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(weight_shape) - 3]

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return convolution(x, weight, bias, **geometry)

    return sample_gradients(forward, [weight_shape, weight_shape[:1]][: 1 + bias], x, e)


def embedding_rows(ids: Tensor, e: Tensor, num_embeddings: int, padding_idx: int | None) -> Tensor:
    def forward(ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight, padding_idx)

    return sample_gradients(forward, [(num_embeddings, e.shape[-1])], ids, e)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest deviation over the largest expected value; NaN anywhere gives NaN."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny))


def sketch_matrix(channels: int, size: int, seed: int, side: int, groups: int = 1) -> Tensor:
    """Return the signs (groups, channels / groups, size) of a sketch, as they are written down: splitmix64
    gives the key of a side, the last steps of MurmurHash3 the signs of its channels.
    """
    if channels // groups <= size:
        return torch.eye(channels // groups, dtype=torch.float64).expand(groups, -1, -1)
    x = (3 * seed + side + 1) * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    key = ((x ^ x >> 27) * 0x94D049BB133111EB % 2**64) >> 33
    matrix = torch.zeros(groups, channels // groups, size, dtype=torch.float64)
    for channel in range(channels):
        x = (channel * 0x9E3779B1 + key) % 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        group, number = divmod(channel, channels // groups)
        matrix[group, number, number % size] = 1 - 2 * (x >> 31)
    return matrix


def peak_allocation(run: Callable[[], object]) -> int:
    """Return the most bytes that tensors made by `run` held at one time on the CPU."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    held = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def solved(opt):
    """Return the coefficients (N,) of every block in its last solve, in the order of the table's rows."""
    return [opt._report.last_coefficients[block] for block in opt._preconditioner.blocks]
