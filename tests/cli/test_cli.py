"""The command: what it prints, and that every mistake is one line on stderr, status 2, with nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reducio_fast.checkpoints import hub
from reducio_fast.checkpoints.strict_files import SVD_TINY, embedded_model
from reducio_fast.cli import main
from reducio_fast.media.similarity import psnr
from reducio_fast.media.video_files import read_video, write_video
from reducio_fast.pipelines import generate
from reducio_fast.pipelines.call.output import ReducioOutput
from reducio_fast.system import machine_report
from reducio_fast.system.errors import ReducioError

PROMPT = "a red circle moving right on a black background"


def run(argv: list[str]) -> int:
    try:
        return main.main(argv)
    except SystemExit as error:  # argparse leaves this way
        return error.code


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *((command, "(default: float32) ") for command in ("encode", "reconstruct", "transfer")),
        ("parity", "(default: that of the fast path on this machine)"),
        *((command, "multiple of 32, for SVD of 8 (default: the model's; for") for command in ("generate", "batch")),
        ("encode", "multiple of 32 (default: the model's)"),
    ],
)
def test_help_states_the_command_s_own_defaults(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one broken and one good input of each kind."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (inputs / "broken.mp4").write_bytes(b"broken" * 100)
    rng = np.random.default_rng(0)
    write_video(rng.integers(0, 256, (5, 32, 32, 3), np.uint8), inputs / "five.mp4", 16)
    (inputs / "empty").mkdir()
    (inputs / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must fail, checks all properties of a refusal, and returns its one line."""
    before = {f: f.stat().st_mtime_ns for f in Path.cwd().rglob("*")}
    assert run(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("reducio-fast")
    assert {f: f.stat().st_mtime_ns for f in Path.cwd().rglob("*")} == before
    return captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "required: COMMAND"),
        ("dance", "invalid choice: 'dance'"),
        ("generate", "required: --out"),
        ("generate x", "required: --out"),
        ("generate x --out c.mp4 --seed -1", "--seed: must not be negative, is -1"),
        ("generate x --out c.mp4 --height tall", "--height: invalid whole number value: 'tall'"),
        ("generate x --out c.mp4 --num-inference-steps 0", "--num-inference-steps: must be at least 1, is 0"),
        ("generate x --out c.mp4 --backend turbo", "--backend: invalid choice: 'turbo'"),
        ("generate x --out c.mp4 --dtype int8", "--dtype: invalid choice: 'int8'"),
        ("generate x --out c.avi", "unknown output type '.avi'"),
        ("generate x --out absent/c.mp4", "the output folder absent does not exist"),
        ("generate x --out inputs", "the output folder inputs is not empty"),
        ("generate x --out c.mp4 --image absent.png", "no such image file: absent.png"),
        ("generate x --out c.mp4 --image inputs/broken.png", "inputs/broken.png cannot be read"),
        ("generate x --out c.mp4 --model no-such-model", "no-such-model"),
        ("generate x --out c.mp4 --model inputs/model", "inputs/model: is no model folder, it is empty"),
        ("reconstruct", "required: INPUT, --out"),
        ("reconstruct absent.mp4 --out c.mp4", "no such file or folder: absent.mp4"),
        ("reconstruct inputs/broken.mp4 --out c.mp4", "inputs/broken.mp4 cannot be read"),
        ("reconstruct inputs/empty --out c.mp4", "inputs/empty holds no images"),
        ("reconstruct inputs/five.mp4 --start 9 --out c.mp4", "no frame from number 9 on"),
        ("reconstruct inputs/five.mp4 --out c.mkv", "unknown output type '.mkv'"),
        ("reconstruct inputs/five.mp4 --out c.mp4 --model no-such-model", "no-such-model"),
        ("reconstruct inputs/five.mp4 --out c.mp4 --model inputs/model", "inputs/model"),
        ("train giant --out runs", "invalid choice: 'giant'"),
        ("train tiny", "required: --out"),
        ("train tiny --out runs --stages dream", "dream"),
        ("train tiny --out runs --steps-scale 0", "0"),
        ("evaluate --model no-such-model --no-progress", "no-such-model"),
        ("evaluate --prompts 0", "--prompts: must be at least 1, is 0"),
    ],
)
@pytest.mark.slow
def test_mistakes(argv: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(argv.split(), capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--height", "100"], "100"),
        (["--width", "16"], "32"),
        (["--num-frames", "20"], "20"),
        (["--guidance-scale", "nan"], "guidance_scale"),
        (["--device", "abacus"], "abacus"),
    ],
)
@pytest.mark.slow
def test_mistakes_the_model_finds(
    bundle: Path, options: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["generate", PROMPT, "--out", "c.mp4", *options], capsys)


def test_empty_prompt(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "prompt" in refused(["generate", "  ", "--out", "c.mp4"], capsys)


def test_reconstruct_names_both_frame_counts(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["reconstruct", "inputs/five.mp4", "--out", "c.mp4"], capsys)
    assert "has 5 frames; the model takes 16" in line
    line = refused(["reconstruct", "inputs/five.mp4", "--out", "c.mp4", "--height", "100"], capsys)
    assert all(word in line for word in ("height", "100", "96", "128"))


def test_the_installed_command_shows_no_traceback(tmp_path: Path) -> None:
    """A real process, run from a folder outside the checkout."""
    command = [sys.executable, "-m", "reducio_fast", "generate", "x", "--out", "absent/c.mp4", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "reducio-fast generate: error: the output folder absent does not exist\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("generate", "reconstruct", "env", "train", "evaluate"):
        assert command in text


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "reducio-fast generate: interrupted\n"),
        (ReducioError("two\n  lines"), 2, "reducio-fast generate: error: two lines\n"),
        (torch.OutOfMemoryError("tried 9 GiB"), 2, "reducio-fast generate: error: out of memory: tried 9 GiB\n"),
        (MemoryError(), 2, "reducio-fast generate: error: out of memory: choose a smaller size\n"),
    ],
)
def test_ends_without_a_traceback(
    error: BaseException,
    status: int,
    message: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**kwargs: object) -> None:
        raise error

    monkeypatch.setattr(generate, "generate", fail)
    assert run(["generate", PROMPT, "--out", "c.mp4"]) == status
    assert capsys.readouterr().err == message
    assert not (here / "c.mp4").exists()


def test_a_defect_keeps_its_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**kwargs: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(generate, "generate", fail)
    with pytest.raises(ZeroDivisionError):
        run(["generate", PROMPT, "--out", "c.mp4"])


def test_generate_passes_its_words_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only given options are passed on: the model's call has the defaults, and the printed configuration shows them."""
    seen = {}

    def stand_in(**kwargs: object) -> SimpleNamespace:
        seen.update(kwargs)
        frames = np.zeros((16, 64, 96, 3), np.uint8)
        save = lambda path, encoding: write_video(frames, path, 16)  # noqa: E731 - one line of a stand-in
        answers = {"seed": 7, "seeds": [7], "fps": 16, "timings": {"dit.step": 0.5}, "encoder": "gif"}
        return SimpleNamespace(frames=frames, save=save, **answers)

    monkeypatch.setattr(generate, "generate", stand_in)
    argv = "generate x --out c.gif --seed 7 --width 96 --negative-prompt y --dtype bfloat16 --no-progress --json"
    assert run(argv.split()) == 0
    assert seen == {
        "prompt": "x",
        "negative_prompt": "y",
        "width": 96,
        "seed": 7,
        "backend": "auto",
        "dtype": "bfloat16",
        "progress": False,
    }
    result = json.loads(capsys.readouterr().out)
    assert (result["path"], result["seed"], result["fps"]) == ("c.gif", 7, 16)
    assert (result["config"]["height"], result["config"]["width"]) == (64, 96)
    assert (result["config"]["num_inference_steps"], result["config"]["guidance_scale"]) == (20, 4.5)
    assert result["timings"]["dit.step"] == 0.5 and result["encoder"] == "gif"


def test_generate_into_the_current_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names beside `.` begin with the folder's own: the preview's, and each clip's where there are several."""
    seen = {}

    def stand_in(**kwargs: Any) -> ReducioOutput:
        seen.update(kwargs)
        return ReducioOutput(np.zeros((2, 4, 32, 32, 3), np.uint8), None, [0, 1], 16, {}, is_list=True)

    monkeypatch.setattr(generate, "generate", stand_in)
    (here / "frames").mkdir()
    monkeypatch.chdir(here / "frames")
    assert run(["generate", "x", "--out", ".", "--preview-every", "2", "--num-videos", "2", "--no-progress"]) == 0
    assert seen["callback_on_step_end"].path == here / "frames-preview.png"
    assert [len(list((here / name).iterdir())) for name in ("frames-0", "frames-1", "frames")] == [4, 4, 0]


@pytest.mark.slow
def test_generate(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", PROMPT, "--out", "c.mp4", "--num-inference-steps", "4", "--no-progress", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    config = result["config"]
    assert config["prompt"] == PROMPT and config["num_inference_steps"] == 4 and config["seed"] == result["seed"] == 0
    assert {"content.generate", "text.encode", "dit.step", "vae.decode", "video.write"} <= set(result["timings"])
    clip, fps = read_video("c.mp4")
    assert clip.shape == (config["num_frames"], config["height"], config["width"], 3)
    assert fps == result["fps"]


@pytest.mark.slow
def test_generate_from_an_image_with_transparency(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGBA", (200, 150), (0, 0, 255, 128)).save("i.png")
    assert run(["generate", PROMPT, "--image", "i.png", "--out", "frames", "--num-inference-steps", "2"]) == 0
    assert len(list((here / "frames").glob("*.png"))) == 16
    text = capsys.readouterr().out
    assert "wrote frames: 16 frames" in text
    for word in ("i.png", "seed", "vae.decode", "total"):
        assert word in text


def moving_square(path: str) -> None:
    clip = np.full((18, 96, 160, 3), 40, np.uint8)
    for t in range(18):
        clip[t, 30:60, 20 + 4 * t : 50 + 4 * t] = (220, 40, 40)
    write_video(clip, path, 10)


@pytest.mark.slow
def test_reconstruct(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moving_square("c.mp4")
    size = ["--height", "64", "--width", "96"]
    assert run(["reconstruct", "c.mp4", "--out", "both.mp4", "--start", "2", *size, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["frames"], result["height"], result["width"]) == (16, 64, 96)
    both, fps = read_video("both.mp4")
    assert both.shape == (16, 64, 192, 3)
    assert fps == pytest.approx(10)
    assert 15 < result["psnr"] < 60 and 0.3 < result["ssim"] <= 1
    # The figures are those of the written frames, up to the loss of the .mp4 (whose chroma has half the resolution).
    assert psnr(both[:, :, :96], both[:, :, 96:]) == pytest.approx(result["psnr"], abs=1.5)


@pytest.mark.slow
def test_reconstruct_reads_at_the_rate_of_the_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in the release, a model of 16 frames per second reads every second frame of a clip of 30."""
    clip = np.stack([np.full((64, 64, 3), 6 * t, np.uint8) for t in range(33)])
    write_video(clip, "fast.mp4", 30)
    size = ["--height", "64", "--width", "64", "--json"]
    for options, step in ([], 2), (["--consecutive"], 1):
        assert run(["reconstruct", "fast.mp4", "--out", "both.mp4", *options, *size]) == 0
        result = json.loads(capsys.readouterr().out)
        both, fps = read_video("both.mp4")
        assert (result["step"], result["dtype"]) == (step, "float32") and fps == pytest.approx(30 / step)
        assert np.abs(both[:, 32, 32, 0].astype(int) - clip[::step][:16, 0, 0, 0]).max() <= 4
    line = refused(["reconstruct", "fast.mp4", "--out", "c.mp4", "--start", "10", *size[:4]], capsys)
    assert "12 frames from number 10 on that are 2 apart (--consecutive takes all); the model takes 16" in line


@pytest.mark.slow
def test_reconstruct_a_folder_at_the_size_of_the_model(
    bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moving_square("frames")
    assert run(["reconstruct", "frames", "--out", "both.gif"]) == 0
    text = capsys.readouterr().out
    assert "PSNR" in text and "SSIM" in text
    index = json.loads((bundle / "model_index.json").read_text())
    both, fps = read_video("both.gif")
    assert both.shape[1:] == (index["sample_height"], 2 * index["sample_width"], 3)
    assert fps == pytest.approx(index["fps"], rel=0.03)


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["cpu"]["cpu_cores"] >= 1
    assert len(report["devices"]) == torch.cuda.device_count()
    assert 15 < float(report["embedded_model"].removesuffix(" MB")) <= 25
    assert run(["env"]) == 0
    text = capsys.readouterr().out
    words = ("python", "torch", "diffusers", "transformers", "open_clip", "cpu_features", "device", "REDUCIO_CACHE_DIR")
    for word in words:
        assert word in text


def test_env_survives_a_broken_installation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`env` works with a torch whose library does not load and without any package."""

    def no_torch(name: str) -> None:
        raise OSError(f"lib{name}.so: cannot open shared object file")

    monkeypatch.setattr(machine_report.importlib, "import_module", no_torch)
    monkeypatch.setattr(machine_report, "PACKAGES", ("no-such-package",))
    assert run(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["devices"] == "unavailable: OSError: libtorch.so: cannot open shared object file"
    assert report["packages"] == {"no-such-package": None}
    assert run(["env"]) == 0
    assert "libtorch.so" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("targets", "kernel", "only"),
    [
        ("sm_90,gfx942", "conv3d", "bf16 128->128 k3 residual"),
        ("sm_80", "gated_residual_ada_layer_norm", "bf16 1152 gated"),
    ],
)
@pytest.mark.slow
def test_compile_check_builds_for_a_gpu_that_is_not_here(targets: str, kernel: str, only: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    argv = f"compile-check --json --jobs 1 --targets {targets} --kernels {kernel} --only".split()
    argv = [sys.executable, "-m", "reducio_fast", *argv, only]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {build["arch"] for build in result["builds"]} == set(targets.split(",")) and result["wrong"] == 0
    for build in result["builds"]:
        assert only in build["variant"]
        assert build["registers"] > 0 and build["spilled"] == 0
        if kernel == "conv3d":
            assert build["bulk_copy"] and build["matrix"] in ("wgmma.mma_async", "v_mfma")


def test_compile_check_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run(["compile-check"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert run(["compile-check", "--targets", "sm_12"]) == 2
    assert "target 'sm_12' is unknown; known: sm_80" in capsys.readouterr().err


@pytest.mark.slow
def test_parity_holds_on_the_default_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["parity", "--json", "--device", "cpu", "--dtype", "float32"]) == 0
    result = json.loads(capsys.readouterr().out)
    stages = {row["what"].split(": ")[1] for row in result["rows"]}
    assert stages == {"vae.encode", "vae.decode", "dit.step", "20 steps with guidance", "end to end"}
    assert result["wrong"] == 0 and all(0 < row["error"] <= row["limit"] for row in result["rows"])


def test_the_summary_names_the_defaults_of_a_hub_id_s_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "find_model", lambda *given, **kwargs: embedded_model(SVD_TINY))
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    argv = ["generate", "--model", "some/clips", "--image", str(tmp_path / "x.png"), "--num-inference-steps", "2"]
    assert run([*argv, "--out", str(tmp_path / "c.gif"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["max_guidance_scale"] == 3.0
