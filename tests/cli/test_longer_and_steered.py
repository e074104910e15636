"""The options and the command for longer and steered clips; the embedded model makes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reducio_fast.checkpoints import saved_latents
from reducio_fast.cli import decode, main
from reducio_fast.media.image_files import read_image
from reducio_fast.media.video_files import read_video, write_video
from reducio_fast.pipelines import generate
from reducio_fast.pipelines.call.output import ReducioOutput

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right on a black background"
FEW = ["--num-inference-steps", "2", "--content-num-inference-steps", "2", "--no-progress", "--json"]


def run(*argv: object) -> int:
    try:
        return main.main([str(word) for word in argv])
    except SystemExit as error:
        return int(error.code or 0)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A red square that moves right, 16 PNGs of 128x128."""
    frames = np.zeros((16, 128, 128, 3), np.uint8)
    for t, frame in enumerate(frames):
        frame[48:80, 20 + 4 * t : 52 + 4 * t] = (220, 30, 30)
    write_video(frames, tmp_path / "clip", 16)
    return tmp_path / "clip"


MISTAKES = {
    "frames": (["generate", PROMPT, "-o", "x.gif", "--num-frames", 60], "num_frames: 60 .* nearest are 56 and 64"),
    "strength": (["generate", PROMPT, "-o", "x.gif", "--motion-strength", 5], "motion_strength: .* from 0 to 4, is 5"),
    "no strength": (["generate", PROMPT, "-o", "x.gif", "--motion-strength", "nan"], "motion_strength: .* is nan"),
    "grid of one": (["generate", PROMPT, "-o", "x.gif", "--grid"], "--grid: shows several clips, --num-videos is 1"),
    "rate": (["generate", PROMPT, "-o", "x.gif", "--interpolate", 3], "interpolate: must be one of 2, 4, is 3"),
    "transfer to nothing": (["transfer", "--motion", "CLIP"], "give --out for the clip, --extract for"),
    "transfer of nothing": (["transfer", "--motion", "none.mp4", "-o", "x.gif"], "no such file or folder: none.mp4"),
    "no picture": (["transfer", "--motion", "CLIP", "--image", "none.png", "-o", "x.gif"], "no such image .*none.png"),
    "no suffix": (["transfer", "--motion", "CLIP", "--extract", "frame"], "--extract frame: has no suffix of a pict"),
    "picture alone": (
        ["transfer", "--motion", "CLIP", "--extract", "f.png", "--image", "x.png"],
        "--image: .* needs --out",
    ),
    "strength alone": (
        ["transfer", "--motion", "CLIP", "--extract", "f.png", "--motion-strength", 2],
        "--motion-strength: .* needs --out",
    ),
    "keep alone": (
        ["transfer", "--motion", "CLIP", "--extract", "f.png", "--keep-content"],
        "--keep-content: .* needs",
    ),
    "too much": (["transfer", "--motion", "CLIP", "-o", "x.gif", "--motion-strength", 9], "from 0 to 4, is 9"),
    "short": (["transfer", "--motion", "CLIP", "-o", "x.gif", "--start", 1], "has 15 frames from number 1 on; the mo"),
    "size": (["transfer", "--motion", "CLIP", "-o", "x.gif", "--height", 100], "height: 100 is not a multiple of 32"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(
    name: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    argv, message = MISTAKES[name]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(*[clip if word == "CLIP" else word for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and re.search(message, captured.err), captured.err
    assert list(Path.cwd().iterdir()) == []


def test_a_long_loop_with_previews(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clip"
    options = ["--num-frames", 24, "--loop", "--motion-strength", 0.5, "--preview-every", 2]
    assert run("generate", PROMPT, "-o", out, *options, *FEW) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["config"]["num_frames"] == 46 and result["config"]["motion_strength"] == 0.5
    assert read_video(out)[0].shape == (46, 128, 128, 3)
    assert read_image(tmp_path / "clip-preview.png").shape == (128, 512, 3)


def test_seeds_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", PROMPT, "-o", tmp_path / "sheet", "--num-videos", 2, "--grid", "--interpolate", 2, *FEW) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["seeds"] == [0, 1] and len(result["paths"]) == 1
    sheet = read_video(tmp_path / "sheet")[0]
    assert (
        sheet.shape == (31, 128, 256, 3)
        and result["fps"] == 32
        and not np.array_equal(sheet[:, :, :128], sheet[:, :, 128:])
    )


@pytest.mark.parametrize("command", ["generate", "decode"])
def test_the_names_of_several_clips_are_checked_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = np.zeros((2, 4, 32, 32, 3), np.uint8)
    made: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        generate,
        "generate",
        lambda **_: made.append(command) or ReducioOutput(clips, None, [0, 1], 16, {}, is_list=True),
    )
    monkeypatch.setattr(decode, "decode_reducio", lambda *_: made.append(command) or clips)
    latents = saved_latents.Latents(torch.zeros(2, 16, 1, 1, 1), clips[:, 0], 16, [0, 1])
    saved_latents.save(tmp_path / "x.safetensors", latents)
    words = (
        ["generate", "x", "--num-videos", 2, "--no-progress"] if command == "generate" else ["decode", "x.safetensors"]
    )
    write_video(clips[0], "fr", 16)  # its name is none of the clips'
    assert run(*words, "-o", "fr") == 0 and len(made) == 1
    assert sorted(path.name for path in tmp_path.glob("fr*")) == ["fr", "fr-0", "fr-1"]
    capsys.readouterr()
    assert run(*words, "-o", "fr") == 2 and run(*words, "-o", ".gif") == 2 and len(made) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "fr-0 is not empty" in lines[0] and ".gif is a suffix without a name" in lines[1]


def test_a_clip_is_recoloured_by_editing_one_frame(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame, edited, out = tmp_path / "frame.png", tmp_path / "edited.png", tmp_path / "out"
    assert run("transfer", "--motion", clip, "--extract", frame, "--json") == 0
    picture = read_image(frame)
    assert np.array_equal(picture, read_video(clip)[0][7])
    Image.fromarray(np.ascontiguousarray(picture[..., ::-1])).save(edited)
    capsys.readouterr()
    assert run("transfer", "--motion", clip, "--image", edited, "-o", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 16
    frames = read_video(out)[0].astype(float)
    blue = frames[..., 2] - frames[..., 0] > 60
    assert blue.any((1, 2)).all(), "blue in every frame"
    place = [float(np.flatnonzero(each.any(0)).mean()) for each in blue]
    assert place[-1] - place[0] > 20, "and moving right, as the red one did"


def test_a_motion_bucket_may_be_0() -> None:
    command = ["generate", "--model", "svd-tiny", "--motion-bucket-id", "0", "--out", "c.mp4"]
    assert main.parser().parse_args(command).motion_bucket_id == 0


def test_no_input_is_replaced_by_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(np.zeros((16, 64, 64, 3), np.uint8), "clip.webp", 16)
    before = (tmp_path / "clip.webp").read_bytes()
    for command in (
        "reconstruct clip.webp --out ./clip.webp",
        "transfer --motion clip.webp --out clip.webp",
        "transfer --motion clip.webp --extract clip.webp",
        "generate x --image clip.webp --out clip.webp",
    ):
        assert run(*command.split()) == 2
        assert "clip.webp is the input; name another file for the output" in capsys.readouterr().err
    assert (tmp_path / "clip.webp").read_bytes() == before
