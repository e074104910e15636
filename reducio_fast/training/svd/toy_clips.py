"""What the small embedded SVD is trained on: 14 frames of the toy world, told in SVD's own terms.

The picture does not say where its shape will go, and neither is the network told: only, as SVD is, how much moves
(motion bucket) and at how many frames a second. Letters in shapes: T frames, H W rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...data import toy_world

FRAMES, SIZE, FPS = 14, 64, 7
# Motion buckets by the world's paces; and frame rates, at the double of which the same motion takes twice the frames.
MOTION_BUCKETS = {"slowly": 64, "": 127, "fast": 191}
RATES = (7, 10, 14)


class ToyClip(NamedTuple):
    """uint8 [T, H, W, 3], whose first frame is the picture, and what the network is told of it."""

    frames: np.ndarray
    fps: int
    motion_bucket_id: int


def draw_clip(rng: np.random.Generator, held_out: bool = False, size: int = SIZE, frames: int = FRAMES) -> ToyClip:
    """A clip of a training scene, or of one that is kept from training."""
    scene = toy_world.sample_scene(rng, held_out)
    fps = int(rng.choice(RATES))
    whole = toy_world.render(scene, rng, size, FRAMES * fps // FPS)
    first = int(rng.integers(len(whole) - frames + 1))
    return ToyClip(whole[first : first + frames], fps, MOTION_BUCKETS[scene.speed])
