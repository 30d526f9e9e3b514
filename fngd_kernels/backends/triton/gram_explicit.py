"""Gram matrix of a linear layer or convolution from its per-sample contributions, by chunks of the weight.

C_n = E_n^T A_n of a chunk of weight tiles is written to scratch memory of N rows. Then C C^T is added to
partial sums, one for each range of columns, which reduce.py sums at the end. Two kernels alternate, because
one kernel that did both would have to keep its tile of C for all samples: N BO BI elements for each
multiprocessor (with 128 samples, 64x64 tiles and bfloat16 1 MiB, or 132 MiB on 132 multiprocessors). It would
also have no more programs than the weight has tiles.
"""

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from ...workspace import WORKSPACE
from .common import capability, dot, multiprocessors
from .contributions import block_size, contributions
from .costs import SCRATCH
from .reduce import sum_partials
from .tiles import tile

MIN_STEPS = 4
"""Minimum steps of a program of the product C C^T; for fewer, one more partial sum is not worth its cost."""


@triton.jit
def _block_product(
    X,
    Y,
    mask_x,
    mask_y,
    first,
    last,
    SAME: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    acc = tl.zeros([BN, BN], dtype=tl.float32)
    for start in range(first, last, BK):
        offs_k = start + tl.arange(0, BK)
        mask_k = offs_k < last
        x = tl.load(X[:, None] + offs_k[None, :], mask=mask_x[:, None] & mask_k[None, :], other=0)  # [BN, BK]
        if SAME:
            y = x
        else:
            y = tl.load(Y[:, None] + offs_k[None, :], mask=mask_y[:, None] & mask_k[None, :], other=0)
        acc = dot(x, tl.trans(y), acc, PRECISION)
    return acc  # [BN, BN]


@triton.jit(do_not_specialize=["started"])
def _add_gram_kernel(
    C,
    PARTIAL,
    n,
    columns,
    part_columns,
    stride_cn,
    stride_pp,
    stride_pn,
    started,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    pid_i, pid_j, pid_p = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if pid_j > pid_i:
        return
    offs_i = (pid_i * BN + tl.arange(0, BN)).to(tl.int64)
    offs_j = (pid_j * BN + tl.arange(0, BN)).to(tl.int64)
    mask_i, mask_j = offs_i < n, offs_j < n
    first = pid_p * part_columns
    last = tl.minimum(first + part_columns, columns)
    rows_i, rows_j = C + offs_i * stride_cn, C + offs_j * stride_cn
    if pid_i == pid_j:
        acc = _block_product(rows_i, rows_i, mask_i, mask_i, first, last, True, PRECISION, BN, BK)
    else:
        acc = _block_product(rows_i, rows_j, mask_i, mask_j, first, last, False, PRECISION, BN, BK)
    block = PARTIAL + pid_p.to(tl.int64) * stride_pp + offs_i[:, None] * stride_pn + offs_j[None, :]
    # The lower triangle is all that is summed.
    mask = mask_i[:, None] & (offs_j[None, :] <= offs_i[:, None])
    before = tl.load(block, mask=mask & (started != 0), other=0)  # [BN, BN]
    tl.store(block, before + acc, mask=mask)


def scratch_dtype(dtype: torch.dtype, precision: str | None) -> torch.dtype:
    """Return the dtype of contributions: bfloat16 for 16-bit inputs, unless a precision is asked for."""
    return torch.float32 if dtype == torch.float32 or precision else torch.bfloat16


def gram_explicit(
    a: Tensor, e: Tensor, bias: bool, precision: str | None = None, workspace: int = WORKSPACE
) -> Tensor:
    """Return K = sum over tiles of the weight of C C^T with C_n = E_n^T A_n, for a (N,T,I) and e (N,T,O).

    Forming C costs NTIO MACs, and the product N^2 IO/2. The other arguments are those of
    `gram_conv_explicit`.
    """
    geometry = ConvGeometry((e.shape[2], a.shape[2], 1), (1,), (0,), (1,), 1)
    return gram_conv_explicit(a.mT, e.mT, geometry, bias, precision, workspace)


def gram_conv_explicit(
    x: Tensor,
    e: Tensor,
    geometry: ConvGeometry,
    bias: bool,
    precision: str | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Return K = sum over tiles of the weight of C C^T, for x (N,C,*space) and e (N,O,*space_out).

    Forming C costs N P O (C/groups) prod(kernel) MACs, with P output positions, and the product N^2/2 MACs
    for each weight.

    Args:
        x: Input of the convolution.
        e: Gradient at its output.
        geometry: The convolution.
        bias: Whether the bias belongs to the block.
        precision: How float32 is multiplied: "ieee" (default), "tf32" or "tf32x3". For 16-bit inputs,
            contributions are rounded to bfloat16 by default, |K'_ij - K_ij| <= 2^-7 ||C_i|| ||C_j||, and with
            a precision kept and multiplied as float32.
        workspace: Upper bound of scratch memory in bytes.
    """
    n, dtype = len(x), scratch_dtype(x.dtype, precision)
    precision = precision or "ieee"
    x, e, geometry = _in_three_dimensions(x, e, geometry)
    room = min(workspace - workspace // 4, SCRATCH)
    weights = [contributions(x, e, geometry, precision, dtype, room)]
    if bias:
        # A convolution of an image of ones with kernels of one pixel.
        pixel = x.new_ones(()).expand(n, 1, *e.shape[2:])
        ones = ConvGeometry((e.shape[1], 1, 1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1)
        weights.append(contributions(pixel, e, ones, precision, dtype, room))
    widest = max(weight.tiles * weight.area for weight in weights)

    chosen = tile("add_gram", capability(x.device), dtype.itemsize)
    bn = max(block_size(n, chosen.blocks["BN"]), chosen.blocks["MIN_BN"])
    # With fewer rows, longer pieces of each are read, so that a step loads about as many bytes.
    bk = chosen.blocks["BK"] * min(2, chosen.blocks["BN"] // bn)
    grid = ceil(n / bn)
    # Programs of few rows load few bytes at a time, so each multiprocessor gets several of them.
    programs = multiprocessors(x.device) * max(1, 64 // bn)
    parts = min(
        programs // (grid * (grid + 1) // 2),
        ceil(widest / (MIN_STEPS * bk)),
        workspace // (16 * n * n),
    )
    parts = max(1, parts)
    partial = x.new_empty((parts, n, n), dtype=torch.float32)

    # A single partial sum becomes K and is not counted as scratch memory. Rows start at multiples of 16
    # elements.
    room = min(SCRATCH, workspace - (partial.nbytes if parts > 1 else 0)) // (16 * dtype.itemsize * n) * 16
    chunks = [ceil(weight.tiles / max(1, room // weight.area)) for weight in weights]
    steps = [ceil(weight.tiles / count) for weight, count in zip(weights, chunks, strict=True)]
    widest = max(step * weight.area for step, weight in zip(steps, weights, strict=True))
    scratch = x.new_empty((n, ceil(widest / 16) * 16), dtype=dtype)
    started = 0
    for weight, step in zip(weights, steps, strict=True):
        for first in range(0, weight.tiles, step):
            count = min(step, weight.tiles - first)
            width = count * weight.area
            chunk = scratch[:, :width]
            weight.form(chunk, first, count)
            _add_gram_kernel[(grid, grid, parts)](
                C=chunk,
                PARTIAL=partial,
                n=n,
                columns=width,
                part_columns=ceil(ceil(width / parts) / bk) * bk,
                stride_cn=scratch.stride(0),
                stride_pp=partial.stride(0),
                stride_pn=partial.stride(1),
                started=started,
                PRECISION=precision,
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
                BN=bn,
                BK=bk,
            )
            started = 1
    return sum_partials(partial)


def _in_three_dimensions(x: Tensor, e: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor, ConvGeometry]:
    """Return the same convolution in three dimensions; a single dimension becomes the height."""
    (outputs, inputs, *kernel), stride, padding, dilation, groups = geometry
    before, after = {1: (1, 1), 2: (1, 0), 3: (0, 0)}[len(kernel)]

    def axes(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
        return (fill,) * before + tuple(values) + (fill,) * after

    whole = ConvGeometry(
        (outputs, inputs, *axes(tuple(kernel), 1)),
        axes(stride, 1),
        axes(padding, 0),
        axes(dilation, 1),
        groups,
    )

    def view(t: Tensor) -> Tensor:
        space = zip(t.shape[2:], t.stride()[2:], strict=True)
        # Axes of size 1 are never moved along; Triton sees that 16 divides 0.
        strides = axes(tuple(stride if size > 1 else 0 for size, stride in space), 0)
        return t.as_strided((*t.shape[:2], *axes(t.shape[2:], 1)), (*t.stride()[:2], *strides))

    return view(x), view(e), whole
