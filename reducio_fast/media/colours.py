"""Matches the colours of one picture to those of another."""

from __future__ import annotations

import numpy as np

# A flat channel has no spread to scale: 1/255 of a grey level keeps the ratio finite, MOST keeps noise small.
LEAST, MOST = 1 / 255, 2.0


def match_mean_and_spread(picture: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3], each channel scaled and shifted to the mean and standard deviation that `wanted` has (Reinhard
    et al. 2001, in RGB)."""
    values, target = picture.astype(np.float64), wanted.astype(np.float64)
    mean, spread = values.mean((0, 1)), values.std((0, 1))
    scale = np.clip(target.std((0, 1)) / np.maximum(spread, LEAST), 1 / MOST, MOST)
    matched = (values - mean) * scale + target.mean((0, 1))
    return matched.round().clip(0, 255).astype(np.uint8)
