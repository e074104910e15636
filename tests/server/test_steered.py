"""Steered clips from a server: their fields, previews as events, the motion of another clip, more frames."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reducio_fast.media.video_files import read_video, write_video
from reducio_fast.pipelines import registry
from reducio_fast.server.clips import Clips
from reducio_fast.server.errors import ApiError
from reducio_fast.server.files import CLIP, MOTION, PICTURE
from reducio_fast.server.requests import Asked, Checker, Limits

pytestmark = pytest.mark.slow
PROMPT = {"prompt": "a red circle moving right on a black background", "seed": 3, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def clips() -> Clips:
    return Clips(warm=False, encoding="fast")


@pytest.fixture(scope="module")
def checker() -> Checker:
    found = registry.find(None)
    assert found.checker is not None
    return Checker("tiny", found.checker(), found.call_defaults, Limits(), found.fps, "quality")


@pytest.fixture(scope="module")
def motion(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A clip of 20 frames of 96x64 pixels in which a square moves."""
    frames = np.zeros((20, 64, 96, 3), np.uint8)
    for t, frame in enumerate(frames):
        frame[20:40, 2 * t : 2 * t + 20] = 255
    path = write_video(frames, tmp_path_factory.mktemp("motion") / "clip.mp4", 16)
    return Path(path).read_bytes()


def events(clips: Clips, asked: Asked) -> list[dict[str, Any]]:
    async def run() -> list[dict[str, Any]]:
        return [event async for event in clips.make(asked.row(), asked.files)]

    return asyncio.run(run())


def frames_of(event: Mapping[str, Any], tmp_path: Path) -> np.ndarray:
    (tmp_path / "clip.mp4").write_bytes(event["files"][CLIP])
    return read_video(tmp_path / "clip.mp4")[0]


def test_a_steered_clip_is_that_of_the_call(clips: Clips, checker: Checker, tmp_path: Path) -> None:
    """Fields of a form are text; the test passes all that one call accepts together."""
    fields = {"motion_strength": "1.5", "keep_content": "true", "loop": "true", "quality": "draft", "interpolate": "2",
              "preview_every": "1"}  # fmt: skip
    *steps, last = events(clips, checker(PROMPT | fields))
    shown = [event for event in steps if "preview" in event]
    assert [event["step"] for event in shown] == [1, 2]
    for event in shown:
        strip = Image.open(io.BytesIO(event["preview"]))
        assert strip.format == "WEBP" and strip.width == 4 * strip.height
    out = clips.pipe(**PROMPT, motion_strength=1.5, keep_content=True, loop=True, quality="draft", progress=False)
    smooth = out.interpolated(2)
    assert (last["result"]["frames"], last["result"]["fps"]) == (59, 32.0) == (len(smooth.frames), smooth.fps)
    smooth.save(tmp_path / "own.mp4", encoding="fast")
    assert (tmp_path / "own.mp4").read_bytes() == last["files"][CLIP]


def test_the_motion_of_another_clip(clips: Clips, checker: Checker, motion: bytes, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128), "green").save(buffer, "PNG")
    asked = checker({"seed": 1, "prompt": "x"}, {PICTURE: buffer.getvalue(), MOTION: motion})
    *steps, last = events(clips, asked)
    assert not [event for event in steps if event["stage"] == "dit.step" and event["step"]], "nothing is sampled"
    (tmp_path / "motion.mp4").write_bytes(motion)
    latents = clips.pipe.encode_motion(tmp_path / "motion.mp4", 128, 128)
    green = np.full((128, 128, 3), (0, 128, 0), np.uint8)
    out = clips.pipe(image=green, motion_latents=latents, progress=False)
    out.save(tmp_path / "own.mp4", encoding="fast")
    assert (tmp_path / "own.mp4").read_bytes() == last["files"][CLIP]


def test_progress_of_a_long_clip_goes_on_to_its_end(clips: Clips, checker: Checker) -> None:
    *steps, last = events(clips, checker(PROMPT | {"num_frames": 32}))
    percents = [event["percent"] for event in steps]
    assert percents == sorted(percents) and last["result"]["frames"] == 32
    ends = [event["percent"] for event in steps if event["stage"] == "dit.step" and event["step"] == 2]
    assert ends == [57, 72, 88]  # three clips share 42 to 88


def test_seeds_side_by_side(clips: Clips, checker: Checker, tmp_path: Path) -> None:
    *steps, last = events(clips, checker(PROMPT | {"num_videos_per_prompt": "4"}))
    percents = [event["percent"] for event in steps]
    assert percents == sorted(percents) and percents[-1] == 97
    sheet = clips.pipe(**PROMPT, num_videos_per_prompt=4, progress=False).grid()
    assert last["result"]["size"] == "256x256" and last["result"]["frames"] == 16 == len(sheet)
    assert np.abs(frames_of(last, tmp_path).astype(int) - sheet).mean() < 8


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"num_videos_per_prompt": 10}, "num_videos_per_prompt: 10 asked for, 9 are the most"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt: "),
        ({"motion_strength": "much"}, "motion_strength: must be a number, is 'much'"),
        ({"motion_strength": 4.5}, "motion_strength: must be"),
        ({"motion_strength": float("nan")}, "motion_strength: must be"),
        ({"loop": "perhaps"}, "loop: must be true or false, is 'perhaps'"),
        ({"keep_content": 1}, "keep_content: must be true or false, is 1"),
        ({"preview_every": 0}, "preview_every: must be a whole number of at least 1, is 0"),
        ({"num_frames": 17}, "num_frames: 17"),
        ({"direction": "sideways"}, "direction: "),
        ({"interpolate": 3}, "interpolate: must be one of 2, 4, is 3"),
        ({"interpolate": "fast"}, "interpolate: must be a whole number, is 'fast'"),
        ({"quality": "best"}, "quality: "),
        ({"guidance_interval": "0,x"}, "guidance_interval: must be a number, is 'x'"),
        ({"guidance_interval": 3}, "guidance_interval: must be a list of numbers, is 3"),
        ({"overlap": 2}, "overlap: no field of a clip; known are"),
    ],
)
def test_wrong_fields(checker: Checker, fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ApiError) as error:
        checker(PROMPT | fields)
    assert error.value.status == 400 and error.value.message.startswith(line)


def test_wrong_motion(checker: Checker, motion: bytes, tmp_path: Path) -> None:
    short = np.zeros((7, 64, 64, 3), np.uint8)
    write_video(short, tmp_path / "short.mp4", 16)
    for data, fields, line in (
        (b"no video", {}, "motion_reference: cannot be read: it is no video that is known"),
        ((tmp_path / "short.mp4").read_bytes(), {}, "motion_reference: has 7 frames; the model takes 16"),
        (motion, {"num_frames": 32}, "motion_latents: are of 16 frames, num_frames is 32"),
    ):
        with pytest.raises(ApiError) as error:
            checker(PROMPT | fields, {MOTION: data})
        assert error.value.status == 400 and error.value.message == line
    found = registry.find("svd:random-tiny")
    assert found.checker is not None
    other = Checker("svd", found.checker(), found.call_defaults, Limits(), found.fps, "quality")
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    with pytest.raises(ApiError, match="motion_reference: svd takes no motion of another clip"):
        other({}, {PICTURE: picture.getvalue(), MOTION: motion})
