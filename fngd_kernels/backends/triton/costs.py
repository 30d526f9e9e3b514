"""Costs of the Triton kernels; standard library only.

Costs are in multiply-adds (MACs) of the inputs' dtype on tensor cores. The prices are taken from data sheets.
"""

from dataclasses import replace
from math import ceil

from ...plans import LayerSizes, Plan

BYTE_PASS = {2: 50.0, 4: 16.0}
"""Cost of storing or loading one byte of scratch memory in a GPU's L2 cache, by bytes of an input element."""

LAUNCH = {2: 4e8, 4: 1e8}
"""Cost of a launch, about 1.6 us, by bytes of an input element."""

SCRATCH = 32 << 20
"""Bytes of contributions formed at a time: they stay in the L2 cache (50 MB on an H100)."""

WIDE_CHANNELS = 32
"""From this many channels per group on, those of one pixel are read at a time."""

FORMED_MAC = 1.5
"""Cost of a MAC of a contribution, which has few positions for each byte that it reads."""


def linear(layer: LayerSizes, itemsize: int, workspace: int) -> Plan:
    """Plan a linear layer: pairs of positions stay in registers, contributions go through L2."""
    pairs, cost = _pairs(layer, itemsize)
    formed, formed_cost = _explicit(layer, itemsize, workspace)
    return pairs if layer.positions == 1 or cost < formed_cost else formed


def conv(layer: LayerSizes, padded: int, itemsize: int, workspace: int) -> Plan:
    """Plan a convolution: contributions, or pairs of positions if patches are cheaper and fit.

    Args:
        layer: The layer.
        padded: Pixels of one sample's input with its padding.
        itemsize: Bytes of an element of the inputs.
        workspace: Upper bound of scratch memory in bytes.
    """
    formed, formed_cost = _explicit(layer, itemsize, workspace)
    inputs = layer.inputs * layer.kernel
    pairs, cost = _pairs(replace(layer, pixels=layer.positions, inputs=inputs, kernel=1), itemsize)
    patches = layer.samples * layer.positions * inputs * itemsize
    # Images with channels last, and those with their padding.
    images = 2 * padded * layer.inputs + layer.positions * layer.outputs
    needed = patches + layer.samples * images * itemsize
    cost += 2 * LAUNCH[itemsize] + 2 * patches * BYTE_PASS[itemsize]
    if layer.groups > 1 or needed > workspace or cost >= formed_cost:
        return formed
    moved = pairs.bytes_moved + 2 * needed
    return replace(pairs, unfolded=True, bytes_moved=moved, workspace=needed)


def _pairs(layer: LayerSizes, itemsize: int) -> tuple[Plan, float]:
    n, t = layer.samples, layer.positions
    macs = n * (n + 1) // 2 * t * t * (layer.inputs + layer.outputs)
    chosen = Plan(
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
    return chosen, macs + LAUNCH[itemsize]


def _explicit(layer: LayerSizes, itemsize: int, workspace: int) -> tuple[Plan, float]:
    n, weights = layer.samples, layer.weights
    formed, summed = n * layer.positions * weights, n * (n + 1) // 2 * weights
    contributions = n * weights * itemsize
    chosen = Plan(
        algorithm="explicit",
        sample_chunk=n,
        group_chunk=layer.groups,
        out_chunk=layer.outputs,
        in_chunk=layer.inputs,
        macs=formed + summed,
        bytes_moved=layer.input_bytes * itemsize // layer.size + 2 * contributions,
        workspace=min(workspace, contributions),
        backend="triton",
    )
    # Each chunk is formed and added, and all are summed.
    launches = 2 * ceil(contributions / max(1, min(workspace, SCRATCH))) + 1
    cost = FORMED_MAC * formed + summed + 2 * contributions * BYTE_PASS[itemsize]
    return chosen, cost + launches * LAUNCH[itemsize]
