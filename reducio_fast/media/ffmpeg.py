"""Decodes and encodes clips with the ffmpeg program: rotation and pixel aspect applied on reading, H.264 on writing."""

from __future__ import annotations

import functools
import logging
import re
import subprocess
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..system.errors import ReducioError, check_word, first_line
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

OPENING = "Error opening input file"
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
        # Versions before 7.1 name the file in the line of the reason; later ones have a line without a reason as well.
        lines = [line for line in text.splitlines() if "Input #0" not in line and not line.startswith(OPENING)]
        reasons = [line for line in lines if url(path) in line or "Error opening input: " in line]
        reason = first_line(reasons[-1].rpartition(": ")[2]) if reasons else "it holds no video"
        raise ReducioError(f"the clip {printable(path)} cannot be read: {reason}")
    if re.search(r"smpte2084|arib-std-b67", line):
        LOG.warning("%s: is in high dynamic range, which is read without tone mapping", printable(path))
    mean, finest = _rate(line, "fps"), _rate(line, "tbr")
    if mean is not None and finest is not None and abs(finest - 2 * mean) <= max(mean, Fraction(1)) / 50:
        return mean  # the decoder counts in fields: each frame of a raw .h264 would be read twice
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

    ffmpeg seeks to the last key frame before `start`, so earlier frames are not decoded; an .avi, which has no
    timestamps, is decoded from its beginning. In a clip with variable frame durations the first frames may be the
    neighbour of frame `start`, if that frame lasts from before.

    Raises ReducioError if no frame can be read. Of a truncated or damaged clip all readable frames are returned, with a
    warning.
    """
    rate = probe(path)
    dropped = start if path.suffix.lower() == ".avi" else 0
    command = [program(), *"-hide_banner -nostdin -loglevel error".split()]
    # The fps filter instead of the option -r, which loses the last frame of variable-rate clips (ffmpeg 7.0).
    numbered = f"fps={rate}"
    if start > dropped:
        # Half a frame early, so that rounding does not skip frame `start`. The filter gets the file's own timestamps
        # (-copyts), by which it numbers the frames as in a read from the beginning: with those that count from the
        # seek, all frames of .mkv and .webm, whose timestamps are rounded to milliseconds, came one too late.
        seconds = float((start - Fraction(1, 2)) / rate)
        command += ["-copyts", "-start_at_zero", "-ss", f"{seconds:.6f}"]
        numbered += f":start_time={float(start / rate):.6f},setpts=PTS-STARTPTS"
    command += ["-i", url(path), "-map", "0:V:0"]
    command += ["-vf", f"{numbered},{SQUARE_PIXELS}"]
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
                if dropped:
                    dropped -= 1
                    continue
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


@dataclass(frozen=True, slots=True)
class Encoder:
    """An H.264 encoder of ffmpeg: its options, and in `before` those that must precede the input."""

    name: str
    options: str
    before: str = ""
    filters: str = ""


# Both software encoders have the same quality. For 16x1024x1024, a photograph under a camera move with a grain of +-6,
# on a Xeon with AMX: medium 4.9 CPU-s, 4.2 MB, 35.93 dB; veryfast 1.6 CPU-s, 4.0 MB, 35.94 dB.
SOFTWARE = {
    "quality": Encoder("libx264", "-preset medium -crf 12"),
    "fast": Encoder("libx264", "-preset veryfast -crf 11"),
}
# Constant quality near that of crf 12, on each encoder's own scale.
HARDWARE = (
    Encoder("h264_nvenc", "-preset p4 -rc vbr -cq 16 -b:v 0"),
    Encoder("h264_qsv", "-global_quality 16"),
    Encoder("h264_amf", "-rc cqp -qp_i 16 -qp_p 16"),
    Encoder("h264_vaapi", "-rc_mode CQP -qp 16", "-vaapi_device /dev/dri/renderD128", ",format=nv12,hwupload"),
)
# How to encode an .mp4: on the CPU; fast on the CPU; by hardware or with an error; by hardware if it works, else fast.
ENCODINGS = (*SOFTWARE, "hardware", "auto")
TRIAL_SIDE = 256  # pixels: hardware encoders refuse smaller pictures than about 145


def encoder(word: str = "quality") -> Encoder:
    """The encoder for an option of ENCODINGS on this machine. Raises ReducioError for an unknown option, and for
    "hardware" if no hardware encoder works."""
    check_word("encoding", word, ENCODINGS)
    if word in SOFTWARE:
        return SOFTWARE[word]
    hardware = hardware_encoder()
    if hardware is None and word == "hardware":
        names = ", ".join(each.name for each in HARDWARE)
        raise ReducioError(
            f"encoding: 'hardware' asked for, and none of {names} works here; 'auto' takes what there is"
        )
    return SOFTWARE["fast"] if hardware is None else hardware


@functools.cache
def hardware_encoder() -> Encoder | None:
    """The first hardware encoder that encodes a small clip here; None if none does. Tried once per process, because an
    ffmpeg that lists an encoder may lack its driver."""
    black = np.zeros((2, TRIAL_SIDE, TRIAL_SIDE, 3), np.uint8)
    with tempfile.TemporaryDirectory() as scratch:
        for candidate in HARDWARE:
            try:
                encode(black, Path(scratch) / "trial.mp4", 16.0, candidate)
                return candidate
            except OSError as error:
                LOG.info("%s: not used: %s", candidate.name, error)
    return None


def encode(clip: np.ndarray, path: Path, fps: float, by: Encoder = SOFTWARE["quality"]) -> None:
    """Write uint8 [T, H, W, 3], with even height and width, as H.264. Raises OSError with ffmpeg's message.

    ffmpeg runs directly, because imageio's writer ignores its exit status and so does not report a full disk.
    """
    height, width = clip.shape[1:3]
    # Convert to BT.709 and tag the file so: players decode untagged files as BT.601 or BT.709, depending on the size.
    scale = f"scale=out_color_matrix=bt709:out_range=tv{by.filters}"
    colours = "-colorspace bt709 -color_primaries bt709 -color_trc bt709"
    command = [program(), *"-nostdin -loglevel error -y".split(), *by.before.split()]
    command += [*"-f rawvideo -pix_fmt rgb24".split(), "-s", f"{width}x{height}", "-r", f"{fps:.6f}", "-i", "pipe:0"]
    command += ["-vf", scale, *colours.split(), "-c:v", by.name, *by.options.split()]
    command += [] if by.filters else ["-pix_fmt", "yuv420p"]
    command += [*"-movflags +faststart".split(), url(path)]
    done = subprocess.run(command, input=clip.tobytes(), capture_output=True)
    if done.returncode:
        raise OSError(first_line(done.stderr.decode(errors="replace") or f"ffmpeg ended with {done.returncode}"))


def _start(command: list[str], **kwargs: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, **kwargs)
    except OSError as error:
        raise ReducioError(f"ffmpeg: {command[0]} cannot be run ({error.strerror})") from error
