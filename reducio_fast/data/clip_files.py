"""Random clips of a curated manifest, read from the video files: the training data of an autoencoder."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..media import ffmpeg
from ..media.pixels import to_unit
from ..system.errors import ReducioError
from .curation import manifest

LOG = logging.getLogger("reducio_fast")
MOST_READERS = 8  # threads that read clips; each holds the frames of a clip in the video's own size
TRIES = 8  # consecutive clips that cannot be used before `ClipFiles.draw` raises


class Drawn(NamedTuple):
    """A clip, float32 [3, T, H, W] in [-1, 1], and its frames per second."""

    clip: Tensor
    fps: float


class ClipFiles:
    """The readable clips of the manifest at `path` that have `count` frames at about `rate` frames a second: every
    round(fps / rate)-th frame. Raises `ReducioError` if there is none."""

    def __init__(self, path: str | os.PathLike[str], count: int, rate: float) -> None:
        self.path, self.count, self.rate = Path(path), count, rate
        rows = manifest.read(path)
        readable = [row for row in rows if row["error"] is None]
        if not readable:
            reason = "all its videos have errors" if rows else "its selection is empty"
            raise ReducioError(f"{path} holds no clip that could be read: {reason}")
        self._listed = [[row[name] for name in ("id", "start", "end", "fps")] for row in readable]
        self.rows = [row for row in readable if self._spare(row) >= 0]
        if short := len(readable) - len(self.rows):
            LOG.info(
                "%s: %d of %d clips have less than %d frames at %g a second", path, short, len(readable), count, rate
            )
        if not self.rows:
            raise ReducioError(
                f"{path}: none of its {len(readable)} clips has {count} frames at {rate:g} a second, which takes "
                f"{count / rate:.3g} seconds"
            )

    def _step(self, row: Mapping[str, Any]) -> int:
        return max(1, round(row["fps"] / self.rate))

    def _spare(self, row: Mapping[str, Any]) -> int:
        """How many frames of a clip a drawn clip leaves; below 0 it is too short."""
        frames: int = row["end"] - row["start"] - (self._step(row) * (self.count - 1) + 1)
        return frames

    def checksum(self) -> str:
        """SHA-256 of the manifest's readable clips: their ids, frames and frame rates."""
        return hashlib.sha256(json.dumps(self._listed).encode()).hexdigest()

    def take_last(self, count: int) -> ClipFiles | None:
        """Move the last `count` clips into a new `ClipFiles` and return it; None for a count of 0.

        Raises `ReducioError` if no clip would be left here.
        """
        if not count:
            return None
        if count >= len(self.rows):
            raise ReducioError(f"held_out={count}: must be smaller; {self.path} holds {len(self.rows)} clips")
        taken = copy.copy(self)
        taken.rows, self.rows = self.rows[-count:], self.rows[:-count]
        return taken

    def draw(
        self, rng: np.random.Generator, size: int | tuple[int, int], least_area: float, mirror: bool = False
    ) -> Drawn:
        """Draw a random clip from a random start and a random crop.

        The crop has the shape of `size` (one number, or H and W) and at least the share `least_area` of the largest
        crop's area. `mirror`: half of the clips are mirrored. Raises `ReducioError` after `TRIES` consecutive clips
        whose videos cannot be read or end too early.
        """
        reason = ""
        for _ in range(TRIES):
            row = self.rows[rng.integers(len(self.rows))]
            step = self._step(row)
            first = row["start"] + int(rng.integers(self._spare(row) + 1))
            try:
                frames = read_frames(row["video"], first, step, self.count)
            except (ReducioError, OSError) as error:
                reason = str(error)
                continue
            if len(frames) == self.count:
                return Drawn(crop(frames, rng, size, least_area, mirror), row["fps"] / step)
            reason = f"{row['video']} ends before the clip does"
        raise ReducioError(
            f"{self.path}: {TRIES} clips in a row gave no {self.count} frames; the last one: {reason}; run "
            "reducio-fast curate again if videos have changed"
        )


def read_frames(video: str, first: int, step: int, count: int) -> np.ndarray:
    """Frames `first`, `first + step`, ... as uint8 [T, H, W, 3]; T is below `count` if the video ends earlier."""
    frames, last = [], first + step * (count - 1)
    for number, (frame, _) in enumerate(ffmpeg.frames(Path(video), start=first), start=first):
        if (number - first) % step == 0:
            frames.append(frame)
        if number >= last:
            break
    return np.stack(frames) if frames else np.empty((0, 0, 0, 3), np.uint8)


def crop(
    frames_THWC: np.ndarray,
    rng: np.random.Generator,
    size: int | tuple[int, int],
    least_area: float,
    mirror: bool = False,
) -> Tensor:
    """Cut one random rectangle out of all frames and resize it with antialiasing: float32 [3, T, H, W]."""
    rows, columns = (size, size) if isinstance(size, int) else size
    height, width = frames_THWC.shape[1:3]
    scale = min(height / rows, width / columns) * rng.uniform(least_area, 1.0) ** 0.5
    tall, wide = max(1, round(rows * scale)), max(1, round(columns * scale))
    top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
    clip = to_unit(np.ascontiguousarray(frames_THWC[:, top : top + tall, left : left + wide]))
    clip = F.interpolate(clip, (rows, columns), mode="bilinear", antialias=True, align_corners=False)
    if mirror and rng.random() < 0.5:
        clip = clip.flip(-1)
    return torch.clamp(clip, -1, 1).transpose(0, 1)
