"""Joins several clips side by side into one, and shows a clip as a strip of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..system.errors import ReducioError, shown


def contact_sheet(clips: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """uint8 clips [T, H, W, 3] of one size, in rows from left to right -> [T, rows * H, columns * W, 3].

    columns: by default the square root of the number of clips, rounded up. Empty places are black. Raises ReducioError
    for columns that are not from 1 to the number of clips, and for clips of different sizes.
    """
    count = len(clips)
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    if isinstance(columns, bool) or not isinstance(columns, int) or not 1 <= columns <= count:
        raise ReducioError(
            f"columns: must be a whole number from 1 to {count}, the number of clips, is {shown(columns)}"
        )
    shapes = sorted({clip.shape for clip in clips})
    if len(shapes) > 1:
        raise ReducioError(f"grid: clips have the sizes {shapes[0][:3]} and {shapes[1][:3]}, one is needed for all")
    rows = -(-count // columns)
    frames, height, width = clips[0].shape[:3]
    sheet = np.zeros((frames, rows * height, columns * width, 3), np.uint8)
    for i, clip in enumerate(clips):
        top, left = i // columns * height, i % columns * width
        sheet[:, top : top + height, left : left + width] = clip
    return sheet


def film_strip(frames: np.ndarray, count: int = 4) -> np.ndarray:
    """`count` frames of uint8 [T, H, W, 3], from the first to the last, side by side: [H, count * W, 3]."""
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    return np.concatenate(list(frames[chosen]), axis=1)
