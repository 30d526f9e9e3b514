"""Costs of the Triton kernels; standard library only.

Costs are in multiply-adds (MACs) of bfloat16. The prices are taken from data sheets.
"""

from math import ceil

from ...plans import LayerSizes, Plan

CONTRIBUTION_PASS = 200.0
"""Cost of storing and loading one contribution in a GPU's L2 cache, in MACs."""

TF32_MAC = 2.0
"""Cost of a MAC of contributions in tf32, in MACs."""


def linear(layer: LayerSizes, itemsize: int, workspace: int) -> Plan:
    """Plan a linear layer: pairs of positions stay in registers, contributions go through L2."""
    n, t = layer.samples, layer.positions
    macs = n * (n + 1) // 2 * t * t * (layer.inputs + layer.outputs)
    formed, cost = _explicit(layer, itemsize, workspace)
    if t > 1 and macs >= cost:
        return formed
    return Plan(
        algorithm="hadamard" if t == 1 else "pairs",
        sample_chunk=n,
        group_chunk=1,
        out_chunk=layer.outputs,
        in_chunk=layer.inputs,
        macs=macs,
        # Every block of rows is multiplied with every other; about 64 rows are a block.
        bytes_moved=n * t * (layer.inputs + layer.outputs) * itemsize * ceil(n * t / 64),
        workspace=0,
        backend="triton",
    )


def conv(layer: LayerSizes, itemsize: int, workspace: int) -> Plan:
    """Plan the kernels of a convolution, which form contributions."""
    return _explicit(layer, itemsize, workspace)[0]


def _explicit(layer: LayerSizes, itemsize: int, workspace: int) -> tuple[Plan, float]:
    n, weights = layer.samples, layer.weights
    formed, summed = n * layer.positions * weights, n * (n + 1) // 2 * weights
    chosen = Plan(
        algorithm="explicit",
        sample_chunk=n,
        group_chunk=layer.groups,
        out_chunk=layer.outputs,
        in_chunk=layer.inputs,
        macs=formed + summed,
        bytes_moved=layer.input_bytes * itemsize // layer.size + 2 * n * weights * 4,
        workspace=min(workspace, 4 * n * weights),
        backend="triton",
    )
    tf32 = TF32_MAC if itemsize == 2 else 1.0
    return chosen, formed + tf32 * summed + CONTRIBUTION_PASS * n * weights
