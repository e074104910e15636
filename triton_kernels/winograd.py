"""A convolution over frames with fewer multiplications, on a CPU: Winograd's F(4x4, 3x3), in plain torch ops.

A tile of 6x6 inputs gives 4x4 outputs with 36 multiplications per pair of channels, instead of 144: kernel and tile are
polynomials, which are evaluated at points, multiplied there, and interpolated. Evaluation and interpolation are small
constant matrices; the multiplications are 36 matrix products over channels and, in a video, over the taps in time.

Source: Lavin and Gray, arXiv 1509.09308. The points are 0, 3/4, -3/4, 3/2, -3/2 and infinity, not theirs of 1 and 2:
the error in float32 is then 0.8 to 2.0 times that of oneDNN's direct sums, with theirs 2 to 4 times. So a network stays
within this package's rule for results (`measurement/accuracy_rule.py`).

Legend: N items, T frames, H W rows and columns, C channels in, K channels out.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

WIDE = 128  # channels in and out from which it may pay: products grow with their square, the passes over memory do not
LEAST = 1024  # positions from which it may pay: each call evaluates the kernel
TILE = 4  # outputs of a tile, along each axis
POINTS = (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2))
CHUNK = 2**20  # bytes per thread of transformed inputs at a time: they stay in the caches
ROWS = 256  # of a product, at least: each chunk reads all evaluated kernels, up to 113 MB


def convolve_by_winograd(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of x [N, T + time - 1, H + taps - 1, W + taps - 1, C] with kernel [K, time, taps, taps, C], of 2
    or 3 taps in space, plus bias [K]: [N, T, H, W, K]."""
    K, time, taps = kernel.shape[:3]
    if time == 1:
        return _convolve(x.flatten(0, 1)[None], kernel, bias)[0].unflatten(0, x.shape[:2])
    return _convolve(x, kernel, bias)


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    N, frames, padded_H, padded_W, C = x.shape
    K, time, taps = kernel.shape[:3]
    T, H, W = frames - time + 1, padded_H - taps + 1, padded_W - taps + 1
    rows, columns = -(-H // TILE), -(-W // TILE)
    x = F.pad(x, (0, 0, 0, columns * TILE - W, 0, rows * TILE - H)) if H % TILE or W % TILE else x
    evaluate_tile, evaluate_kernel, interpolate = transforms(taps)
    points, side = len(evaluate_tile), TILE + taps - 1
    kernels = evaluate_kernel @ kernel.permute(2, 3, 0, 1, 4).reshape(taps * taps, -1)
    kernels = kernels.view(points, K, time, C).transpose(1, 3)  # [n², C, time, K]
    result = x.new_empty(N, T, rows, TILE, columns, TILE, K)
    fitting = CHUNK * torch.get_num_threads() // (points * frames * max(C, K) * x.element_size())
    at_once = max(fitting, -(-ROWS // T))  # tiles
    wide = min(at_once, columns)
    high = max(1, at_once // columns)
    tiles = x.unfold(2, side, TILE).unfold(3, side, TILE).permute(0, 5, 6, 1, 2, 3, 4)  # views; a tile's cells first
    for item in range(N):
        for row, column in itertools.product(range(0, rows, high), range(0, columns, wide)):
            chunk = tiles[item, :, :, :, row : row + high, column : column + wide]
            values = (evaluate_tile @ chunk.reshape(points, -1)).view(points, -1, C)
            frame = values.shape[1] // frames
            products = torch.bmm(values[:, : T * frame], kernels[:, :, 0])
            for tap in range(1, time):
                products.baddbmm_(values[:, tap * frame : (tap + T) * frame], kernels[:, :, tap])
            y = (interpolate @ products.view(points, -1)).view(TILE, TILE, T, *chunk.shape[3:5], K)
            y, target = y.permute(2, 3, 0, 4, 1, 5), result[item, :, row : row + high, :, column : column + wide]
            target.copy_(y) if bias is None else torch.add(y, bias, out=target)
    return result.view(N, T, rows * TILE, columns * TILE, K)[:, :, :H, :W]


@functools.lru_cache
def transforms(taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 matrices for a 2D tile, whose rows or columns are flattened: evaluation of an input tile [n², n²] and of
    a kernel [n², taps²], and interpolation of the outputs [TILE², n²], with n = TILE + taps - 1."""
    points = POINTS[: TILE + taps - 2]
    scales = [math.prod(p - q for q in points if q != p) for p in points]
    tile = [[*_polynomial([q for q in points if q != p]), Fraction(0)] for p in points] + [_polynomial(points)]
    powers = [[p**i for i in range(max(TILE, taps))] for p in points]
    kernel = [[value / scale for value in row[:taps]] for row, scale in zip(powers, scales, strict=True)]
    kernel.append([Fraction(i == taps - 1) for i in range(taps)])  # infinity: the leading coefficient
    outputs = [[row[i] for row in powers] + [Fraction(i == TILE - 1)] for i in range(TILE)]

    def in_2d(rows: list[list[Fraction]]) -> Tensor:
        matrix = torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64, device="cpu")
        return torch.kron(matrix, matrix).float()

    return in_2d(tile), in_2d(kernel), in_2d(outputs)


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of the product of (x - root), the constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients
