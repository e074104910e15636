"""Clips and images: written clips are read back, and unreadable or unwritable files give one-line errors."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio

from reducio_fast.media import image_files, video_files
from reducio_fast.system.errors import ReducioError


def panning(height: int = 80, width: int = 112, frames: int = 16) -> np.ndarray:
    """A moving window over a photograph, uint8 [frames, height, width, 3]."""
    photo = astronaut()
    return np.stack([photo[40 + t : 40 + t + height, 150 + 3 * t : 150 + 3 * t + width] for t in range(frames)])


def left_behind(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def test_folder_of_pngs_is_exact(tmp_path: Path) -> None:
    clip = panning(frames=12)
    video_files.write_video(clip, tmp_path / "frames", fps=16)
    assert left_behind(tmp_path / "frames") == [f"{i:05d}.png" for i in range(12)]
    back, fps = video_files.read_video(tmp_path / "frames")
    np.testing.assert_array_equal(back, clip)
    assert fps is None


# 256 colours limit the PSNR of .gif; the quality setting and chroma at half resolution limit .webp and .mp4.
@pytest.mark.parametrize(("suffix", "bound"), [(".mp4", 34), (".MP4", 34), (".webp", 33), (".gif", 30)])
@pytest.mark.parametrize("fps", [16, 24, 7.5, np.int64(8), Fraction(15, 2)])
@pytest.mark.slow
def test_round_trip(tmp_path: Path, suffix: str, bound: float, fps: float) -> None:
    clip = panning()  # 80 and 112 are not multiples of the sizes to which encoders round
    path = video_files.write_video(clip, tmp_path / f"clip{suffix}", fps)
    assert left_behind(tmp_path) == [path.name]
    back, read_fps = video_files.read_video(path)
    assert back.shape == clip.shape and back.dtype == np.uint8
    assert min(peak_signal_noise_ratio(a, b) for a, b in zip(clip, back, strict=True)) > bound
    assert read_fps == pytest.approx(fps, rel=0.03)


def test_colours_survive_mp4(tmp_path: Path) -> None:
    """A file tagged with one colour matrix and encoded with another shifts saturated colours by 10 and more."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 255, 255]])
    clip = np.repeat(np.repeat(np.repeat(colours[None, None], 4, 0), 16, 1), 16, 2).astype(np.uint8)
    back, _ = video_files.read_video(video_files.write_video(clip, tmp_path / "c.mp4", 16))
    assert np.abs(back[:, 8, 8::16].astype(int) - colours).max() <= 3


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("lengths", [(1,), (16,), (8, 8), (15, 1), (40, 2)], ids=str)
def test_no_frame_is_lost_among_equal_ones(tmp_path: Path, lengths: tuple[int, ...], suffix: str) -> None:
    clip = np.concatenate([np.full((n, 16, 16, 3), 200 * (i + 1) % 255, np.uint8) for i, n in enumerate(lengths)])
    back, fps = video_files.read_video(video_files.write_video(clip, tmp_path / f"c{suffix}", 16))
    assert (len(back), fps) == (len(clip), 16.0)
    assert np.abs(back.astype(int) - clip).max() < 8


@pytest.mark.parametrize(
    ("held", "frames", "fps"),
    [([60, 60, 70, 60] * 4, 16, 16.0), ([40, 40, 40, 80], 5, 25.0), ([20, 20, 600], 32, 50.0), ([100] * 7, 7, 10.0)],
)
def test_a_gif_of_another_program(tmp_path: Path, held: list[int], frames: int, fps: float) -> None:
    images = [Image.new("RGB", (8, 8), (30 * i % 255, 0, 0)) for i in range(len(held))]
    for comment in (b"", b"9 frames, 3.0 a second", b"9 frames, 1e9 a second"):  # of the clip before it was cut
        images[0].save(tmp_path / "c.gif", save_all=True, append_images=images[1:], duration=held, comment=comment)
        back, rate = video_files.read_video(tmp_path / "c.gif")
        assert len(back) == frames and rate == pytest.approx(fps)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_still_stretches_keep_their_length(tmp_path: Path, suffix: str) -> None:
    """Encoders merge equal frames into one with a longer delay."""
    clip = np.zeros((16, 32, 48, 3), np.uint8)
    clip[5:, 8:24, 8:24] = (255, 0, 0)
    clip[12:, 8:24, 24:40] = (0, 0, 255)
    clip[13:, :8] = 255
    back, fps = video_files.read_video(video_files.write_video(clip, tmp_path / f"c{suffix}", 10))
    assert fps == pytest.approx(10)
    assert back.shape == clip.shape
    assert np.abs(back.astype(int) - clip).mean() < 3


@pytest.mark.parametrize("suffix", ["", ".mp4", ".gif", ".webp"])
def test_read_a_part(tmp_path: Path, suffix: str) -> None:
    path = video_files.write_video(panning(), tmp_path / f"c{suffix}", 16)
    whole, _ = video_files.read_video(path)
    part, _ = video_files.read_video(path, start=5, count=4)
    np.testing.assert_array_equal(part, whole[5:9])
    assert len(video_files.read_video(path, start=14, count=16)[0]) == 2
    with pytest.raises(ReducioError, match="no frame from number 16 on"):
        video_files.read_video(path, start=16)


def test_folder_order_counts_numbers(tmp_path: Path) -> None:
    for value in (2, 10, 1):
        Image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / f"frame{value}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    clip, _ = video_files.read_video(tmp_path)
    assert clip[:, 0, 0, 0].tolist() == [1, 2, 10]


def test_reading_refuses(tmp_path: Path) -> None:
    with pytest.raises(ReducioError, match="no such file or folder: .*absent.mp4"):
        video_files.read_video(tmp_path / "absent.mp4")
    with pytest.raises(ReducioError, match="holds no images"):
        video_files.read_video(tmp_path)
    for name in ("broken.mp4", "broken.gif", "broken.webp"):
        (tmp_path / name).write_bytes(b"not a clip" * 100)
        with pytest.raises(ReducioError, match=f"{name} cannot be read"):
            video_files.read_video(tmp_path / name)
    folder = tmp_path / "uneven"
    folder.mkdir()
    Image.new("RGB", (8, 6)).save(folder / "0.png")
    Image.new("RGB", (8, 4)).save(folder / "1.png")
    with pytest.raises(ReducioError, match="frame 1 is 4x8, the first is 6x8"):
        video_files.read_video(folder)


def test_truncated_gif_is_refused(tmp_path: Path) -> None:
    path = video_files.write_video(panning(), tmp_path / "c.gif", 16)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ReducioError, match="cannot be read"):
        video_files.read_video(path)


@pytest.mark.parametrize(
    ("frames", "path", "fps", "message"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), "c.mp4", 16, r"float32 \[2, 32, 32, 3\]"),
        (np.zeros((2, 3, 32, 32), np.uint8), "c.mp4", 16, r"uint8 \[2, 3, 32, 32\]"),
        (np.zeros((0, 32, 32, 3), np.uint8), "c.mp4", 16, r"\[0, 32, 32, 3\]"),
        (np.zeros((2, 31, 32, 3), np.uint8), "c.mp4", 16, "even height and width; they are 31 and 32"),
        (np.zeros((2, 32, 32, 3), np.uint8), "c.gif", 60, "at most 50 frames a second; fps is 60"),
        (np.zeros((2, 32, 32, 3), np.uint8), "c.webp", float("nan"), "fps must be a positive number; it is nan"),
        (np.zeros((2, 32, 32, 3), np.uint8), "c.webp", 0, "fps must be a positive number; it is 0"),
        (np.zeros((2, 32, 32, 3), np.uint8), "c.avi", 16, "unknown output type '.avi'"),
        (np.zeros((2, 32, 32, 3), np.uint8), "absent/c.mp4", 16, "absent does not exist"),
    ],
)
def test_a_refused_write_leaves_no_file(
    tmp_path: Path, frames: np.ndarray, path: str, fps: float, message: str
) -> None:
    with pytest.raises(ReducioError, match=message):
        video_files.write_video(frames, tmp_path / path, fps)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("name", ["c.mp4", "c.gif", "c.webp", "frames"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException
) -> None:
    if name == "frames":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(b"old")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((ReducioError, KeyboardInterrupt)) as caught:
        video_files.write_video(panning(frames=2), tmp_path / name, 16)
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
    assert left_behind(tmp_path) == [name]
    assert name == "frames" or (tmp_path / name).read_bytes() == b"old"


def test_ffmpeg_failure_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\ncat > /dev/null\necho 'Unknown encoder libx264' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    with pytest.raises(ReducioError, match="c.mp4: Unknown encoder libx264"):
        video_files.write_video(panning(frames=2), tmp_path / "c.mp4", 16)
    assert left_behind(tmp_path) == ["ffmpeg"]


def test_check_output_path(tmp_path: Path) -> None:
    assert video_files.check_output_path(tmp_path / "c.mp4") == tmp_path / "c.mp4"
    (tmp_path / "empty").mkdir()
    video_files.check_output_path(tmp_path / "empty")
    video_files.check_output_path(f"{tmp_path / 'take.2'}/")  # the slash marks a folder in spite of the dot
    assert left_behind(tmp_path) == ["empty"]

    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for name, message in {
        "c.mkv": "unknown output type '.mkv'",
        "absent/c.mp4": "the output folder .*absent does not exist",
        "absent/frames": "the output folder .*absent does not exist",
        "file": "is a file",
        "full": "is not empty",
        "folder.mp4": "is a folder, but its suffix says .mp4",
        "file/c.mp4": "does not exist",
    }.items():
        with pytest.raises(ReducioError, match=message):
            video_files.check_output_path(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that refuses even root: /proc")
def test_an_unwritable_folder_is_detected_by_a_trial_write() -> None:
    with pytest.raises(ReducioError, match="/proc/self cannot be written"):
        video_files.check_output_path("/proc/self/c.mp4")


def test_side_by_side() -> None:
    left, right = panning(frames=3), panning(frames=3)[::-1]
    both = video_files.side_by_side(left, right)
    np.testing.assert_array_equal(both[:, :, :112], left)
    np.testing.assert_array_equal(both[:, :, 112:], right)
    with pytest.raises(ReducioError, match=r"\[3, 80, 112, 3\] and \[2, 80, 112, 3\]"):
        video_files.side_by_side(left, right[:2])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128), (160, 96), (80, 112)])
def test_cover_crop_keeps_aspect_and_centre(height: int, width: int) -> None:
    """A disc in the middle remains a disc in the middle."""
    y, x = np.mgrid[:80, :112]
    disc = np.where((y - 39.5) ** 2 + (x - 55.5) ** 2 < 20**2, 255, 0).astype(np.uint8)
    out = image_files.cover_crop(np.repeat(disc[None, :, :, None], 3, 3), height, width)
    assert out.shape == (1, height, width, 3)
    rows, columns = np.nonzero(out[0, :, :, 0] > 127)
    scale = max(height / 80, width / 112)
    assert rows.mean() == pytest.approx((height - 1) / 2, abs=0.6)
    assert columns.mean() == pytest.approx((width - 1) / 2, abs=0.6)
    assert np.ptp(rows) == pytest.approx(40 * scale, abs=2)
    assert np.ptp(columns) == pytest.approx(40 * scale, abs=2)


MODES = {
    "RGB": (200, 100, 50),
    "RGBA": (200, 100, 50, 255),
    "L": 120,
    "LA": (120, 255),
    "1": 1,
    "CMYK": (0, 255, 255, 0),
    "YCbCr": (128, 128, 128),
    "HSV": (0, 255, 255),
    "LAB": (255, 128, 128),  # a and b are stored with an offset of 128
    "F": 120.0,
    "I": 120 * 257,
    "I;16": 120 * 257,
}
EXPECTED = {
    "RGB": (200, 100, 50),
    "RGBA": (200, 100, 50),
    "1": (255, 255, 255),
    "CMYK": (255, 0, 0),
    "YCbCr": (128, 128, 128),
    "HSV": (255, 0, 0),
    "LAB": (255, 255, 255),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    out = image_files.read_image(Image.new(mode, (6, 4), MODES[mode]))
    assert out.shape == (4, 6, 3) and out.dtype == np.uint8 and out.flags.writeable
    assert np.abs(out.astype(int) - EXPECTED.get(mode, (120,) * 3)).max() <= 1


def test_palette_with_a_transparent_entry_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png", transparency=0)
    assert image_files.read_image(tmp_path / "p.png")[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_half_transparent_is_mixed_with_white() -> None:
    assert image_files.read_image(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))[0, 0].tolist() == [255, 127, 127]
    assert image_files.read_image(np.array([[[255, 0, 0, 0]]], np.uint8))[0, 0].tolist() == [255, 255, 255]


def test_rotation_tag_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # display rotated by 90 degrees
    image.save(tmp_path / "r.jpg", exif=exif)
    assert image_files.read_image(str(tmp_path / "r.jpg")).shape == (4, 2, 3)


def test_arrays(tmp_path: Path) -> None:
    clip = panning(frames=1)[0]
    np.testing.assert_array_equal(image_files.read_image(clip), clip)
    np.testing.assert_array_equal(image_files.read_image(clip / 255), clip)
    np.testing.assert_array_equal(image_files.read_image(clip[..., 0]), clip[..., [0, 0, 0]])
    np.testing.assert_array_equal(image_files.read_image(clip[..., :1]), clip[..., [0, 0, 0]])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"it is \[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), r"it is \[0, 4, 3\]"),
        (np.zeros((4, 4, 3), np.int64), "it is int64"),
        (np.full((4, 4, 3), 255.0), "spans 255 to 255"),
        (np.full((4, 4, 3), np.nan), "spans nan to nan"),
        (Image.new("F", (2, 2), float("nan")), "not finite"),
        (7, "it is a int"),
        (torch.rand(3, 4, 4, device="meta"), "must hold its values; it is torch.strided on meta"),
        (torch.rand(3, 4, 4).to_sparse(), "must hold its values; it is torch.sparse_coo on cpu"),
        ("absent.png", "no such image file: absent.png"),
    ],
)
def test_images_refused(image: object, message: str) -> None:
    with pytest.raises(ReducioError, match=message):
        image_files.read_image(image)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff", ".bmp", ".gif"])
def test_broken_image_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"i{suffix}"
    Image.fromarray(panning(frames=1)[0]).save(path)
    assert image_files.read_image(path).shape == (80, 112, 3)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\0" * 64):
        path.write_bytes(broken)
        with pytest.raises(ReducioError, match=f"{path.name} cannot be read"):
            image_files.read_image(path)
