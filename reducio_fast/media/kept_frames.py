"""Saves finished frames in the cache folder if the output cannot be written."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import numpy as np

from ..system.cache_folder import root
from ..system.errors import ReducioError
from .video_files import write_video


def keep_frames(clips: Sequence[np.ndarray], fps: float, name: str) -> str:
    """Write clips, uint8 [T, H, W, 3] each, as PNGs; return the end of an error message that names their folder."""
    folder = root() / "frames" / f"clip-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}-{name}"
    folders = [folder if len(clips) == 1 else folder / str(i) for i in range(len(clips))]
    try:
        for each, frames in zip(folders, clips, strict=True):
            each.parent.mkdir(parents=True, exist_ok=True)
            write_video(frames, each, fps)
    except (OSError, ReducioError) as error:
        return f"the frames could not be kept in {folder} either ({error})"
    return f"the frames are kept in {folder} ({fps:g} a second)"
