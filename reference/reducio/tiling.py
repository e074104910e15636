"""Spatial tiling as the Reducio-VAE release does it: overlapping reads, linear blending in raster order, crop, stitch.

A `grid` is a list of rows, each a list of tiles; a tile is any tensor whose last two axes are height and width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Grid = list[list[Tensor]]


def tile_grid(x: Tensor, stride: int, extent: int) -> Grid:
    """Cut `x` [..., H, W] into tiles at multiples of `stride`; each reads up to `extent`, clipped at the border."""
    height, width = x.shape[-2:]
    return [[x[..., i : i + extent, j : j + extent] for j in range(0, width, stride)] for i in range(0, height, stride)]


def blend(a: Tensor, b: Tensor, overlap: int, dim: int) -> Tensor:
    """Fade from the last cells of `a` into the first cells of `b` along `dim` (-2: a is above, -1: a is to the left).

    The weight of `b` is k/n at cell k of n: it starts at 0 and never reaches 1 inside the overlap, as in the release.
    """
    n = min(a.shape[dim], b.shape[dim], overlap)
    if n == 0:
        return b
    shape = [1] * b.ndim
    shape[dim] = n
    weight = (torch.arange(n, device=b.device, dtype=b.dtype) / n).view(shape)
    mixed = a.narrow(dim, a.shape[dim] - n, n) * (1 - weight) + b.narrow(dim, 0, n) * weight
    return torch.cat([mixed, b.narrow(dim, n, b.shape[dim] - n)], dim)


def blend_grid(grid: Grid, overlap: int | Callable[[Tensor, int], int]) -> Grid:
    """Blend every tile with its upper, then its left neighbour (both blended). `overlap` may depend on (a, dim)."""
    nominal = overlap if callable(overlap) else lambda _a, _dim: overlap
    out: Grid = []
    for i, row in enumerate(grid):
        out.append([])
        for j, tile in enumerate(row):
            if i > 0:
                tile = blend(out[i - 1][j], tile, nominal(out[i - 1][j], -2), -2)
            if j > 0:
                tile = blend(out[i][j - 1], tile, nominal(out[i][j - 1], -1), -1)
            out[i].append(tile)
    return out


def stitch(grid: Grid, overlap: int, crop: int) -> Tensor:
    """Blend, keep the first `crop` rows and columns of each tile, and join the grid to one tensor."""
    rows = [torch.cat([tile[..., :crop, :crop] for tile in row], dim=-1) for row in blend_grid(grid, overlap)]
    return torch.cat(rows, dim=-2)
