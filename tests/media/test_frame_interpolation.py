"""Frame interpolation: dropped frames are restored better than by the mean of both neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from reducio_fast.media.frame_interpolation import interpolate
from reducio_fast.media.similarity import psnr
from reducio_fast.system.errors import ReducioError


def clip(frames: int, height: int = 96, width: int = 96, pace: int = 1) -> np.ndarray:
    """A textured picture that pans by `pace` pixels per frame."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (height // 6 + 1, width // 3 + 1, 3)).astype(np.float32)
    picture = np.repeat(np.repeat(coarse, 6, axis=0), 6, axis=1)[:height]
    for _ in range(4):  # smooth, as pictures are
        picture = (picture + np.roll(picture, 1, 1) + np.roll(picture, 1, 0) + np.roll(picture, 2, 1)) / 4
    return np.stack([picture[:, pace * t : pace * t + width] for t in range(frames)]).round().astype(np.uint8)


@pytest.mark.parametrize("factor", [2, 4])
def test_dropped_frames_come_back(factor: int):
    whole = clip(4 * factor + 1)
    kept = whole[::factor]
    restored = interpolate(kept, factor)
    assert restored.shape == whole.shape and np.array_equal(restored[::factor], kept)
    mean = kept[:-1].astype(float) / 2 + kept[1:].astype(float) / 2
    middle = slice(factor // 2, None, factor)
    assert psnr(restored[middle], whole[middle]) > psnr(mean.round().astype(np.uint8), whole[middle]) + 1


def test_odd_sizes_and_stills():
    still = np.repeat(clip(1, 35, 33), 3, axis=0)
    out = interpolate(still, 2)
    assert out.shape == (5, 35, 33, 3) and np.abs(out.astype(int) - still[0]).max() < 24


def test_what_does_not_fit():
    for frames, factor, message in (
        (clip(3), 3, "interpolate: must be one of 2, 4, is 3"),
        (clip(3), True, "interpolate: must be one of 2, 4, is True"),
        (clip(1), 2, "interpolate: needs uint8 .* of at least 2 frames of 32x32"),
        (clip(3)[:, :16], 2, "interpolate: needs uint8"),
        (clip(3).astype(np.float32), 2, "interpolate: needs uint8 .* is float32"),
    ):
        with pytest.raises(ReducioError, match=message):
            interpolate(frames, factor)
