"""Gram matrix by chunks of contributions: what the explicit kernels of linear layers and convolutions share.

C_n = E_n^T A_n of a chunk of weight tiles is written to scratch memory of N rows. Then C C^T is added to
partial sums, one for each range of columns, which reduce.py sums at the end. Two kernels alternate, because
one kernel that did both would have to keep its tile of C for all samples: N BO BI floats for each
multiprocessor (with 128 samples and 64x64 tiles 2 MiB, or 264 MiB on 132 multiprocessors). It would also have
no more programs than the weight has tiles.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, dot, multiprocessors
from .reduce import sum_partials
from .tiles import Tile, tile

MIN_STEPS = 4
"""Minimum steps of a program of the product C C^T; for fewer, one more partial sum is not worth its cost."""


class Weight(NamedTuple):
    """A weight divided into tiles of equal size, and the launch that forms C of a range of its tiles.

    Attributes:
        tiles: How many tiles there are.
        area: Elements of a tile.
        form: Called with scratch memory (N, count * area), the first tile and the count of tiles.
    """

    tiles: int
    area: int
    form: Callable[[Tensor, int, int], None]

    def tiles_at_once(self, columns: int) -> int:
        """Return how many tiles make a chunk of at most `columns` columns, of equal chunks; at least one."""
        chunks = triton.cdiv(self.tiles, max(1, columns // self.area))
        return triton.cdiv(self.tiles, chunks)


def extent(size: int, block: int) -> int:
    """Return the common size, at most `block`, of the fewest equal tiles that cover `size`."""
    return triton.cdiv(size, triton.cdiv(size, block))


def block_size(size: int, limit: int) -> int:
    """Return the smallest block that a matrix product accepts and that holds `size`; at most `limit`."""
    return min(limit, max(16, triton.next_power_of_2(size)))


def launch_options(
    chosen: Tile, samples: int, outputs: int, inputs: int, positions: int, workspace: int
) -> dict[str, int]:
    """Return blocks and launch options for C of a layer: the tile, reduced to fit layer and workspace.

    One tile of all samples fits into the part of the workspace that partial sums leave.
    """
    bo, bi = block_size(outputs, chosen.blocks["BO"]), block_size(inputs, chosen.blocks["BI"])
    while 4 * samples * bo * bi > workspace - workspace // 4 and max(bo, bi) > 16:
        bo, bi = (bo // 2, bi) if bo >= bi else (bo, bi // 2)
    return {
        "BO": bo,
        "BI": bi,
        "BT": block_size(positions, chosen.blocks["BT"]),
        "num_warps": min(chosen.num_warps, max(4, bo * bi // 2048)),
        "num_stages": chosen.num_stages,
    }


def default_precision(dtype: torch.dtype) -> str:
    """Return how C C^T is multiplied for inputs of a dtype: C of half-precision inputs in tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def store_contributions(
    C,
    c,  # [BO, BI]
    pid_w,
    pid_n,
    extent_o,
    extent_i,
    stride_cn,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
):
    """Store tile pid_w of sample pid_n: its extent_o x extent_i elements, without gaps."""
    if PRECISION == "tf32":
        # Rounded to nearest here, because the product truncates: K would be 7e-4 too small.
        bits = (c.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        c = tl.where(c == c, bits.to(tl.float32, bitcast=True), c)
    offs_o, offs_i = tl.arange(0, BO), tl.arange(0, BI)
    row = C + pid_n * stride_cn + pid_w.to(tl.int64) * extent_o * extent_i
    mask = (offs_o < extent_o)[:, None] & (offs_i < extent_i)[None, :]
    tl.store(row + offs_o[:, None] * extent_i + offs_i[None, :], c, mask=mask)


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
    mask = mask_i[:, None] & mask_j[None, :]
    before = tl.load(block, mask=mask & (started != 0), other=0)  # [BN, BN]
    tl.store(block, before + acc, mask=mask)


def gram_by_chunks(weights: list[Weight], inputs: Tensor, precision: str, workspace: int) -> Tensor:
    """Return K = sum of C C^T over all tiles of all weights; scratch and partial sums fit into `workspace`.

    For each contribution, costs N^2/2 MACs, one store and about one load of 4 bytes beside what forming it
    costs.
    """
    n = inputs.shape[0]
    chosen = tile("add_gram", capability(inputs.device), 4)
    bn = block_size(n, chosen.blocks["BN"])
    # With fewer rows, longer pieces of each are read, so that a step loads about as many bytes.
    bk = chosen.blocks["BK"] * min(2, chosen.blocks["BN"] // bn)
    grid = triton.cdiv(n, bn)
    widest = max(weight.tiles * weight.area for weight in weights)
    # Programs of few rows load few bytes at a time, so each multiprocessor gets several of them.
    programs = multiprocessors(inputs.device) * max(1, 64 // bn)
    parts = min(
        programs // (grid * (grid + 1) // 2),
        triton.cdiv(widest, MIN_STEPS * bk),
        workspace // (16 * n * n),
    )
    parts = max(1, parts)
    partial = inputs.new_empty((parts, n, n), dtype=torch.float32)

    # A single partial sum becomes K and is not counted as scratch memory. Rows start at multiples of 64
    # bytes.
    room = (workspace - (partial.nbytes if parts > 1 else 0)) // (64 * n) * 16
    steps = [weight.tiles_at_once(room) for weight in weights]
    widest = max(step * weight.area for step, weight in zip(steps, weights, strict=True))
    scratch = inputs.new_empty((n, triton.cdiv(widest, 16) * 16), dtype=torch.float32)
    started = 0
    for weight, step in zip(weights, steps, strict=True):
        for first in range(0, weight.tiles, step):
            count = min(step, weight.tiles - first)
            weight.form(scratch, first, count)
            width = count * weight.area
            _add_gram_kernel[(grid, grid, parts)](
                C=scratch,
                PARTIAL=partial,
                n=n,
                columns=width,
                part_columns=triton.cdiv(triton.cdiv(width, parts), bk) * bk,
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
