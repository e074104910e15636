"""An output path is tested with a trial write before any work, and finished frames survive a failed write."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from reducio_fast.media import kept_frames
from reducio_fast.media.video_files import check_output_path, read_video, write_video
from reducio_fast.pipelines.call.output import ReducioOutput
from reducio_fast.system import atomic_files
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow

CLIP = np.stack([np.full((32, 48, 3), 20 * i, np.uint8) for i in range(4)])
NAMES = ("2026-01-02T10:30:00", "-y", "a b", "100%d", "über 红", "x'y\"z", "c" * 240, "take.2", "http:clip")


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
@pytest.mark.parametrize("name", NAMES)
def test_any_valid_file_name_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = f"{name}{suffix}"
    check_output_path(path)
    assert os.listdir() == []
    write_video(CLIP, path, 16)
    assert os.listdir() == [path] and len(read_video(path)[0]) == 4


@pytest.mark.parametrize(
    "path", [f"{'c' * 300}.mp4", "a\0b.mp4", ".mp4", "none/c.mp4", "c.mkv", "loop.mp4", "gone/link.mp4"]
)
def test_names_that_cannot_be_written_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("loop.mp4", "loop.mp4")
    for check in (check_output_path, lambda path: write_video(CLIP, path, 16)):
        with pytest.raises(ReducioError) as caught:
            check(path)
        assert "\n" not in str(caught.value)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("there.gif", "not yet.gif"):
        link = tmp_path / f"link to {name}"
        link.symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk" / "there.gif").write_text("old")
    for name in ("there.gif", "not yet.gif"):
        link = tmp_path / f"link to {name}"
        check_output_path(link)
        write_video(CLIP, link, 16)
        assert link.is_symlink() and len(read_video(tmp_path / "disk" / name)[0]) == 4
    (tmp_path / "dangling.gif").symlink_to(tmp_path / "nowhere" / "clip.gif")
    with pytest.raises(ReducioError, match="nowhere does not exist"):
        check_output_path(tmp_path / "dangling.gif")


ENCODER = """#!/bin/sh
cat >/dev/null; echo "Unknown encoder 'libx264'" >&2; exit 8
"""


@pytest.mark.parametrize(
    ("program", "message"),
    [(ENCODER, "Unknown encoder 'libx264'"), ("#!/bin/sh\nexit 3\n", "ffmpeg ended with 3"), (None, "No such file")],
)
def test_an_ffmpeg_that_cannot_write_is_detected_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, message: str
) -> None:
    ffmpeg = tmp_path / "ffmpeg"
    if program is not None:
        ffmpeg.write_text(program)
        ffmpeg.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    with pytest.raises(ReducioError, match=message):
        check_output_path(tmp_path / "c.mp4")


@pytest.mark.parametrize(
    ("name", "fps", "height", "width"),
    [("c.gif", 60, 32, 32), ("c.gif", 1e-4, 32, 32), ("c.webp", 95, 32, 32), ("c.webp", 16, 32, 16390),
     ("c.mp4", 16, 31, 32), ("c.mp4", 1e-9, 32, 32), ("c.mp4", float("nan"), 32, 32)],
)  # fmt: skip
def test_unsupported_rates_and_sizes_are_detected_before_the_work(
    tmp_path: Path, name: str, fps: float, height: int, width: int
) -> None:
    with pytest.raises(ReducioError):
        check_output_path(tmp_path / name, fps, height, width)
    with pytest.raises(ReducioError):
        write_video(np.zeros((2, height, width, 3), np.uint8), tmp_path / name, fps)
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_is_filled_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount point and the current folder cannot be renamed."""
    folder = tmp_path / "vol"
    folder.mkdir()
    inode = folder.stat().st_ino
    check_output_path(folder)
    write_video(CLIP, folder, 16)
    assert folder.stat().st_ino == inode and len(os.listdir(folder)) == 4
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    check_output_path(".")
    write_video(CLIP, ".", 16)
    assert len(os.listdir(here)) == 4


@pytest.mark.parametrize("fixed", ["current", "mount", "parent"])
def test_a_model_folder_that_cannot_be_renamed_is_filled_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fixed: str
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    if fixed == "current":
        monkeypatch.chdir(target)
    elif fixed == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    inode = target.stat().st_ino
    for content in ("one", "two"):
        with atomic_files.new_folder(target, "mark", "model") as folder:
            (folder / "mark").write_text(content)
        assert target.stat().st_ino == inode and (target / "mark").read_text() == content
        assert os.listdir(target) == ["mark"] and os.listdir(tmp_path) == ["model"]
    with pytest.raises(RuntimeError):
        with atomic_files.new_folder(target, "mark", "model") as folder:
            (folder / "other").write_text("")
            raise RuntimeError
    assert os.listdir(target) == ["mark"]


def output() -> ReducioOutput:
    return ReducioOutput(CLIP, CLIP[1], [3], 16, {})


def test_frames_are_kept_if_the_write_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ReducioError, match="does not exist; the frames are kept in ") as caught:
        output().save(tmp_path / "none" / "clip.mp4")
    kept = Path(str(caught.value).rpartition("kept in ")[2].removesuffix(" (16 a second)"))
    np.testing.assert_array_equal(read_video(kept)[0], CLIP)
    many = ReducioOutput(np.stack([CLIP, CLIP]), None, [3, 4], 16, {}, is_list=True)
    with pytest.raises(ReducioError, match="the frames are kept in ") as caught:
        many.save(tmp_path / "none" / "clip.mp4")
    kept = Path(str(caught.value).rpartition("kept in ")[2].removesuffix(" (16 a second)"))
    assert sorted(os.listdir(kept)) == ["0", "1"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ReducioError, match="could not be kept in .* either"):
        output().save(tmp_path / "none" / "clip.mp4")


@pytest.mark.parametrize("name", ["c.mp4", "c.gif", "c.webp", "frames"])
def test_a_disk_that_fills_leaves_nothing_half_written(tmp_path: Path, name: str) -> None:
    """A limit on file sizes simulates a full disk: Python ignores the signal, and each write fails with EFBIG."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ReducioError, match="cannot write"):
            write_video(noise, tmp_path / name, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_the_error_names_the_folder_of_kept_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path))
    line = kept_frames.keep_frames([CLIP], 16, "seed1")
    assert line.startswith(f"the frames are kept in {tmp_path / 'frames'}") and "\n" not in line
