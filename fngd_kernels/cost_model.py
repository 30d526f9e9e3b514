"""The cost model: which Gram algorithm a layer takes, and in which chunks; standard library only."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import prod

from .arguments import convolution, flag, integer, integers, linear_shapes, sizes
from .backends.torch import costs as torch_costs
from .backends.triton import costs as triton_costs
from .geometry import ConvGeometry, pixel_grids
from .plans import LayerSizes, Plan
from .sketch import Sketch, as_sketch, sketched_geometry
from .workspace import WORKSPACE


def plan(
    a_shape: Sequence[int],
    e_shape: Sequence[int],
    *,
    weight_shape: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = False,
    itemsize: int = 4,
    workspace: int = WORKSPACE,
    capability: tuple[int, int] | None = None,
    sketch: int | Sketch | None = None,
) -> Plan:
    """Return how `gram` or `gram_conv` forms the Gram matrix of a layer.

    The operators ask the same function. It takes the cheapest algorithm whose scratch memory fits: on torch's
    products, `pairs` costs N^2 T^2 (I + O) / 2 MACs, `explicit` N T I O + N^2 I O / 2; pairs of pixels of a
    convolution never form patches and cost N^2 (pixels^2 C + positions^2 O) / 2. Passes over scratch memory
    are priced too. Triton kernels do the same for linear layers; they take a convolution as a linear layer on
    its patches, which are formed, where pairs of few positions are cheapest.

    Args:
        a_shape: (N,I), (N,T,I), or (N,C,*space) with weight_shape.
        e_shape: (N,O), (N,T,O), or (N,O,*space_out) with weight_shape.
        weight_shape: (O,C/groups,*kernel) of a convolution, None for a linear layer.
        stride: Stride of the convolution.
        padding: Padding of the convolution.
        dilation: Dilation of the convolution.
        groups: Groups of the convolution.
        bias: Whether the bias belongs to the block.
        itemsize: Bytes of an element of the inputs.
        workspace: Upper bound of scratch memory in bytes; exceeded only if the chunk of a single input and
            output does not fit.
        capability: Compute capability of the GPU whose Triton kernels are available, None for a CPU. They do
            not support float64 (itemsize 8), which takes torch's products on a GPU, too.
        sketch: As for `gram`; what compressing takes is not in the plan.

    Returns:
        The plan.

    Raises:
        ValueError: The shapes are not those of one layer, or a number is out of range.
        TypeError: An argument has the wrong type.
    """
    a_shape, e_shape = sizes("a_shape", a_shape, 1), sizes("e_shape", e_shape, 1)
    names = ("a_shape", "e_shape")
    geometry = None
    if weight_shape is None:
        linear_shapes(names, a_shape, e_shape)
    else:
        geometry = convolution(names, a_shape, e_shape, weight_shape, stride, padding, dilation, groups)
    flag("bias", bias)
    itemsize, workspace = integer("itemsize", itemsize, 1), integer("workspace", workspace, 0)
    if capability is not None:
        major, minor = integers("capability", capability, 2, 0)
        capability = (major, minor)
        if itemsize not in (2, 4, 8):
            raise ValueError(f"itemsize: expected 2, 4 or 8 bytes on a GPU, got {itemsize}")
    on_triton = capability is not None and itemsize < 8
    sketch = as_sketch(sketch)
    if geometry is None:
        if sketch is not None:
            a_shape, e_shape = ((*shape[:-1], min(shape[-1], sketch.size)) for shape in (a_shape, e_shape))
        return plan_linear(a_shape, e_shape, bias, itemsize, workspace, on_triton)
    if sketch is not None:
        geometry = sketched_geometry(geometry, sketch)
        outputs, inputs = geometry.weight_shape[:2]
        a_shape = (a_shape[0], geometry.groups * inputs, *a_shape[2:])
        e_shape = (e_shape[0], outputs, *e_shape[2:])
    return plan_conv(a_shape, e_shape, geometry, bias, itemsize, workspace, on_triton)


@lru_cache(maxsize=4096)
def plan_linear(
    a_shape: tuple[int, ...],
    e_shape: tuple[int, ...],
    bias: bool,
    itemsize: int,
    workspace: int,
    triton: bool,
) -> Plan:
    """Return the plan of a linear layer; `triton` tells whether Triton kernels serve the tensors."""
    size = max(4, itemsize)
    positions = a_shape[1] if len(a_shape) == 3 else 1
    layer = LayerSizes(
        samples=a_shape[0],
        pixels=positions,
        positions=positions,
        inputs=a_shape[-1],
        outputs=e_shape[-1],
        groups=1,
        kernel=1,
        aspect=0.5,
        copies=itemsize < size,
        size=size,
    )
    if triton:
        return triton_costs.linear(layer, itemsize, workspace)
    if positions == 1:
        return torch_costs.hadamard(layer)
    return _cheaper(torch_costs.pairs(layer, None, workspace), layer, bias, workspace)


@lru_cache(maxsize=4096)
def plan_conv(
    x_shape: tuple[int, ...],
    e_shape: tuple[int, ...],
    geometry: ConvGeometry,
    bias: bool,
    itemsize: int,
    workspace: int,
    triton: bool,
) -> Plan:
    """Return the plan of a convolution; `triton` tells whether Triton kernels serve the tensors."""
    samples, pixels, positions = x_shape[0], prod(x_shape[2:]), prod(e_shape[2:])
    if triton and geometry.is_pointwise:
        a_shape, rows_shape = (samples, pixels, x_shape[1]), (samples, pixels, e_shape[1])
        chosen = plan_linear(a_shape, rows_shape, bias, itemsize, workspace, triton)
        return replace(chosen, unfolded=True)
    layer = LayerSizes(
        samples=samples,
        pixels=pixels,
        positions=positions,
        inputs=geometry.weight_shape[1],
        outputs=geometry.weight_shape[0] // geometry.groups,
        groups=geometry.groups,
        kernel=prod(geometry.kernel),
        aspect=4.0,
        copies=True,
        size=max(4, itemsize),
    )
    if triton:
        padded = prod(size + 2 * pad for size, pad in zip(x_shape[2:], geometry.padding, strict=True))
        return triton_costs.conv(layer, padded, itemsize, workspace)
    axes = map(
        pixel_grids, x_shape[2:], geometry.kernel, geometry.stride, geometry.padding, geometry.dilation
    )
    return _cheaper(torch_costs.pairs(layer, list(product(*axes)), workspace), layer, bias, workspace)


def _cheaper(pairs: tuple[Plan, float], layer: LayerSizes, bias: bool, workspace: int) -> Plan:
    """Return the plan for pairs of positions if it fits and is cheaper than forming contributions."""
    (chosen, cost), (explicit, explicit_cost) = pairs, torch_costs.explicit(layer, bias, workspace)
    return chosen if chosen.workspace <= workspace and cost < explicit_cost else explicit
