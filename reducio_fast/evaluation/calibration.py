"""Measures the largest inputs of a decoder's convolutions on clips; `quantise=` scales them by these values."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

from ..data import toy_world
from ..data.clip_files import read_frames
from ..data.curation.curate import find_sources
from ..fast.quantisation import measure_largest
from ..media.image_files import cover_crop
from ..reference import ReducioVAE
from ..system.errors import ReducioError
from .reconstruction import reconstruct
from .video_report import first_frames

_SEED = 7  # of the toy world's clips, which do not include scenes that are held out for scores


def calibrate(vae: ReducioVAE, clips: Iterable[np.ndarray]) -> tuple[dict[str, Tensor], int]:
    """For each convolution that can be quantised, the largest magnitude of every input channel, float32 [C], over these
    clips, uint8 [T, H, W, 3]; and the number of clips. Raises ReducioError if there are none."""
    count = 0

    def run() -> None:
        nonlocal count
        for clip in clips:
            reconstruct(vae, clip)
            count += 1

    largest = measure_largest(vae, run)
    if not count:
        raise ReducioError(f"calibrate: no shot of these videos is {vae.config.num_frames} frames long")
    return largest, count


def toy_clips(count: int, size: int, length: int) -> Iterator[np.ndarray]:
    """Clips of the toy world's training scenes."""
    rng = np.random.default_rng(_SEED)
    return (toy_world.render(toy_world.sample_scene(rng), rng, size, length) for _ in range(count))


def video_clips(videos: Sequence[str | os.PathLike[str]], size: int, length: int, most: int) -> Iterator[np.ndarray]:
    """At most `most` clips within the shots of these videos, one from each video in turn. A video is decoded when its
    first turn comes."""
    return itertools.islice(_in_turn([_clips_of(source.path, size, length) for source in find_sources(videos)]), most)


def _clips_of(path: str, size: int, length: int) -> Iterator[np.ndarray]:
    """The clips of `windows`. No decoder is open between two of them: in turn, each video would hold one until the end,
    500 processes for 500 videos."""
    for first in first_frames(path, length):
        yield cover_crop(read_frames(path, first, 1, length), size, size)


def _in_turn(by_video: Iterable[Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    waiting = deque(by_video)
    while waiting:
        clips = waiting.popleft()
        for clip in itertools.islice(clips, 1):
            yield clip
            waiting.append(clips)
