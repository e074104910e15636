"""Converts between bytes 0..255 and the values in [-1, 1] of the networks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_unit(
    frames: np.ndarray | Tensor, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 [..., H, W, 3] -> [..., 3, H, W] in [-1, 1], computed in float32."""
    pixels = torch.as_tensor(frames).to(device).movedim(-1, -3).float()
    return (pixels / 127.5 - 1).to(dtype)


def to_bytes(values: Tensor) -> Tensor:
    """[..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3]; values outside are clamped."""
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)
