"""Curation: shots of clips with known cuts, scores that order clips, parts that are written atomically."""

from __future__ import annotations

import errno
import importlib
import json
import shutil
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save

from reducio_fast.cli.main import main
from reducio_fast.data import photos
from reducio_fast.data.clip_files import ClipFiles
from reducio_fast.data.curation import curate, manifest, scores
from reducio_fast.data.curation.shots import ShotFinder, join_cuts
from reducio_fast.media.video_files import write_video
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow


def shots_of(frames: np.ndarray, fps: float = 24.0) -> list[tuple[int, int]]:
    finder = ShotFinder(fps)
    for frame in frames:
        finder.add(frame)
    return finder.shots()


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Two photographs under slow camera moves and one still, 40 frames of 96x96 each."""
    rng = np.random.default_rng(3)
    moves = [photos.render(rng, 96, 40, name=name) for name in ("astronaut", "flower")]
    return [*moves, np.repeat(photos.render(rng, 96, 1, name="chelsea"), 40, axis=0)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, pictures: list[np.ndarray]) -> Path:
    """Videos with two shots (cut), without motion (still), with a line of text (written), and two unreadable files."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(np.concatenate(pictures[:2]), folder / "cut.mp4", 24)
    write_video(pictures[2], folder / "still.mp4", 24)
    text = []
    for frame in pictures[0]:
        image = Image.fromarray(frame).resize((384, 384))
        ImageDraw.Draw(image).rectangle((20, 300, 364, 360), fill="black")
        ImageDraw.Draw(image).text((40, 305), "HELLO WORLD", fill="white", font_size=48)
        text.append(np.array(image))
    write_video(np.stack(text), folder / "written.mp4", 24)
    (folder / "broken.mp4").write_bytes((folder / "still.mp4").read_bytes()[:300])
    (folder / "words.mp4").write_text("no video")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def test_hard_cuts_and_fades(pictures: list[np.ndarray]) -> None:
    a, b = pictures[:2]
    assert shots_of(np.concatenate([a, b])) == [(0, 40), (40, 80)]
    assert shots_of(a) == [(0, 40)]
    assert shots_of(a[:1]) == [(0, 1)] and ShotFinder(24).shots() == []
    weight = np.linspace(0, 1, 24)[:, None, None, None]
    slow = (a[-1:] * (1 - weight) + b[:1] * weight).astype(np.uint8)
    shots = shots_of(np.concatenate([a, slow, b]))
    assert len(shots) == 2, shots
    (start, end), (again, last) = shots
    assert (start, last) == (0, 104) and 40 <= end < again <= 64  # no shot contains the frames of the fade


def test_cuts_found_at_three_rates_are_merged() -> None:
    assert join_cuts({1: {30}, 3: {33}, 6: {36}}, 100) == [(0, 30), (30, 100)]
    assert join_cuts({1: set(), 3: {51}, 6: {54}}, 100) == [(0, 48), (51, 100)]
    assert join_cuts({1: {0, 100}}, 100) == [(0, 100)]


def test_thousands_of_cuts_are_merged_as_a_few_are() -> None:
    """When each cut was compared with all others, these took 16 s."""
    cuts, begun = {stride: {60 * i + stride for i in range(1, 6000)} for stride in (1, 3, 6)}, time.process_time()
    ends = range(61, 360_000, 60)
    assert join_cuts(cuts, 360_000) == list(zip([0, *ends], [*ends, 360_000], strict=True))
    assert time.process_time() - begun < 3


def test_a_long_shot_is_measured_two_frames_at_a_time(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, read, most = curate._read, list[weakref.ref[np.ndarray]](), 0

    def counted(file: IO[bytes], place: int) -> np.ndarray:
        nonlocal most
        read.append(weakref.ref(array := own(file, place)))
        most = max(most, sum(reference() is not None for reference in read))
        return array

    monkeypatch.setattr(curate, "_read", counted)
    monkeypatch.setattr(curate, "SAMPLED", 24.0)
    curate.curate([videos / "still.mp4"], curate.Settings(str(tmp_path), text=False), workers=0, progress=False)
    assert len(read) > 40 and most <= 3


def test_motion_is_measured_in_percent_of_the_short_side() -> None:
    """A texture that moves by 4 of 128 pixels between two frames scores 3.1%, a still 0."""
    wide = photos.load_photo("gravel")[:128]
    frames = [scores.small_gray(wide[:, 4 * i : 4 * i + 128]) for i in range(4)]
    moved = scores.motion(frames)
    assert moved is not None and abs(moved - 100 * 4 / 128) < 0.5
    assert scores.motion(frames[:1] * 3) < 1e-3 and scores.motion(frames[:1]) is None


def test_area_of_a_polygon() -> None:
    assert scores.polygon_area(np.array([[0, 0], [4, 0], [4, 3], [0, 3]])) == 12
    assert scores.polygon_area(np.array([[0, 0], [4, 0], [0, 3]])) == 6


def test_the_manifest_does_not_depend_on_order_or_interruption(videos: Path, tmp_path: Path) -> None:
    settings = curate.Settings(str(tmp_path / "a"))
    done = curate.curate([videos], settings, {"cut.mp4": "a person"}, workers=2, progress=False)
    assert (done.made, done.broken, done.kept) == (5, 2, 0)
    rows = manifest.read(tmp_path / "a")
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(Path(row["video"]).name, []).append(row)
    assert [(r["start"], r["end"], r["caption"]) for r in by_name["cut.mp4"]] == [
        (0, 40, "a person"),
        (40, 80, "a person"),
    ]
    assert "cannot be read" in by_name["broken.mp4"][0]["error"] and by_name["words.mp4"][0]["error"]
    assert by_name["still.mp4"][0]["motion"] < 0.05 < min(row["motion"] for row in by_name["cut.mp4"])
    assert by_name["still.mp4"][0]["text_area"] == 0 and 0.03 < by_name["written.mp4"][0]["text_area"] < 0.4
    # A run into another folder, in one process and two calls, gives the same bytes.
    other = curate.Settings(str(tmp_path / "b"))
    for name in ("written.mp4", "cut.mp4"):
        curate.curate([videos / name], other, {"cut.mp4": "a person"}, workers=0, progress=False)
    again = curate.curate([videos], other, {"cut.mp4": "a person"}, workers=0, progress=False)
    assert (again.made, again.kept) == (3, 2)
    parts = sorted((tmp_path / "a" / manifest.PARTS).iterdir())
    assert len(parts) == 5
    for part in parts:
        assert part.read_bytes() == (tmp_path / "b" / manifest.PARTS / part.name).read_bytes()


def test_a_full_disk_ends_the_run_without_the_other_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full_disk.py").write_text(
        "import pathlib, time\n"
        "def curate_video(source, settings):\n"
        "    pathlib.Path(source.path).unlink()\n"
        "    if source.path.endswith('00.mp4'):\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    time.sleep(0.2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(curate, "curate_video", importlib.import_module("full_disk").curate_video)
    for number in range(30):
        (tmp_path / f"{number:02d}.mp4").touch()
    settings = curate.Settings(str(tmp_path / "out"), text=False)
    with pytest.raises(OSError, match="No space left on device"):
        curate.curate([tmp_path], settings, workers=1, progress=False)
    assert len(list(tmp_path.glob("*.mp4"))) >= 25  # the pool had taken a few more


def test_a_disk_that_fills_while_a_video_is_read_is_no_error_of_the_video(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(curate.ffmpeg, "frames", fails)
    with pytest.raises(OSError, match="No space left"):
        curate.curate([videos / "still.mp4"], curate.Settings(str(tmp_path), text=False), workers=0, progress=False)
    assert not list((tmp_path / manifest.PARTS).iterdir())


def test_frames_of_long_videos_go_to_a_file(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part has the same bytes whether the frames are kept in memory or in a file."""
    parts, written = [], []

    class File(tempfile.SpooledTemporaryFile):
        def rollover(self) -> None:
            written.append(self)
            super().rollover()

    monkeypatch.setattr(curate.tempfile, "SpooledTemporaryFile", File)
    for limit in (curate.IN_MEMORY, 10_000):
        assert not written
        monkeypatch.setattr(curate, "IN_MEMORY", limit)
        settings = curate.Settings(str(tmp_path / str(limit)), text=False)
        curate.curate([videos / "cut.mp4"], settings, workers=0, progress=False)
        parts += [path.read_bytes() for path in Path(settings.out, manifest.PARTS).iterdir()]
    assert len(written) == 1 and len(parts) == 2 and parts[0] == parts[1]


def test_a_worker_that_dies_loses_only_its_video(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker process exits without a Python error, as it does when a decoder crashes."""
    fatal = tmp_path / "sitecustomize.py"
    fatal.write_text(
        "import os, sys\n"
        "import reducio_fast.media.ffmpeg as m\n"
        "own = m.frames\n"
        "def frames(path):\n"
        "    if path.name == 'still.mp4':\n"
        "        os._exit(9)\n"
        "    return own(path)\n"
        "m.frames = frames\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    chosen = [videos / name for name in ("cut.mp4", "still.mp4", "written.mp4")]
    done = curate.curate(chosen, curate.Settings(str(tmp_path / "out"), text=False), workers=2, progress=False)
    assert (done.made, done.broken) == (3, 1)
    rows = manifest.read(tmp_path / "out")
    assert [Path(r["video"]).name for r in rows if r["error"]] == ["still.mp4"]
    assert next(r["error"] for r in rows if r["error"]) == "the process that decoded it died"
    assert sum(r["error"] is None for r in rows) == 3


def test_more_videos_than_the_workers_of_one_pool_get(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `max_tasks_per_child`, executors of Python 3.11 and later wait forever (python/cpython#115634)."""
    monkeypatch.setattr(curate, "VIDEOS_A_WORKER", 2)
    for i in range(5):
        shutil.copy(videos / "still.mp4", tmp_path / f"{i}.mp4")
    done = curate.curate([tmp_path], curate.Settings(str(tmp_path / "out"), text=False), workers=1, progress=False)
    assert (done.made, done.broken) == (5, 0)


def test_the_command_and_its_page(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "captions.json").write_text(json.dumps({"cut.mp4": "two <people>"}))
    command = [
        "curate",
        str(videos),
        "-o",
        str(tmp_path / "out"),
        "--no-text",
        "--captions",
        str(tmp_path / "captions.json"),
    ]
    assert main([*command, "--no-progress", "--workers", "2", "--json", "--keep", "motion.min=30%"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["made"] == 5 and result["broken"] == 2 and result["selected"] == 3 and result["clips"] == 6
    kept = manifest.read(tmp_path / "out" / "clips.parquet")
    assert "still.mp4" not in {Path(row["video"]).name for row in kept}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 1 and page.count("<figure") == 4 and "broken.mp4" in page and "not measured" in page
    # A run with other thresholds reads no video again.
    assert main(["curate", "-o", str(tmp_path / "out"), "--no-progress"]) == 0
    assert len(manifest.read(tmp_path / "out" / "clips.parquet")) == 4


def test_what_is_missing_is_refused_before_any_video(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong path or a package that is not installed is no property of a video and is not stored as one."""
    out = tmp_path / "out"
    command = ["curate", str(videos / "still.mp4"), "-o", str(out), "--no-progress"]
    (tmp_path / "other.safetensors").write_bytes(save({"slope": torch.zeros(1)}))
    for options, message in (
        (["--clip", "/none"], "/none holds no open_clip model"),
        (["--clip", "/none", "--aesthetic", "/head"], "aesthetic head /head cannot be read"),
        (["--clip", "/none", "--aesthetic", str(tmp_path / "other.safetensors")], "must hold weight and bias"),
        (["--aesthetic", "/head"], "(--aesthetic) needs the open_clip model"),
    ):
        assert main([*command, "--no-text", *options]) == 2
        line = capsys.readouterr().err
        assert message in line and line.count("\n") == 1
    scores.text_reader.cache_clear()
    for package, options in (("cv2", ["--no-text"]), ("scenedetect", ["--no-text"]), ("rapidocr", [])):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            assert main([*command, *options]) == 2
        assert 'pip install "reducio-fast[curate]"' in capsys.readouterr().err
    assert not out.exists()


def test_an_error_after_decoding_is_not_stored(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(frames: list[np.ndarray]) -> float:
        raise ReducioError("no model of the text reader")

    monkeypatch.setattr(scores, "text_area", fails)
    with pytest.raises(ReducioError, match="no model of the text reader"):
        curate.curate([videos / "still.mp4"], curate.Settings(str(tmp_path)), workers=0, progress=False)
    assert not list((tmp_path / manifest.PARTS).iterdir())


def test_a_part_made_with_other_settings_or_another_caption_is_made_again(videos: Path, tmp_path: Path) -> None:
    def made(text: bool, caption: str) -> tuple[int, str | None, float | None]:
        settings = curate.Settings(str(tmp_path), text=text)
        done = curate.curate([videos / "still.mp4"], settings, {"still.mp4": caption}, workers=0, progress=False)
        (row,) = manifest.read(tmp_path)
        return done.made, row["caption"], row["text_area"]

    assert made(False, "a cat") == (1, "a cat", None)
    assert made(False, "a cat") == (0, "a cat", None)
    assert made(False, "a grey cat") == (1, "a grey cat", None)
    assert made(True, "a grey cat") == (1, "a grey cat", 0)


def test_a_video_that_has_changed_is_measured_again(videos: Path, tmp_path: Path) -> None:
    """One that could not be read, or another under the same name. Parts of earlier versions do not tell, and count."""
    video, out = tmp_path / "video.mp4", tmp_path / "out"
    settings = curate.Settings(str(out), text=False)

    def run() -> tuple[int, list[str | None], int]:
        done = curate.curate([video], settings, workers=0, progress=False)
        rows = manifest.read_parts(out)
        return done.made, [row["error"] for row in rows], len(rows)

    video.write_bytes(b"")
    made, (error,), _ = run()
    assert made == 1 and error and run() == (0, [error], 1)
    shutil.copyfile(videos / "still.mp4", video)
    assert run() == (1, [None], 1) and run() == (0, [None], 1)
    shutil.copyfile(videos / "cut.mp4", video)
    assert run() == (1, [None, None], 2)
    part = manifest.part_path(out, str(video))
    made_with = manifest.made_with(part)
    assert made_with is not None
    old = {name: value for name, value in made_with.items() if name not in ("bytes", "changed")}
    manifest.write(manifest.read_parts(out), part, old)
    assert run() == (0, [None, None], 2)


def test_clips_of_a_moved_folder_are_those_of_the_new_place(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "old").mkdir()
    shutil.copyfile(videos / "cut.mp4", tmp_path / "old" / "cut.mp4")
    command = ["-o", out, "--no-text", "--workers", "1", "--no-progress"]
    assert main(["curate", str(tmp_path / "old"), *command]) == 0
    shutil.copytree(tmp_path / "old", tmp_path / "copy")
    assert main(["curate", str(tmp_path / "copy"), *command]) == 0 and len(manifest.read(out)) == 4
    shutil.rmtree(tmp_path / "old")
    assert main(["curate", "-o", out, "--no-progress"]) == 0, capsys.readouterr().err
    assert {row["video"] for row in manifest.read(out)} == {str(tmp_path / "copy" / "cut.mp4")}
    assert len(manifest.read(out)) == 2
    shutil.rmtree(tmp_path / "copy")  # both are gone: one row of each clip is left
    assert main(["curate", "-o", out, "--no-progress"]) == 0 and len(manifest.read(out)) == 2


def test_names_and_captions_that_cannot_be_used(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def refused(folder: Path, *options: str) -> str:
        assert main(["curate", str(folder), "-o", str(tmp_path / "out"), "--no-text", *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not (tmp_path / "out").exists()
        return error

    odd = tmp_path / "odd"
    odd.mkdir()
    with open(bytes(odd) + b"/caf\xe9.mp4", "wb"):
        pass
    assert "caf?.mp4': the name is not UTF-8, and a manifest holds UTF-8 only; rename it" in refused(odd)
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"still.mp4": "\ud83d"}))
    assert "'still.mp4' or its caption has half of a surrogate pair" in refused(videos, "--captions", str(captions))
    found = curate.find_sources([videos], {"still.mp4": "a cat", "other.mp4": "a dog"})
    assert [source.caption for source in found if source.caption] == ["a cat"]
    assert "captions: 1 of 2 names are no video's, such as 'other.mp4'" in caplog.text


def test_options_that_a_run_without_videos_cannot_follow_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (["--captions", "x"], ["--clip", "x"], ["--ray", "local"], ["--workers", "2"], ["--no-text"]):
        assert main(["curate", "-o", str(tmp_path), *options]) == 2
        assert f"{options[0]} needs videos" in capsys.readouterr().err


def test_a_list_is_used_from_another_folder_and_only_its_kept_clips(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    monkeypatch.chdir(videos)
    settings = curate.Settings(out, text=False)
    curate.curate(["still.mp4", "cut.mp4"], settings, {"./still.mp4": "a cat"}, workers=0, progress=False)
    monkeypatch.chdir(tmp_path)
    assert main(["curate", "-o", out, "--keep", "motion.max=0.05", "--no-progress"]) == 0, capsys.readouterr().err
    assert [(row["video"], row["caption"]) for row in ClipFiles(out, 1, 24.0).rows] == [
        (str(videos / "still.mp4"), "a cat")
    ]
    assert len(manifest.read_parts(out)) == 3
    assert main(["curate", "-o", out, "--no-progress"]) == 0 and len(manifest.read(out)) == 3
