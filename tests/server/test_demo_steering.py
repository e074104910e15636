"""The demo's options that lengthen and steer a clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reducio_fast.media.video_files import read_video, write_video
from reducio_fast.pipelines import registry
from reducio_fast.server import demo_page
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right on a black background"
OPTIONS = {"both": False, "steps": 2, "device": "cpu", "content_kwargs": {"num_inference_steps": 2}}


def test_progress_previews_and_a_long_loop(bundle: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"folder": tmp_path, "num_frames": 24, "loop": True, "negative_prompt": "blue"}
    events = list(demo_page.events_of(PROMPT, None, previews=True, motion_strength=0.5, **options))
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "progress" and kinds[-1] == "clip" and kinds.count("preview") == 4
    assert [data[0] for kind, data in events if kind == "progress"][-1] == 1.0, "all steps of both parts are counted"
    assert next(data for kind, data in events if kind == "preview").shape == (128, 512, 3)
    assert read_video(events[-1][1].path)[0].shape == (46, 128, 128, 3)


def test_seeds_side_by_side_with_the_motion_of_a_clip(bundle: Path, tmp_path: Path) -> None:
    frames = np.zeros((16, 128, 128, 3), np.uint8)
    for t, frame in enumerate(frames):
        frame[48:80, 20 + 4 * t : 52 + 4 * t] = (220, 30, 30)
    write_video(frames, tmp_path / "motion", 16)
    motion = demo_page.motion_of(str(tmp_path / "motion"), {"device": "cpu"})
    options = OPTIONS | {"folder": tmp_path, "num_videos_per_prompt": 2, "motion_latents": motion}
    (clip,) = demo_page.make_clips(PROMPT, **options)
    assert clip.out.frames.shape == (16, 128, 256, 3) and clip.out.seeds == [0, 1]
    (smooth,) = demo_page.make_clips(PROMPT, interpolate=2, keep_content=True, **options)
    assert smooth.out.fps == 2 * clip.out.fps and len(smooth.out.frames) >= 31
    assert read_video(smooth.path)[1] == smooth.out.fps


@pytest.mark.parametrize("model", [None, "svd:random", "ltx:random"])
def test_a_click_passes_only_what_the_model_takes(model: str | None) -> None:
    """In particular SVD's clips keep their own number of frames: the page shows no slider for them."""
    defaults = registry.find(model).call_defaults
    options = demo_page.call_options(defaults, 16, 2, True, 0.5, True, "blue")
    assert set(options) <= {*defaults, "negative_prompt"} and options["negative_prompt"] == "blue"
    assert ("num_frames" in options) == ("motion_strength" in options) == (model is None)
    assert ("loop" in options) == (model in (None, "svd:random"))


def test_mistakes_reach_the_page(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ReducioError, match="motion_strength"):
        list(demo_page.events_of(PROMPT, None, previews=True, folder=tmp_path, motion_strength=9, **OPTIONS))
