"""Decodes and encodes clips with the ffmpeg program: rotation and pixel aspect applied on reading, H.264 on writing."""

from __future__ import annotations

import logging
import re
import subprocess
import tempfile
from collections.abc import Generator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..system.errors import ReducioError, first_line
from ..system.paths import printable

LOG = logging.getLogger("reducio_fast")

# Exact NTSC frame rates, by the rounded value that ffmpeg prints.
NTSC = {
    rate: Fraction(nominal * 1000, 1001) for rate, nominal in ((23.98, 24), (29.97, 30), (59.94, 60), (119.88, 120))
}
# A clip with variable frame durations is read at its finest time step, up to this many frames a second. A finer step is
# the resolution of a clock (1000 a second in many screen recordings) and not a frame rate.
FINEST_RATE = 120
# Stretches non-square pixels to squares of their longer side. ffmpeg applies the container's rotation before its
# filters, and a rotation by 90 degrees turns wide pixels into tall ones.
SQUARE_PIXELS = "scale=w='if(gte(sar,1),trunc(iw*sar+0.5),iw)':h='if(gte(sar,1),ih,trunc(ih/sar+0.5))',setsar=1"

# Lines in ffmpeg's list of a file's streams.
VIDEO, COVER = re.compile(r"\s*Stream #0:\d+.*: Video: "), re.compile(r"\((attached pic|timed thumbnails)\)")


def program() -> str:
    """The path of ffmpeg. Raises ReducioError if there is none."""
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise ReducioError("no ffmpeg found for .mp4: pip install 'imageio[ffmpeg]', or use .gif or .webp") from error


def url(path: Path) -> str:
    """A file name for ffmpeg, which would read `10:30.mp4` as a protocol and `-y.mp4` as an option."""
    return f"file:{path}"


def probe(path: Path) -> Fraction:
    """Constant frame rate at which to read a file's first video stream that is not a cover image.

    At this rate the clip keeps its duration. Raises ReducioError for a file without a video.
    """
    command = [program(), "-hide_banner", "-nostdin", "-i", url(path)]
    process = _start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    text = process.communicate()[1].decode(errors="replace")
    for line in text.splitlines():
        if VIDEO.match(line) and not COVER.search(line):
            break
    else:
        reasons = [line for line in text.splitlines() if url(path) in line and "Input #0" not in line]
        reason = first_line(reasons[-1].rpartition(": ")[2]) if reasons else "it holds no video"
        raise ReducioError(f"the clip {printable(path)} cannot be read: {reason}")
    if re.search(r"smpte2084|arib-std-b67", line):
        LOG.warning("%s: is in high dynamic range, which is read without tone mapping", printable(path))
    mean, finest = _rate(line, "fps"), _rate(line, "tbr")
    if finest is None or (mean is not None and finest > max(FINEST_RATE, 1.1 * float(mean))):
        return mean or Fraction(25)  # ffmpeg's default for a stream without timestamps
    return finest


def _rate(line: str, unit: str) -> Fraction | None:
    """Parse a rate in a line of ffmpeg, such as `23.98 fps` or `1k tbr`; None if there is none or it is 0."""
    match = re.search(rf"([\d.]+)(k?) {unit}\b", line)
    if match is None:
        return None
    return NTSC.get(float(match[1]), Fraction(match[1]) * (1000 if match[2] else 1)) or None


def frames(path: Path, start: int = 0) -> Generator[tuple[np.ndarray, float], None, None]:
    """Yield each frame, uint8 [H, W, 3], from number `start` on, with the clip's rate. Closing it ends ffmpeg.

    ffmpeg seeks to the last key frame before `start`, so earlier frames are not decoded. In a clip with variable frame
    durations the first frame may be a neighbour of frame `start`.

    Raises ReducioError if no frame can be read. Of a truncated or damaged clip all readable frames are returned, with a
    warning.
    """
    rate = probe(path)
    command = [program(), *"-hide_banner -nostdin -loglevel error".split()]
    if start:  # seek half a frame early, so that rounding does not skip frame `start`
        command += ["-ss", f"{float((start - Fraction(1, 2)) / rate):.6f}"]
    command += ["-i", url(path), "-map", "0:V:0"]
    # The fps filter instead of the option -r, which loses the last frame of variable-rate clips (ffmpeg 7.0).
    command += ["-vf", f"fps={rate},{SQUARE_PIXELS}"]
    # PPM images, because each frame's header holds its size.
    command += "-f image2pipe -c:v ppm -pix_fmt rgb24 pipe:1".split()
    count = 0
    with tempfile.TemporaryFile() as stderr:
        process = _start(command, stdout=subprocess.PIPE, stderr=stderr, bufsize=1 << 20)
        try:
            assert process.stdout is not None
            while process.stdout.readline() == b"P6\n":
                width, height = (int(n) for n in process.stdout.readline().split())
                process.stdout.readline()  # the maximum value, 255
                data = process.stdout.read(3 * width * height)
                if len(data) < 3 * width * height:
                    break
                count += 1
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3), float(rate)
            process.wait()
            stderr.seek(0)
            text = stderr.read().decode(errors="replace").strip()
        finally:
            process.kill()
            process.communicate()
    if count == 0:
        raise ReducioError(f"the clip {printable(path)} cannot be read: {first_line(text or 'it holds no frame')}")
    if text or process.returncode:
        LOG.warning("%s: is cut off or damaged, %d frames could be read (%s)", printable(path), count, first_line(text))


def encode(clip: np.ndarray, path: Path, fps: float) -> None:
    """Write uint8 [T, H, W, 3], with even height and width, as H.264. Raises OSError with ffmpeg's message.

    ffmpeg runs directly, because imageio's writer ignores its exit status and so does not report a full disk.
    """
    height, width = clip.shape[1:3]
    # Convert to BT.709 and tag the file so: players decode untagged files as BT.601 or BT.709, depending on the size.
    colours = "-vf scale=out_color_matrix=bt709:out_range=tv -colorspace bt709 -color_primaries bt709 -color_trc bt709"
    command = [program(), *"-nostdin -loglevel error -y -f rawvideo -pix_fmt rgb24".split()]
    command += ["-s", f"{width}x{height}", "-r", f"{fps:.6f}", "-i", "pipe:0", *colours.split()]
    command += [*"-c:v libx264 -crf 12 -pix_fmt yuv420p -movflags +faststart".split(), url(path)]
    done = subprocess.run(command, input=clip.tobytes(), capture_output=True)
    if done.returncode:
        raise OSError(first_line(done.stderr.decode(errors="replace") or f"ffmpeg ended with {done.returncode}"))


def _start(command: list[str], **kwargs: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, **kwargs)
    except OSError as error:
        raise ReducioError(f"ffmpeg: {command[0]} cannot be run ({error.strerror})") from error
