"""The worker by itself, with a model that starts from a picture: its events, its files, its end when it is closed."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from reducio_fast.checkpoints import saved_latents
from reducio_fast.media import ffmpeg
from reducio_fast.pipelines import registry
from reducio_fast.server import schema
from reducio_fast.server.clips import Clips
from reducio_fast.server.errors import ApiError
from reducio_fast.server.files import CLIP, CONTENT, PICTURE, SPRITESHEET, THUMBNAIL
from reducio_fast.server.requests import FIELDS, OWN, WIRE, Checker, Limits, open_picture
from reducio_fast.system import cores
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow
MODEL = "svd:random-tiny"


@pytest.fixture(scope="module")
def clips() -> Clips:
    return Clips(MODEL, warm=False, encoding="fast")


@pytest.fixture(scope="module")
def checker() -> Checker:
    found = registry.find(MODEL)
    assert found.checker is not None
    return Checker("svd", found.checker(), found.call_defaults, Limits(), found.fps, "quality")


def default_checker() -> Checker:
    found = registry.find(None)
    assert found.checker is not None
    return Checker("reducio", found.checker(), found.call_defaults, Limits(), found.fps, "quality")


def picture(side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "blue").save(buffer, "PNG")
    return buffer.getvalue()


def test_every_family_is_served(clips: Clips, checker: Checker) -> None:
    asked = checker({"num_inference_steps": "3", "motion_bucket_id": "40", "seed": "5"}, {PICTURE: picture()})
    assert (asked.size, asked.call["motion_bucket_id"], asked.call["seed"]) == ("64x64", 40, 5)

    async def run() -> list[dict[str, Any]]:
        return [event async for event in clips.make(asked.row(), asked.files)]

    *steps, last = asyncio.run(run())
    assert [e["step"] for e in steps if e["stage"] == "dit.step"] == [0, 1, 2, 3]
    assert [e["percent"] for e in steps] == sorted(e["percent"] for e in steps)
    assert set(last["files"]) == {CLIP, CONTENT, THUMBNAIL, SPRITESHEET}
    assert (last["result"]["seed"], last["result"]["frames"], last["result"]["encoder"]) == (5, 4, "libx264")
    out = clips.pipe(image=Image.open(io.BytesIO(picture())), num_inference_steps=3, motion_bucket_id=40, seed=5,
                     height=64, width=64, progress=False)  # fmt: skip
    content = Image.open(io.BytesIO(last["files"][CONTENT]))
    assert (content.tobytes(), content.size) == (Image.fromarray(out.content).tobytes(), (64, 64))


def test_the_threads_that_are_reported_are_those_of_a_clip(clips: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    for name in cores.COUNTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "usable", lambda: 2)
    torch.set_num_threads(3)
    try:
        assert clips.describe()["threads"] == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own number is kept
        assert clips.describe()["threads"] == 3
    finally:
        torch.set_num_threads(before)


def test_a_closed_clip_stops_at_its_step_and_the_next_one_is_made(clips: Clips, checker: Checker) -> None:
    asked = checker({"num_inference_steps": 100, "seed": 1}, {PICTURE: picture()})

    async def run() -> tuple[int, list[dict[str, Any]]]:
        making, seen = clips.make(asked.row(), asked.files), 0
        async for event in making:
            seen = event["step"]
            if (event["stage"], seen) == ("dit.step", 2):
                break
        await making.aclose()
        assert clips.pipe.call is not None
        reached = clips.pipe.call.step
        short = checker({"num_inference_steps": 2, "seed": 1}, {PICTURE: picture()})
        return reached, [event async for event in clips.make(short.row(), short.files)]

    reached, events = asyncio.run(run())
    assert reached < 50 and "files" in events[-1]


def test_what_fails_is_told_in_one_line(
    clips: Clips, checker: Checker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ended(request: dict[str, Any]) -> dict[str, Any]:
        async def run() -> list[dict[str, Any]]:
            return [event async for event in clips.make(request, {PICTURE: picture()})]

        return asyncio.run(run())[-1]

    row = checker({"num_inference_steps": 2}, {PICTURE: picture()}).row()
    wrong = row | {"call": row["call"] | {"image_fit": "none"}}
    assert ended(wrong)["error"]["message"].startswith("image_fit: must be one of stretch, crop")

    def full(*arguments: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(type(clips.pipe.decoder), "__call__", full)
    event = ended(row)
    assert event["error"] == {"code": "out_of_memory", "message": "vae.decode: out of memory at 64x64"}
    (tmp_path / "kept.safetensors").write_bytes(event["latents"])
    kept = saved_latents.load(tmp_path / "kept.safetensors")
    monkeypatch.undo()
    assert clips.pipe.decode(kept.latents[0]).shape == (4, 64, 64, 3)
    assert not list(Path(clips._rescue.name).iterdir())


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"prompt": "a red circle"}, "prompt: Stable Video Diffusion reads no text"),
        ({"sigmas": "1,2"}, "sigmas: must fall from step to step"),
        ({"fps": "x"}, "fps: must be a whole number, is 'x'"),
        ({"size": "64"}, "size: must be WIDTHxHEIGHT such as 64x64, is '64'"),
        ({"num_frames": 1000}, "num_frames: 1000 asked for, 64 are the most"),
        ({"content_kwargs": [1]}, "content_kwargs: must be an object, is [1]"),
        (
            {"content_kwargs": {"\ud800": [1]}},
            "content_kwargs: \\ud800 must be a number, text or true or false, is [1]",
        ),
        (
            {"content_kwargs": {"timesteps": 5}},
            "content_kwargs: timesteps is a tensor, list or function for callers in",
        ),
        ({"content_kwargs": {"prompt_embeds": "x"}}, "content_kwargs: prompt_embeds is a tensor, list or function"),
        ({"content_kwargs": {"callback": "x"}}, "content_kwargs: callback is a tensor, list or function"),
        ({"\ud800": 1}, "\\ud800: no field of a clip; known are "),
        ({"callback_on_step_end": "x"}, "callback_on_step_end: no field of a clip; known are "),
        ({"seed": True}, "seed: must be a whole number, is True"),
        ({"noise_aug_strength": float("nan")}, "noise_aug_strength: must be a finite number of at least 0, is nan"),
        ({"max_guidance_scale": 1e39}, "guidance_scale: must be a finite number of at least 0, is 1e+39, which"),
        ({"fps": 10**12}, "fps: an .mp4 holds at most 1000000 frames"),
        ({"content_kwargs": {"max_sequence_length": 301}}, "content_kwargs: max_sequence_length is 301, 300 is the"),
    ],
)
def test_wrong_fields(checker: Checker, fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ApiError) as error:
        checker(fields, {PICTURE: picture()})
    assert error.value.status == 400 and error.value.message.startswith(line)


def test_a_rate_is_tried_with_the_encoder_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffmpeg, "hardware_encoder", lambda: ffmpeg.Encoder("h264_of_no_machine", ""))
    found = registry.find(MODEL)
    checker = Checker("svd", found.checker(), found.call_defaults, Limits(), found.fps, "hardware")
    with pytest.raises(ApiError, match="^fps: cannot write clip.mp4: .*h264_of_no_machine"):
        checker({"fps": 8}, {PICTURE: picture()})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_inference_steps", value) for value in ("abc", 0, -3, float("nan"), 2.5)),
        *(("guidance_scale", value) for value in (float("nan"), float("inf"), "abc")),
        pytest.param("guidance_scale", 10**400, id="guidance_scale-huge"),
        pytest.param("guidance_scale", 1e39, id="guidance_scale-above-float32"),
        *(("height", value) for value in ("abc", 0, float("nan"))),
        *(("max_sequence_length", value) for value in ("abc", 0, -1, 2.5)),
    ],
)
def test_wrong_values_for_the_first_stage(name: str, value: Any) -> None:
    checker = default_checker()
    with pytest.raises(ApiError, match=f"^content_kwargs: {name}: must be a (whole|finite) number.*, is "):
        checker({"prompt": "a red circle", "content_kwargs": {name: value}})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("eta", "x", "a finite number"), ("use_resolution_binning", "x", "true or false"), ("callback_steps", "x", "")],
)
def test_words_of_the_first_stage_are_of_their_kind(name: str, value: Any, kind: str) -> None:
    with pytest.raises(ApiError, match=f"^content_kwargs: {name}.* {kind}"):
        default_checker()({"prompt": "a red circle", "content_kwargs": {name: value}})


def test_a_caption_is_no_longer_than_the_model_s() -> None:
    """The text encoder has no step at which a job could be stopped."""
    checker = default_checker()
    asked = checker({"prompt": "a red circle", "content_kwargs": {"max_sequence_length": "120"}})
    assert asked.call["content_kwargs"] == {"max_sequence_length": 120}
    for length in (121, 4000, 10**9, "1000000000", 1e9):
        with pytest.raises(ApiError, match=r"^content_kwargs: max_sequence_length is \d+(\.0)?, 120 is the most$"):
            checker({"prompt": "a red circle", "content_kwargs": {"max_sequence_length": length}})


def test_a_clip_that_cannot_be_written_leaves_no_frames(
    clips: Clips, checker: Checker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\ncat >/dev/null; echo 'Unknown encoder libx264' >&2; exit 8\n")
    broken.chmod(0o755)
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path / "cache"))
    row = checker({"num_inference_steps": 1}, {PICTURE: picture()}).row()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(broken))

    async def run() -> list[dict[str, Any]]:
        return [event async for event in clips.make(row, {PICTURE: picture()})]

    line = asyncio.run(run())[-1]["error"]["message"]
    assert line == "cannot write clip.mp4: Unknown encoder libx264" and not (tmp_path / "cache" / "frames").exists()


def test_broken_pictures_of_every_format_are_refused() -> None:
    enhanced_metafile = b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(100)  # with an empty frame, by which Pillow divides
    for data in (b"no picture", enhanced_metafile):
        with pytest.raises(ReducioError, match="^image: input_reference cannot be read: it is no picture"):
            open_picture(data)


def test_the_openapi_page_has_every_field() -> None:
    """No server refuses the body that the page describes for it: a prompt is not for every model."""
    for body in (schema.CREATE, schema.REMIX):
        for form in body["requestBody"]["content"].values():
            uploads = {"input_reference", "motion_reference"}
            assert set(form["schema"]["properties"]) - uploads == {*FIELDS, *WIRE, *OWN} - uploads
            assert "required" not in form["schema"]
