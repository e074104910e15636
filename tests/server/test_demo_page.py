"""The demo without its page: what a click makes, how it is stopped, and the message if gradio is not installed.

The page itself is tried in a browser by benchmarks/demo_check.py.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from reducio_fast.cli import main
from reducio_fast.media.similarity import psnr
from reducio_fast.media.video_files import read_video
from reducio_fast.server import demo_page
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right on a black background"


def test_both_paths_of_one_seed(bundle: Path, tmp_path: Path) -> None:
    updates: list[tuple[float, str]] = []

    def progress(share: float, what: str) -> None:
        updates.append((share, what))

    clips = list(demo_page.make_clips(PROMPT, seed=3, steps=2, folder=tmp_path, progress=progress, device="cpu"))
    assert [clip.label for clip in clips] == ["fast", "reference"]
    assert [clip.out.seed for clip in clips] == [3, 3]
    assert psnr(clips[0].out.frames, clips[1].out.frames) > 40
    for clip in clips:
        assert read_video(clip.path)[0].shape == clip.out.frames.shape
        assert clip.rows[-1][0] == "sum" and {"dit.step", "vae.decode"} <= {name for name, _ in clip.rows}
    assert updates == [
        (0.0, "fast: starting"),
        (0.25, "fast: step 1 of 2"),
        (0.5, "fast: step 2 of 2"),
        (0.5, "reference: starting"),
        (0.75, "reference: step 1 of 2"),
        (1.0, "reference: step 2 of 2"),
    ]


def test_stop_ends_a_clip_at_the_next_step_and_leaves_the_model_usable(bundle: Path, tmp_path: Path) -> None:
    stop, steps = threading.Event(), []

    def progress(share: float, what: str) -> None:
        steps.append(what)
        if "step 2" in what:
            stop.set()

    options = {"both": False, "seed": 1, "folder": tmp_path, "device": "cpu"}
    with pytest.raises(demo_page.Cancelled):
        list(demo_page.make_clips(PROMPT, steps=9, progress=progress, stop=stop, **options))
    assert steps[-1] == "fast: step 2 of 9" and list(tmp_path.iterdir()) == []
    (after,) = demo_page.make_clips(PROMPT, steps=1, **options)
    assert np.isfinite(after.out.frames).all() and after.path.exists()


def test_mistakes_come_through(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ReducioError, match="prompt"):
        list(demo_page.make_clips(" ", folder=tmp_path, device="cpu"))


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # makes its import fail
    assert main.main(["demo"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "gradio is not installed; pip install 'reducio-fast[demo]'" in captured.err


@pytest.mark.parametrize("model", ["svd", "svd-tiny", "svd:random-tiny"])
def test_the_names_of_models_are_known(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stops the command is another line: weights that are not on this machine, or gradio."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main.main(["demo", "--model", model]) == 2
    line = capsys.readouterr().err
    assert "neither a folder nor a hub id" not in line
    assert "gradio is not installed" in line or model != "svd:random-tiny"


def test_a_demo_that_cannot_encode_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # so that no page can start
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    assert main.main(["demo"]) == 2
    assert "demo: error: cannot write clip.mp4: No such file or directory" in capsys.readouterr().err


def test_absent_model_is_refused_before_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["demo", "--model", "no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
