"""PSNR and SSIM of clips as in the Reducio-VAE release: computed per frame on 0..1, then averaged over frames."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MOST_DB = 60.0  # scores of clips count no more than this: an exact copy would be infinite, and so would a mean with it
_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def _clips(a: np.ndarray, b: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both clips as float64 [T, C, H, W] in 0..1: uint8 is divided by 255, floats are clamped."""
    clips = []
    for name, array in (("a", np.asarray(a)), ("b", np.asarray(b))):
        if array.ndim != 4:
            raise ValueError(f"{name} must be [T, H, W, C], got shape {array.shape}")
        if array.dtype == np.uint8:
            array = array / 255.0
        elif not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{name} must be uint8 (0..255) or floating (0..1), got {array.dtype}")
        clips.append(torch.from_numpy(array.astype(np.float64)).clamp(0.0, 1.0).permute(0, 3, 1, 2))
    if clips[0].shape != clips[1].shape:
        raise ValueError(f"a and b differ in shape: {np.shape(a)} and {np.shape(b)}")
    return clips[0], clips[1]


def psnr_of_error(squared_error: Tensor, span: float = 1.0) -> Tensor:
    """PSNR in dB of mean squared errors of values with the range `span`: 1 for 0..1, 2 for -1..1."""
    return -10.0 * torch.log10(squared_error / span**2)


def psnr_per_frame(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of every frame, [T]; infinite if two frames are equal, NaN if one contains NaN.

    Clips are [T, H, W, C], uint8 in 0..255 or floating in 0..1 (clamped).
    """
    x, y = _clips(a, b)
    error = (x - y).square().mean(dim=(1, 2, 3))
    return psnr_of_error(error).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over frames of the PSNR in dB; infinite if any two frames are equal."""
    return float(psnr_per_frame(a, b).mean())


def pooled_psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of the squared error over the whole clip; infinite only if the clips are equal."""
    x, y = _clips(a, b)
    return float(psnr_of_error((x - y).square().mean()))


def ssim_per_frame(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of every frame, [T]: Gaussian window 11, sigma 1.5, mean over channels, no padding.

    Frames are first average-pooled by round(min(H, W) / 256), so that the window covers a similar area at every
    resolution. Clips as in `psnr_per_frame`. Raises ValueError for sides below 11 pixels. Source: Wang et al. 2004.
    """
    x, y = _clips(a, b)
    height, width = x.shape[-2:]
    if min(height, width) < _WINDOW:
        raise ValueError(f"SSIM needs frames of at least {_WINDOW}x{_WINDOW}, got {height}x{width}")
    # Python rounds half to even, so a side of 128 gives round(0.5) = 0; the minimum is 1.
    pool = max(1, round(min(height, width) / 256))
    frames, channels = x.shape[:2]
    x, y = (F.avg_pool2d(clip, pool).flatten(0, 1)[:, None] for clip in (x, y))

    offset = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    kernel = torch.exp(-offset.square() / (2.0 * _SIGMA**2))
    kernel = kernel / kernel.sum()

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, kernel[None, None, :, None]), kernel[None, None, None, :])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.reshape(frames, channels, -1).mean(dim=(1, 2)).numpy()


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over frames of the structural similarity; 1 for equal clips."""
    return float(ssim_per_frame(a, b).mean())
