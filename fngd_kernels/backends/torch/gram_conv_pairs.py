"""Gram matrix of a convolution from inner products of pixels, without patches."""

from itertools import product

from torch import Tensor

from ...geometry import ConvGeometry, pixel_grids
from ...plans import Plan
from .products import accumulation_dtype, mirror, rows_product

_ALL: slice = slice(None)


def gram_conv_pairs(x: Tensor, e: Tensor, geometry: ConvGeometry, bias: bool, plan: Plan) -> Tensor:
    """Return K_ij = sum_{p,q} <patch_ip, patch_jq> <e_ip, e_jq>, for x (N,C,*space) and e (N,O,*space_out).

    In every term of <patch_ip, patch_jq>, both pixels are shifted by the same kernel offset. The products of
    patches are therefore sums of shifted slices of the Gram matrix of all pixels; there is one such matrix
    for each residue of the stride.
    """
    n = x.shape[0]
    dtype = accumulation_dtype(x.dtype)
    k = x.new_zeros((n, n), dtype=dtype)
    _, stride, padding, dilation, groups = geometry
    grids = list(product(*map(pixel_grids, x.shape[2:], geometry.kernel, stride, padding, dilation)))

    for x_g, e_g in zip(x.chunk(groups, 1), e.chunk(groups, 1), strict=True):
        blocks = []
        for start in range(0, n, plan.sample_chunk):
            samples = slice(start, min(n, start + plan.sample_chunk))
            x_i, e_i = x_g[samples].to(dtype), e_g[samples].to(dtype)
            pixels = []
            for grid in grids:
                at = (_ALL, _ALL, *(axis.pixels for axis in grid))
                pixels.append(_position_rows(x_i[at]))
            blocks.append((samples, pixels, _position_rows(e_i)))

        for row, (i, pixels_i, e_i) in enumerate(blocks):
            for j, pixels_j, e_j in blocks[row:]:
                n_i, n_j = i.stop - i.start, j.stop - j.start
                pairs = x.new_zeros((*e.shape[2:], n_i, *e.shape[2:], n_j), dtype=dtype)
                for grid, grid_i, grid_j in zip(grids, pixels_i, pixels_j, strict=True):
                    sizes = [axis.size for axis in grid]
                    pixel_pairs = rows_product(grid_i, grid_j).view(*sizes, n_i, *sizes, n_j)
                    for taps in product(*(axis.taps for axis in grid)):
                        outputs, shifted = [tap.outputs for tap in taps], [tap.pixels for tap in taps]
                        at, read = (*outputs, _ALL, *outputs), (*shifted, _ALL, *shifted)
                        pairs[at].add_(pixel_pairs[read])
                if bias:
                    pairs += 1
                pairs = pairs.view(len(e_i), len(e_j)).mul_(rows_product(e_i, e_j))
                k[i, j].add_(pairs.view(-1, n_i, len(e_j) // n_j, n_j).sum((0, 2)))
    return mirror(k)


def _position_rows(t: Tensor) -> Tensor:
    """Return t (n,C,*space) as rows (P n, C), samples innermost: slices then have long contiguous runs."""
    return t.flatten(2).permute(2, 0, 1).reshape(-1, t.shape[1])
