"""Read and write clips: .mp4, .gif, .webp or a folder of images, always as uint8 [T, H, W, 3] in RGB.

Outputs are written under a temporary name in their folder and renamed when complete, so a crash, a full disk or Ctrl-C
leaves either the complete file or none.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Generator
from functools import partial
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
from PIL import Image, features

from ..system.atomic_files import written_whole
from ..system.errors import ReducioError, first_line, shown
from ..system.paths import check_output_folder, entries, is_file, is_folder, named, printable, status
from ..system.real_numbers import to_float
from . import ffmpeg
from .image_files import IMAGE_SUFFIXES, decode_image, read_image, to_rgb

FILE_SUFFIXES = (".mp4", ".gif", ".webp")
Frames = Generator[tuple[np.ndarray, float | None], None, None]  # frames of a clip, each with the clip's rate
# Browsers show a frame of a .gif or .webp with a delay of 10 ms or less for 100 ms, so the reader does the same.
SHORTEST_DELAY, REPLACED_BY = 10, 100
MAX_GIF_FPS = 50  # delays of a .gif are whole hundredths of a second
MAX_GIF_DELAY = 2**16 - 1  # of those
MAX_MP4_FPS = 1_000_000  # ffmpeg writes faster clips at this rate, without a word
MAX_WEBP_FPS = 90  # delays of a .webp are whole milliseconds
DESCRIPTION = 0x010E  # the EXIF tag of a picture's description
STATEMENT = r"(\d{1,9}) frames, (\d{1,6}(?:\.\d{1,17})?(?:e-\d{1,3})?) a second"
MAX_RATES = 1000  # that are tried for a .gif or .webp that does not say its own
TRIAL_RATE, TRIAL_SIDE = 16.0, 32  # frames a second and side in pixels of the clip that `check_output_path` writes


def read_video(path: str | os.PathLike, start: int = 0, count: int | None = None) -> tuple[np.ndarray, float | None]:
    """Frames `start` to `start + count` of a clip, uint8 [T, H, W, 3], and its frames per second (None for a folder).

    Rotation is applied and pixels are square. Fewer frames are returned if the clip ends earlier; `count=None` reads to
    the end. A clip with variable frame durations is read at a constant rate, and frames of longer duration are
    repeated. Of a truncated clip all readable frames are returned, with a warning. Raises ReducioError if there is
    nothing to read or no frame can be read.
    """
    path = Path(path)
    if start < 0 or (count is not None and count < 1):
        raise ReducioError(f"start must be at least 0 and count at least 1; they are {start} and {count}")
    if status(path) is None:
        raise ReducioError(f"no such file or folder: {printable(path)}")
    frames_fps: Frames
    if is_folder(path):
        frames_fps = _folder_frames(path)
    elif path.suffix.lower() in (".gif", ".webp"):
        frames_fps = _animation_frames(path)
    else:
        frames_fps = ffmpeg.frames(path)
    start, stop = min(start, sys.maxsize), None if count is None else min(start + count, sys.maxsize)
    fps, frames = None, list[np.ndarray]()
    with contextlib.closing(frames_fps):  # ends ffmpeg at once if the clip continues
        for frame, fps in islice(frames_fps, start, stop):  # noqa: B007 - the last rate is the clip's rate
            if frames and frame.shape != frames[0].shape:
                raise ReducioError(
                    f"{path}: frame {start + len(frames)} is {_size(frame)}, the first is {_size(frames[0])}"
                )
            frames.append(frame)
    if not frames:
        raise ReducioError(f"{path} holds no frame from number {start} on")
    return np.stack(frames), fps


def write_video(frames: np.ndarray, path: str | os.PathLike, fps: float, encoding: str = "quality") -> Path:
    """Write uint8 [T, H, W, 3] as .mp4 (H.264), .gif, .webp or, if `path` has no suffix, a folder of numbered PNGs.

    PNGs are lossless, the other formats lossy. `encoding` chooses the encoder of an .mp4, see `ffmpeg.ENCODINGS`.
    Raises ReducioError for frames of another shape or type, a path that `check_output_path` refuses, an odd size of an
    .mp4, or a failed write, which leaves no partial file.
    """
    path = check_output_path(path, trial=False)
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or frames.size == 0:
        raise ReducioError(f"frames must be uint8 [T, H, W, 3]; they are {frames.dtype} {list(frames.shape)}")
    rate = to_float(fps)
    if not 0 < rate < math.inf:
        raise ReducioError(f"fps must be a positive number; it is {shown(fps)}")
    by = ffmpeg.encoder(encoding)
    try:
        with written_whole(path) as temporary:
            _writer(path, by)(frames, temporary, rate)
    except Exception as error:
        raise _cannot_write(path, error) from error
    return path


def check_output_path(
    path: str | os.PathLike[str],
    fps: float = TRIAL_RATE,
    height: int | None = None,
    width: int | None = None,
    trial: bool = True,
    encoding: str = "quality",
) -> Path:
    """Check before any work whether a clip can be written to `path`; return it as a Path.

    Tests encoder, size and rate by `check_format`; `trial=False` skips this if the clip is written right away. Tests
    the output folder by creating an empty temporary file. Raises ReducioError for an unknown suffix, a folder of frames
    that is not empty, and every error that the write would raise.
    """
    path = _check_name(path)
    if trial:
        check_format(path, fps, height, width, encoding)
    check_output_folder(path)
    return path


def check_format(
    path: str | os.PathLike[str],
    fps: float = TRIAL_RATE,
    height: int | None = None,
    width: int | None = None,
    encoding: str = "quality",
) -> None:
    """Raise ReducioError, with the message of a failed write, if no clip of this suffix, rate and size can be encoded.

    Writes two black frames of `height` x `width` (small if unknown) at `fps` into the folder for temporary files, which
    takes 0.1 s for .mp4. Nothing is written to `path`.
    """
    path, by = Path(path), ffmpeg.encoder(encoding)
    side = TRIAL_SIDE if by in ffmpeg.SOFTWARE.values() else ffmpeg.TRIAL_SIDE
    black = np.zeros((2, height or side, width or side, 3), np.uint8)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            _writer(path, by)(black, Path(scratch) / f"trial{path.suffix}", fps)
        except Exception as error:
            raise _cannot_write(path, error) from error


def numbered(path: str | os.PathLike[str], count: int) -> list[Path]:
    """NAME-0.SUFFIX, NAME-1.SUFFIX ...: where the clips of a list are written. Raises ReducioError for no NAME."""
    path = named(path)
    _refuse_bare_suffix(path)
    return [path.parent / f"{path.stem}-{i}{path.suffix}" for i in range(count)]


def _refuse_bare_suffix(path: Path) -> None:
    if path.name.lower() in FILE_SUFFIXES:
        raise ReducioError(f"the output {printable(path)} is a suffix without a name: write clip{path.name}")


def _check_name(path: str | os.PathLike[str]) -> Path:
    trailing_slash = os.fspath(path).endswith(os.sep)
    path = named(path)
    suffix = path.suffix.lower()
    exists, is_directory = status(path) is not None, is_folder(path)
    is_clip_folder = trailing_slash or is_directory or not suffix
    if not is_directory:
        _refuse_bare_suffix(path)
    if not is_clip_folder and suffix not in FILE_SUFFIXES:
        raise ReducioError(
            f"unknown output type {path.suffix!r} of {printable(path)}: use .mp4, .gif, .webp or a folder of PNGs"
        )
    if is_clip_folder and suffix in FILE_SUFFIXES:
        raise ReducioError(f"{printable(path)} is a folder, but its suffix says {suffix}")
    if is_clip_folder and exists and not is_directory:
        raise ReducioError(
            f"{printable(path)} is a file: give a suffix (.mp4, .gif, .webp) or the name of a new folder"
        )
    if is_directory and entries(path):
        raise ReducioError(f"the output folder {printable(path)} is not empty")
    return path


def _writer(path: Path, by: ffmpeg.Encoder = ffmpeg.SOFTWARE["quality"]) -> Callable[[np.ndarray, Path, float], None]:
    writers: dict[str, Callable[[np.ndarray, Path, float], None]] = {
        ".mp4": partial(_write_mp4, by=by),
        ".gif": _write_gif,
        ".webp": _write_webp,
    }
    return writers.get(path.suffix.lower(), _write_folder)


def _cannot_write(path: Path, error: Exception) -> ReducioError:
    """Convert an encoder's error; Pillow's encoders raise OSError, ValueError, struct.error and more."""
    if isinstance(error, ReducioError):
        return error
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return ReducioError(f"cannot write {printable(path)}: {reason}")


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Join two clips of equal shape [T, H, W, 3] into one [T, H, 2W, 3]."""
    if left.shape != right.shape:
        raise ReducioError(f"clips side by side must have one shape, not {list(left.shape)} and {list(right.shape)}")
    return np.concatenate([left, right], axis=2)


def _folder_frames(path: Path) -> Frames:
    def number_aware(file: Path) -> list[tuple[int, int | str]]:
        return [(0, int(s)) if s.isdecimal() else (1, s) for s in re.split(r"(\d+)", file.name.lower()) if s]

    # Hidden files are skipped: macOS writes a file `._00001.png` without an image beside each frame.
    images = (f for f in entries(path) if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith("."))
    files = sorted((f for f in images if is_file(f)), key=number_aware)
    if not files:
        raise ReducioError(f"the folder {printable(path)} holds no images ({' '.join(IMAGE_SUFFIXES)})")
    for file in files:
        yield read_image(file), None


def _animation_frames(path: Path) -> Frames:
    """Frames of a .gif or .webp. Encoders merge equal consecutive frames into one of long duration; it is repeated."""

    def timing() -> tuple[list[int], str]:  # milliseconds of each frame, and what the writer of a file says about it
        with Image.open(path) as clip:
            held = []
            comment = clip.info.get("comment", b"")  # of a .gif
            stated = str(clip.getexif().get(DESCRIPTION, "")) or comment.decode("ascii", "replace")
            for index in range(getattr(clip, "n_frames", 1)):
                clip.seek(index)
                clip.load()  # Pillow sets the delay of a WebP frame only when it decodes the frame
                held.append(clip.info.get("duration", 0))
            return held, stated

    held, stated = decode_image(timing, f"the clip {path}")
    if len(held) > 1:
        held = [d if d > SHORTEST_DELAY else REPLACED_BY for d in held]
    repeats, fps = _as_stated(held, stated) or _repeats(held, 10 if path.suffix.lower() == ".gif" else 1)
    with Image.open(path) as clip:

        def frame_at(index: int) -> np.ndarray:
            clip.seek(index)
            return to_rgb(clip)

        for index, times in enumerate(repeats):
            frame = decode_image(partial(frame_at, index), f"frame {index} of {path}")
            for _ in range(times):
                yield frame, fps


def _as_stated(held: list[int], stated: str) -> tuple[list[int], float] | None:
    """How often each frame is shown, and the rate, if `stated` is what `_statement` writes and agrees with the times
    that the frames are held; a program that changed the clip may have kept the comment."""
    match = re.fullmatch(STATEMENT, stated)
    if match is None:
        return None
    count, fps = int(match[1]), float(match[2])
    ends = [round(end * fps / 1000) for end in accumulate(held)]
    if ends == [0]:  # a .webp of equal frames is one picture, which has no duration
        ends = [count]
    repeats = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return (repeats, fps) if ends[-1] == count and min(repeats) > 0 else None


def _repeats(held: list[int], unit: int) -> tuple[list[int], float | None]:
    """How often each frame is shown at a constant rate, and the rate. `unit`: milliseconds to which delays are rounded.

    The shortest delay is one frame if all are multiples of it. Else it is the slowest rate at which every frame ends
    within half a unit of its time, since encoders spread the rounding: 16 frames a second have delays of 60 and 70 ms.
    """
    total, shortest = sum(held), min((d for d in held if d > 0), default=0)
    if not shortest:
        return [1] * len(held), None
    if not any(d % shortest for d in held):
        return [max(1, d // shortest) for d in held], 1000 / shortest
    ends = np.cumsum(held)
    slowest = max(len(held), math.ceil(total / (shortest + unit)))
    for count in range(slowest, min(math.ceil(total / shortest), slowest + MAX_RATES) + 1):
        numbers = np.rint(ends * count / total)
        late = np.abs(numbers * total / count - ends).max() > unit / 2
        shown_times = np.diff(numbers, prepend=0)
        if not late and shown_times.min() > 0:
            return [int(n) for n in shown_times], 1000 * count / total
    repeats = [max(1, round(d / shortest)) for d in held]
    return repeats, 1000 * sum(repeats) / total


def _statement(count: int, fps: float) -> str:
    """What a .gif or .webp says about itself: encoders merge equal frames, so that the number would be lost."""
    return f"{count} frames, {float(fps)!r} a second"


def _write_mp4(frames: np.ndarray, path: Path, fps: float, by: ffmpeg.Encoder) -> None:
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ReducioError(f"an .mp4 needs an even height and width; they are {height} and {width}")
    if fps > MAX_MP4_FPS:
        raise ReducioError(f"an .mp4 holds at most {MAX_MP4_FPS} frames a second; fps is {fps:g}")
    ffmpeg.encode(frames, path, fps, by)


def _write_gif(frames: np.ndarray, path: Path, fps: float) -> None:
    if fps > MAX_GIF_FPS:
        raise ReducioError(f"a .gif holds at most {MAX_GIF_FPS} frames a second; fps is {fps:g}")
    if 100 / fps > MAX_GIF_DELAY:
        raise ReducioError(f"a .gif holds a frame for at most {MAX_GIF_DELAY / 100:g} s; fps is {fps:g}")
    # One palette for all frames, because a palette per frame makes still areas flicker. No dither, because its grain
    # changes from frame to frame and costs 1 to 3 dB. The palette is computed from at most 2^18 pixels: k-means over
    # sixteen frames of 1024x1024 would take most of a minute.
    pixels = frames.reshape(-1, 3)
    sample = Image.fromarray(np.ascontiguousarray(pixels[None, :: -(-len(pixels) // 2**18)]))
    palette = sample.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
    images = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    delays = [10 * d for d in _delays(len(frames), 100 / fps)]  # the format counts in hundredths of a second
    comment = _statement(len(frames), fps).encode()
    images[0].save(path, save_all=True, append_images=images[1:], duration=delays, loop=0, comment=comment)


def _write_webp(frames: np.ndarray, path: Path, fps: float) -> None:
    if not features.check("webp"):
        raise ReducioError("this build of Pillow has no WebP encoder: choose .mp4, .gif or a folder of PNGs")
    if fps > MAX_WEBP_FPS:
        raise ReducioError(f"a .webp holds at most {MAX_WEBP_FPS} frames a second; fps is {fps:g}")
    images = [Image.fromarray(f) for f in frames]
    delays = _delays(len(frames), 1000 / fps)
    exif = Image.Exif()
    exif[DESCRIPTION] = _statement(len(frames), fps)
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=delays, loop=0, quality=90, exif=exif.tobytes()
    )


def _write_folder(frames: np.ndarray, path: Path, fps: float) -> None:
    path.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{index:05d}.png")


def _delays(count: int, step: float) -> list[int]:
    """Whole delays whose sum stays within half a unit of count * step: 62, 63, 62 ... ms at 16 frames a second."""
    return [max(1, round((i + 1) * step) - round(i * step)) for i in range(count)]


def _size(frame: np.ndarray) -> str:
    return f"{frame.shape[0]}x{frame.shape[1]}"
