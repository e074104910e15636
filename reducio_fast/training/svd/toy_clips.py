"""Training clips of the small embedded SVD: 14 frames of the toy world, with SVD's own conditions.

The picture does not show where its shape will go, and no condition says it. As in SVD, the conditions are the amount of
motion (motion bucket) and the frame rate. Letters in shapes: T frames, H W rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...data import toy_world

FRAMES, SIZE, FPS = 14, 64, 7
# Motion buckets by the world's paces; and frame rates: at twice the rate the same motion takes twice as many frames.
MOTION_BUCKETS = {"slowly": 64, "": 127, "fast": 191}
RATES = (7, 10, 14)


class ToyClip(NamedTuple):
    """Frames, uint8 [T, H, W, 3], of which the first is the picture, and the conditions of the clip."""

    frames: np.ndarray
    fps: int
    motion_bucket_id: int


def draw_clip(rng: np.random.Generator, held_out: bool = False, size: int = SIZE, frames: int = FRAMES) -> ToyClip:
    """A clip of a training scene, or of a held-out one."""
    scene = toy_world.sample_scene(rng, held_out)
    fps = int(rng.choice(RATES))
    whole = toy_world.render(scene, rng, size, FRAMES * fps // FPS)
    first = int(rng.integers(len(whole) - frames + 1))
    return ToyClip(whole[first : first + frames], fps, MOTION_BUCKETS[scene.speed])
