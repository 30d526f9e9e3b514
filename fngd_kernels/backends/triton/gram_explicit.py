"""Gram matrix of a linear layer from its per-sample contributions, formed by chunks of the weight."""

import triton
import triton.language as tl
from torch import Tensor

from ...workspace import WORKSPACE
from .common import capability, dot
from .contributions import (
    Weight,
    default_precision,
    extent,
    gram_by_chunks,
    launch_options,
    store_contributions,
)
from .tiles import tile


@triton.jit(do_not_specialize=["first_tile", "tiles_i"])
def _contributions_kernel(
    A,
    E,
    C,
    positions,
    inputs,
    outputs,
    first_tile,
    tiles_i,
    extent_o,
    extent_i,
    stride_an,
    stride_at,
    stride_ai,
    stride_en,
    stride_et,
    stride_eo,
    stride_cn,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
):
    pid_w, pid_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = first_tile + pid_w
    offs_o = (at // tiles_i * extent_o + tl.arange(0, BO)).to(tl.int64)
    offs_i = (at % tiles_i * extent_i + tl.arange(0, BI)).to(tl.int64)
    mask_o, mask_i = offs_o < outputs, offs_i < inputs
    column_e = E + pid_n * stride_en + offs_o * stride_eo
    column_a = A + pid_n * stride_an + offs_i * stride_ai

    c = tl.zeros([BO, BI], dtype=tl.float32)
    for start in range(0, positions, BT):
        offs_t = (start + tl.arange(0, BT)).to(tl.int64)
        mask_t = offs_t < positions
        mask_e, mask_a = mask_t[:, None] & mask_o[None, :], mask_t[:, None] & mask_i[None, :]
        e = tl.load(column_e[None, :] + offs_t[:, None] * stride_et, mask=mask_e, other=0)  # [BT, BO]
        a = tl.load(column_a[None, :] + offs_t[:, None] * stride_at, mask=mask_a, other=0)  # [BT, BI]
        c = dot(tl.trans(e), a, c, PRECISION)  # [BO, BI]
    store_contributions(C, c, pid_w, pid_n, extent_o, extent_i, stride_cn, PRECISION, BO, BI)


def _form(a: Tensor, e: Tensor, precision: str, workspace: int) -> Weight:
    (n, positions, inputs), outputs = a.shape, e.shape[2]
    chosen = tile("contributions", capability(a.device), a.itemsize)
    options = launch_options(chosen, n, outputs, inputs, positions, workspace)
    extent_o, extent_i = extent(outputs, options["BO"]), extent(inputs, options["BI"])
    tiles_i = triton.cdiv(inputs, extent_i)

    def form(scratch: Tensor, first: int, count: int) -> None:
        _contributions_kernel[(count, n)](
            A=a,
            E=e,
            C=scratch,
            positions=positions,
            inputs=inputs,
            outputs=outputs,
            first_tile=first,
            tiles_i=tiles_i,
            extent_o=extent_o,
            extent_i=extent_i,
            stride_an=a.stride(0),
            stride_at=a.stride(1),
            stride_ai=a.stride(2),
            stride_en=e.stride(0),
            stride_et=e.stride(1),
            stride_eo=e.stride(2),
            stride_cn=scratch.stride(0),
            PRECISION=precision,
            **options,
        )

    return Weight(triton.cdiv(outputs, extent_o) * tiles_i, extent_o * extent_i, form)


def gram_explicit(
    a: Tensor, e: Tensor, bias: bool, precision: str | None = None, workspace: int = WORKSPACE
) -> Tensor:
    """Return K = sum over tiles of the weight of C C^T with C_n = E_n^T A_n, for a (N,T,I) and e (N,T,O).

    Forming C costs NTIO MACs, and the product N^2 IO/2.

    Args:
        a: Input of the layer.
        e: Gradient at its output.
        bias: Whether the bias belongs to the block.
        precision: For float32 inputs, how both products are computed; for others, how the second one is. By
            default "ieee" for float32 and "tf32" for the others.
        workspace: Upper bound of scratch memory in bytes.
    """
    precision = precision or default_precision(a.dtype)
    weights = [_form(a, e, precision, workspace)]
    if bias:
        weights.append(_form(a.new_ones(()).expand(*a.shape[:2], 1), e, precision, workspace))
    return gram_by_chunks(weights, a, precision, workspace)
