"""Read and write clips: .mp4, .gif, .webp or a folder of images, always as uint8 [T, H, W, 3] in RGB.

Outputs are written under a temporary name beside their place and renamed when complete, so a crash, a full disk or
Ctrl-C leaves either the whole file or none.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Generator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, features

from ..system.atomic_files import written_whole
from ..system.errors import ReducioError
from .image_files import IMAGE_SUFFIXES, decode_image, first_line, read_image, to_rgb

FILE_SUFFIXES = (".mp4", ".gif", ".webp")
Frames = Generator[tuple[np.ndarray, float | None], None, None]  # frames of a clip, each with the clip's rate
MAX_GIF_FPS = 50  # players replace a delay below 20 ms by 100 ms, so the clip would run at 10 frames a second


def read_video(path: str | os.PathLike, start: int = 0, count: int | None = None) -> tuple[np.ndarray, float | None]:
    """Frames `start` to `start + count` of a clip, uint8 [T, H, W, 3], and its frames per second (None for a folder).

    Fewer frames come back where the clip ends earlier; `count=None` reads to the end. A .gif or .webp with uneven
    delays is read at a constant rate, that of its shortest delay: frames held longer are repeated. Raises ReducioError
    where there is nothing to read, or what is there is broken.
    """
    path = Path(path)
    if start < 0 or (count is not None and count < 1):
        raise ReducioError(f"start must be at least 0 and count at least 1; they are {start} and {count}")
    if not path.exists():
        raise ReducioError(f"no such file or folder: {path}")
    frames_fps: Frames
    if path.is_dir():
        frames_fps = _folder_frames(path)
    elif path.suffix.lower() in (".gif", ".webp"):
        frames_fps = _animation_frames(path)
    else:
        frames_fps = _ffmpeg_frames(path)
    stop = None if count is None else start + count
    fps, frames = None, list[np.ndarray]()
    with contextlib.closing(frames_fps):  # ends ffmpeg at once where the clip goes on
        for frame, fps in islice(frames_fps, start, stop):  # noqa: B007 - the last rate is the clip's rate
            if frames and frame.shape != frames[0].shape:
                raise ReducioError(
                    f"{path}: frame {start + len(frames)} is {_size(frame)}, the first is {_size(frames[0])}"
                )
            frames.append(frame)
    if not frames:
        raise ReducioError(f"{path} holds no frame from number {start} on")
    return np.stack(frames), fps


def write_video(frames: np.ndarray, path: str | os.PathLike, fps: float) -> Path:
    """Write uint8 [T, H, W, 3] as .mp4 (H.264), .gif, .webp or, where `path` has no suffix, a folder of numbered PNGs.

    PNGs are exact; the others are lossy. Raises ReducioError for frames of another shape or type, a path that
    `check_output_path` refuses, an odd size in an .mp4, or a failed write; nothing half-written stays behind.
    """
    path = check_output_path(path)
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or frames.size == 0:
        raise ReducioError(f"frames must be uint8 [T, H, W, 3]; they are {frames.dtype} {list(frames.shape)}")
    if not (math.isfinite(fps) and fps > 0):
        raise ReducioError(f"fps must be a positive number; it is {fps}")
    write = {".mp4": _write_mp4, ".gif": _write_gif, ".webp": _write_webp}.get(path.suffix.lower(), _write_folder)
    try:
        with written_whole(path) as temporary:
            write(frames, temporary, fps)
    except OSError as error:
        raise ReducioError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def check_output_path(path: str | os.PathLike) -> Path:
    """Check before any work whether `path` can be written; returns it as a Path.

    Raises ReducioError for an unknown suffix, a folder that does not exist or cannot be written (found out by writing
    to it), a folder of frames that already holds something, or a missing encoder.
    """
    trailing_slash = os.fspath(path).endswith(os.sep)
    path = Path(path)
    suffix = path.suffix.lower()
    is_folder = trailing_slash or path.is_dir() or not suffix
    if not is_folder and suffix not in FILE_SUFFIXES:
        raise ReducioError(f"unknown output type {path.suffix!r} of {path}: use .mp4, .gif, .webp or a folder of PNGs")
    if is_folder and suffix in FILE_SUFFIXES:
        raise ReducioError(f"{path} is a folder, but its suffix says {suffix}")
    if is_folder and path.exists() and not path.is_dir():
        raise ReducioError(f"{path} is a file: give a suffix (.mp4, .gif, .webp) or the name of a new folder")
    if is_folder and path.is_dir() and any(path.iterdir()):
        raise ReducioError(f"the output folder {path} is not empty")
    parent = path.parent
    if not parent.is_dir():
        raise ReducioError(f"the output folder {parent} does not exist")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ReducioError(f"the output folder {parent} cannot be written: {error.strerror or error}") from error
    if suffix == ".mp4":
        _ffmpeg()
    if suffix == ".webp" and not features.check("webp"):
        raise ReducioError("this build of Pillow has no WebP encoder: choose .mp4, .gif or a folder of PNGs")
    return path


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two clips of one shape [T, H, W, 3] as one [T, H, 2W, 3]."""
    if left.shape != right.shape:
        raise ReducioError(f"clips side by side need one shape; they are {list(left.shape)} and {list(right.shape)}")
    return np.concatenate([left, right], axis=2)


def _folder_frames(path: Path) -> Frames:
    def number_aware(file: Path) -> list[tuple[int, int | str]]:
        return [(0, int(s)) if s.isdigit() else (1, s) for s in re.split(r"(\d+)", file.name.lower()) if s]

    files = sorted((f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES), key=number_aware)
    if not files:
        raise ReducioError(f"the folder {path} holds no images ({' '.join(IMAGE_SUFFIXES)})")
    for file in files:
        yield read_image(file), None


def _animation_frames(path: Path) -> Frames:
    """Frames of a .gif or .webp. Encoders merge equal neighbours into one long frame; repeating undoes that."""

    def durations() -> list[int]:  # milliseconds
        with Image.open(path) as clip:
            held = []
            for index in range(getattr(clip, "n_frames", 1)):
                clip.seek(index)
                clip.load()  # WebP knows a frame's delay only once it is decoded
                held.append(clip.info.get("duration", 0))
            return held

    held = decode_image(durations, f"the clip {path}")
    shortest = min((d for d in held if d > 0), default=0)
    repeats = [max(1, round(d / shortest)) if shortest else 1 for d in held]
    fps = 1000 * sum(repeats) / sum(held) if shortest else None
    with Image.open(path) as clip:

        def frame_at(index: int) -> np.ndarray:
            clip.seek(index)
            return to_rgb(clip)

        for index, times in enumerate(repeats):
            frame = decode_image(partial(frame_at, index), f"frame {index} of {path}")
            for _ in range(times):
                yield frame, fps


def _ffmpeg_frames(path: Path) -> Frames:
    import imageio_ffmpeg

    _ffmpeg()
    reader = imageio_ffmpeg.read_frames(str(path))
    try:
        meta = next(reader)
        width, height = meta["size"]
        for raw in reader:
            yield np.frombuffer(raw, np.uint8).reshape(height, width, 3), float(meta["fps"])
    except (OSError, RuntimeError, KeyError, StopIteration) as error:
        raise ReducioError(f"the clip {path} cannot be read: {first_line(error)}") from error
    finally:
        reader.close()


def _ffmpeg() -> str:
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise ReducioError("no ffmpeg found for .mp4: pip install 'imageio[ffmpeg]', or use .gif or .webp") from error


def _write_mp4(frames: np.ndarray, path: Path, fps: float) -> None:
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ReducioError(f"an .mp4 needs an even height and width; they are {height} and {width}")
    # ffmpeg is run directly because imageio's writer does not look at its exit status: a full disk would go unnoticed.
    # BT.709 is stated and used: untagged files are decoded as BT.601 or BT.709 depending on player and size.
    colours = "-vf scale=out_color_matrix=bt709:out_range=tv -colorspace bt709 -color_primaries bt709 -color_trc bt709"
    command = [_ffmpeg(), *"-nostdin -loglevel error -y -f rawvideo -pix_fmt rgb24".split()]
    command += ["-s", f"{width}x{height}", "-r", f"{fps:.6g}", "-i", "pipe:0", *colours.split()]
    command += [*"-c:v libx264 -crf 12 -pix_fmt yuv420p -movflags +faststart".split(), str(path)]
    done = subprocess.run(command, input=frames.tobytes(), capture_output=True)
    if done.returncode:
        raise OSError(first_line(done.stderr.decode(errors="replace")) or f"ffmpeg ended with {done.returncode}")


def _write_gif(frames: np.ndarray, path: Path, fps: float) -> None:
    if fps > MAX_GIF_FPS:
        raise ReducioError(f"a .gif holds at most {MAX_GIF_FPS} frames a second; fps is {fps:g}")
    # One palette for all frames, since a palette of each frame's own makes still areas flicker; and no dither, since
    # its grain changes from frame to frame and costs 1 to 3 dB. The palette is drawn from at most 2^18 pixels: k-means
    # over sixteen frames of 1024x1024 would take most of a minute.
    pixels = frames.reshape(-1, 3)
    sample = Image.fromarray(np.ascontiguousarray(pixels[None, :: -(-len(pixels) // 2**18)]))
    palette = sample.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
    images = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    delays = [10 * d for d in _delays(len(frames), 100 / fps)]  # the format counts in hundredths of a second
    images[0].save(path, save_all=True, append_images=images[1:], duration=delays, loop=0)


def _write_webp(frames: np.ndarray, path: Path, fps: float) -> None:
    images = [Image.fromarray(f) for f in frames]
    delays = _delays(len(frames), 1000 / fps)
    images[0].save(path, save_all=True, append_images=images[1:], duration=delays, loop=0, quality=90)


def _write_folder(frames: np.ndarray, path: Path, fps: float) -> None:
    path.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{index:05d}.png")


def _delays(count: int, step: float) -> list[int]:
    """Whole delays whose sum stays within half a unit of count * step: 62, 63, 62 ... ms at 16 frames a second."""
    return [max(1, round((i + 1) * step) - round(i * step)) for i in range(count)]


def _size(frame: np.ndarray) -> str:
    return f"{frame.shape[0]}x{frame.shape[1]}"
