"""Display and time metadata of containers: a clip is read with the look and the duration that players show."""

from __future__ import annotations

import logging
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reducio_fast.media import ffmpeg, video_files
from reducio_fast.media.video_files import read_video
from reducio_fast.system.errors import ReducioError

RED, BLUE = (254, 0, 0), (0, 0, 254)


def run_ffmpeg(*arguments: str | Path) -> None:
    command = [ffmpeg.program(), "-hide_banner", "-loglevel", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


def source(path: Path, *options: str, size: str = "64x48", rate: int | Fraction = 25, seconds: float = 1) -> Path:
    run_ffmpeg("-f", "lavfi", "-i", f"testsrc=s={size}:r={rate}:d={seconds}", *options, path)
    return path


@pytest.mark.parametrize(
    ("sar", "height", "width"), [("64/45", 48, 102), ("8/9", 54, 72), ("2/1", 48, 144), ("1/1", 48, 72)]
)
def test_pixels_come_out_square(tmp_path: Path, sar: str, height: int, width: int) -> None:
    clip, _ = read_video(source(tmp_path / "sar.mp4", "-vf", f"scale=72:48,setsar={sar}", "-pix_fmt", "yuv420p"))
    assert clip.shape == (25, height, width, 3)


def test_wide_pixels_of_a_rotated_clip_make_it_tall(tmp_path: Path) -> None:
    plain = source(tmp_path / "plain.mp4", "-vf", "scale=64:48,setsar=2/1", "-pix_fmt", "yuv420p")
    run_ffmpeg("-display_rotation", "90", "-i", plain, "-c", "copy", tmp_path / "turned.mp4")
    assert read_video(tmp_path / "turned.mp4", count=1)[0].shape == (1, 128, 48, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_frames_from_the_middle_are_those_of_the_whole_clip(tmp_path: Path, suffix: str) -> None:
    """The timestamps of an .mkv are whole milliseconds, an .avi has none; the video begins half a second late."""
    sound = ["-f", "lavfi", "-i", "sine=d=4", "-itsoffset", "0.52"] if suffix != ".avi" else []
    film = ["-f", "lavfi", "-i", "testsrc2=s=64x48:r=24:d=4"]
    streams = ["-map", "0:a", "-map", "1:v"] if sound else ["-map", "0:v"]
    run_ffmpeg(*sound, *film, *streams, tmp_path / f"film{suffix}")
    whole = [frame for frame, _ in ffmpeg.frames(tmp_path / f"film{suffix}")]
    for start in (1, 37, 70):
        part = [frame for frame, _ in ffmpeg.frames(tmp_path / f"film{suffix}", start)]
        np.testing.assert_array_equal(part, whole[start:])


def pictures(folder: Path, durations: list[float], suffix: str) -> Path:
    """A clip with variable frame durations: frame i has the gray value 20 * i and lasts `durations[i]` seconds."""
    lines = []
    for i, seconds in enumerate(durations):
        Image.new("RGB", (32, 32), (20 * i,) * 3).save(folder / f"{i}.png")
        lines += [f"file {folder / f'{i}.png'}", f"duration {seconds}"]
    (folder / "list").write_text("\n".join([*lines, lines[-2]]))
    path = folder / f"clip{suffix}"
    run_ffmpeg(
        "-f", "concat", "-safe", "0", "-i", folder / "list", "-fps_mode", "vfr", "-t", str(sum(durations)),
        "-pix_fmt", "yuv420p", path,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize("durations", [[0.04] * 5 + [2.0] + [0.04] * 5, [0.5, 0.1, 0.1, 1.3], [0.2] * 6])
@pytest.mark.slow
def test_variable_frame_durations_are_kept(tmp_path: Path, durations: list[float], suffix: str) -> None:
    clip, fps = read_video(pictures(tmp_path, durations, suffix))
    assert fps is not None and fps <= 120
    grey = clip[:, 16, 16, 1].astype(float)
    for i, seconds in enumerate(durations[:-1]):  # a container does not store the duration of its last frame
        shown = (np.abs(grey - 20 * i) < 8).sum() / fps
        assert shown == pytest.approx(seconds, abs=1.01 / fps), f"frame {i} of {grey}"


def test_timestamps_in_milliseconds_are_not_a_frame_rate(tmp_path: Path) -> None:
    """Screen recorders write the arrival time of each picture in milliseconds."""
    clip, fps = read_video(pictures(tmp_path, [0.033, 0.034, 0.033, 0.041, 0.027, 0.032] * 2, ".webm"))
    assert fps is not None and len(clip) / fps == pytest.approx(0.4, abs=0.08) and len(clip) < 40


def test_a_clip_of_1000_frames_a_second_keeps_its_rate(tmp_path: Path) -> None:
    clip, fps = read_video(source(tmp_path / "fast.mp4", rate=1000, seconds=0.05))
    assert (len(clip), fps) == (50, 1000)


@pytest.mark.parametrize("rate", ["24000/1001", "30000/1001", "60000/1001"])
def test_broadcast_rates_are_read_exactly(tmp_path: Path, rate: str) -> None:
    path = tmp_path / "clip.mp4"
    run_ffmpeg("-f", "lavfi", "-i", f"testsrc=s=32x32:r={rate}:d=1", path)
    numerator, denominator = map(int, rate.split("/"))
    assert read_video(path)[1] == pytest.approx(numerator / denominator, rel=1e-9)


def test_a_cover_picture_is_not_the_clip(tmp_path: Path) -> None:
    Image.new("RGB", (640, 480), RED).save(tmp_path / "cover.png")
    run_ffmpeg(
        "-i", tmp_path / "cover.png", "-i", source(tmp_path / "clip.mp4"), "-map", "0", "-map", "1", "-c", "copy",
        "-disposition:v:0", "attached_pic", tmp_path / "both.mp4",
    )  # fmt: skip
    clip, fps = read_video(tmp_path / "both.mp4")
    assert clip.shape == (25, 48, 64, 3) and fps == 25


@pytest.mark.parametrize(
    ("pixels", "picture"), [("yuv420p", "color=0x3264c8"), ("yuv444p", "testsrc"), ("gbrp", "testsrc")]
)
@pytest.mark.parametrize("bits", ["10le", "12le"])
@pytest.mark.slow
def test_10_and_12_bits_are_read_as_8(tmp_path: Path, pixels: str, picture: str, bits: str) -> None:
    """4:2:0 uses a plain colour, because at hard edges ffmpeg interpolates the chroma of the two depths differently."""
    clips = []
    for depth in ("", bits):
        path = tmp_path / f"{depth}.mkv"
        start = f"{picture}{':' if '=' in picture else '='}s=64x48:r=25:d=1"
        run_ffmpeg("-f", "lavfi", "-i", start, "-c:v", "ffv1", "-pix_fmt", pixels + depth, path)
        clips.append(read_video(path)[0].astype(int))
    difference = np.abs(clips[0] - clips[1])
    assert clips[0].max() > 100 and difference.mean() < 1 and difference.max() <= 6


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
@pytest.mark.parametrize("share", [0.4, 0.8])
@pytest.mark.slow
def test_a_truncated_clip_gives_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, share: float
) -> None:
    path = source(tmp_path / name, "-c:v", "libx264", "-movflags", "+faststart", size="320x240", seconds=4)
    whole = path.read_bytes()
    assert len(read_video(path)[0]) == 100 and not caplog.messages
    path.write_bytes(whole[: int(share * len(whole))])
    with caplog.at_level(logging.WARNING):
        clip, _ = read_video(path)
    assert 0 < len(clip) < 100
    if name != "clip.ts":  # a transport stream may end anywhere
        assert (
            len(caplog.messages) == 1 and f"cut off or damaged, {len(clip)} frames could be read" in caplog.messages[0]
        )


@pytest.mark.parametrize(("name", "rate"), [("raw.h264", 25), ("slow.mkv", Fraction(1, 3))])
def test_frames_are_not_read_twice(tmp_path: Path, name: str, rate: int | Fraction) -> None:
    """The decoder of H.264 counts in fields; ffmpeg then names twice the rate as the finest step."""
    clip, fps = read_video(source(tmp_path / name, "-c:v", "libx264", rate=rate, seconds=float(5 / rate)))
    assert len(clip) == 5 and fps == pytest.approx(float(rate), abs=0.01)


def test_a_file_without_video_is_refused(tmp_path: Path) -> None:
    run_ffmpeg("-f", "lavfi", "-i", "sine=d=0.2", tmp_path / "sound.m4a")
    (tmp_path / "text.mp4").write_text("no clip")
    for name in ("sound.m4a", "text.mp4"):
        with pytest.raises(ReducioError, match=f"{name} cannot be read: "):
            read_video(tmp_path / name)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize(("delay", "fps"), [(10, 10), (20, 50), (0, 10), (40, 25)])
def test_short_delays_are_read_as_browsers_show_them(tmp_path: Path, suffix: str, delay: int, fps: float) -> None:
    frames = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(4)]
    path = tmp_path / f"clip{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=delay, loop=0)
    assert read_video(path)[1] == pytest.approx(fps)


@settings(deadline=None, max_examples=25)
@given(fps=st.floats(0.5, 90), suffix=st.sampled_from([".gif", ".webp"]))
def test_readers_agree_with_writers(tmp_path_factory: pytest.TempPathFactory, fps: float, suffix: str) -> None:
    clip = np.stack([np.full((16, 16, 3), 16 * i, np.uint8) for i in range(12)])
    path = tmp_path_factory.mktemp("clips") / f"clip{suffix}"
    if suffix == ".gif" and fps > video_files.MAX_GIF_FPS:
        with pytest.raises(ReducioError, match="at most 50"):
            video_files.write_video(clip, path, fps)
        return
    back, rate = read_video(video_files.write_video(clip, path, fps))
    unit = 100 if suffix == ".gif" else 1000
    assert rate is not None and abs(len(back) / rate - len(clip) / fps) <= 0.51 / unit + 1 / rate
    with pytest.raises(ReducioError, match="at most"):
        video_files.write_video(clip, path, 101)


def test_other_files_among_frames_are_left_alone(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "._0.png").write_bytes(b"\x00\x05\x16\x07")  # as macOS writes beside each file
    (tmp_path / "Thumbs.db").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "old.png").mkdir()
    assert read_video(tmp_path)[0][:, 0, 0, 0].tolist() == [0, 40, 80]
