"""Metrics that need networks: their arithmetic compared with scipy and lpips, on small networks."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from scipy import linalg, special
from torch import nn

from reducio_fast.checkpoints.networks import save_model
from reducio_fast.cli.main import main
from reducio_fast.data import photos
from reducio_fast.evaluation import calibration, reconstruction, video_report
from reducio_fast.evaluation.networks import ClipNetwork, FrechetDistance, InceptionScore, prepare
from reducio_fast.evaluation.published import autoencoder_table
from reducio_fast.evaluation.vbench import run_vbench
from reducio_fast.media.perceptual import Perceptual
from reducio_fast.media.pixels import to_unit
from reducio_fast.media.video_files import write_video
from reducio_fast.reference import ReducioVAE, VAEConfig
from reducio_fast.system.errors import ReducioError
from tiny_networks import VAE, lively

pytestmark = pytest.mark.slow


class Means(nn.Module):
    """Features of a clip: linear combinations of the means over a coarse grid."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.mix = nn.Linear(3 * 2 * 2 * 2, features)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.mix(nn.functional.adaptive_avg_pool3d(clip, (2, 2, 2)).flatten(1))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("networks") / "features.pt"
    torch.jit.script(Means(6)).save(str(path))
    return path


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of AlexNet under torchvision's names."""
    torch.manual_seed(1)
    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    weights = {"features." + k.split(".", 1)[1]: v for k, v in model.net.state_dict().items()}
    path = tmp_path_factory.mktemp("trunk") / "alexnet.pth"
    torch.save({**weights, "classifier.1.weight": torch.zeros(1)}, path)
    return path


def clips(count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [photos.render(rng, 64, 16) for _ in range(count)]


def test_frechet_distance_equals_scipy(network: Path) -> None:
    kinds = clips(12, 0), clips(9, 1)
    loaded = ClipNetwork(network)
    distance = FrechetDistance(loaded)
    for group, real in zip(kinds, (True, False), strict=True):
        for clip in group:
            distance.add(clip, real)
    features = [np.stack([loaded(prepare(c))[0].double().numpy() for c in group]) for group in kinds]
    (m1, m2), (c1, c2) = [f.mean(0) for f in features], [np.cov(f, rowvar=False) for f in features]
    expected = np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert distance.compute() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ReducioError, match=r"needs two clips of each kind, there are \[0, 0\]"):
        FrechetDistance(loaded).compute()


def test_inception_score_equals_its_definition(network: Path) -> None:
    made, loaded = clips(10, 2), ClipNetwork(network)
    score = InceptionScore(loaded)
    for clip in made:
        score.add(clip)
    probabilities = special.softmax(np.stack([loaded(prepare(c))[0].double().numpy() for c in made]), axis=1)
    expected = np.exp(special.kl_div(probabilities, probabilities.mean(0)).sum(1).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score.compute() == pytest.approx(expected, rel=1e-5)


def test_lpips_equals_its_package(trunk: Path) -> None:
    a, b = clips(2, 3)
    own = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    stored = torch.load(trunk, weights_only=True)
    own.net.load_state_dict({k: stored["features." + k.split(".", 1)[1]] for k in own.net.state_dict()})
    scores = Perceptual(trunk)(a, b)
    with torch.no_grad():
        x, y = to_unit(a), to_unit(b)
        assert scores["lpips"] == pytest.approx(float(own(x, y).mean()), rel=1e-6)
        # `normalize=True` tells lpips that images are in 0..1; the release omits it, which gives `lpips_0_1`.
        assert scores["lpips"] == pytest.approx(float(own((x + 1) / 2, (y + 1) / 2, normalize=True).mean()), rel=1e-5)
        assert scores["lpips_0_1"] == pytest.approx(float(own((x + 1) / 2, (y + 1) / 2).mean()), rel=1e-6)
    assert scores["lpips"] != scores["lpips_0_1"] and Perceptual(trunk)(a, a)["lpips"] == 0


def test_networks_that_do_not_fit_are_named(tmp_path: Path, trunk: Path) -> None:
    (tmp_path / "words.pt").write_text("no network")
    with pytest.raises(ReducioError, match="is no TorchScript network"):
        ClipNetwork(tmp_path / "words.pt")
    torch.jit.script(nn.Conv2d(3, 4, 1)).save(str(tmp_path / "images.pt"))
    with pytest.raises(ReducioError, match=r"takes no clip \[1, 3, 16, 224, 224\]"):
        ClipNetwork(tmp_path / "images.pt")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ReducioError, match="has no features.0.bias; it must be torchvision's weights"):
        Perceptual(tmp_path / "other.pth")
    with pytest.raises(ReducioError, match="net='resnet': must be one of alex, vgg, squeeze"):
        Perceptual(trunk, net="resnet")
    with pytest.raises(ReducioError, match="a clip of 3 frames: 16 are needed"):
        prepare(np.zeros((3, 8, 8, 3), np.uint8))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shots of 32 and 20 frames, and a still."""
    folder, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(5)
    first, second = (photos.render(rng, 96, n, name=name) for n, name in ((32, "astronaut"), (20, "flower")))
    write_video(np.concatenate([first, second])[:, :, 16:], folder / "cut.mp4", 24)
    write_video(np.repeat(photos.render(rng, 96, 1, name="chelsea"), 20, axis=0), folder / "still.mp4", 24)
    return folder


def test_windows_lie_within_shots(videos: Path) -> None:
    found = list(video_report.windows(str(videos / "cut.mp4"), 64, 16))
    assert len(found) == 3 and all(clip.shape == (16, 64, 64, 3) for clip in found)


def test_an_autoencoder_on_real_video(videos: Path, network: Path, trunk: Path, tmp_path: Path, capsys) -> None:
    model = lively(ReducioVAE(VAEConfig(**VAE, output="warp")))
    for parameter in (*model.decoder.conv_out.parameters(), *model.warp.flow.parameters()):
        parameter.data.zero_()  # the output repeats the content frame, so every figure is known
    save_model(model, tmp_path / "vae")
    argv = ["evaluate", "autoencoder", "--model", str(tmp_path), "--videos", str(videos), "--size", "64"]
    assert main([*argv, "--size", "96", "--lpips", str(trunk), "--fvd", str(network), "--json", "--no-progress"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"64", "96"}
    for entry in result.values():
        assert entry["videos"]["cut.mp4"]["clips"] == 3 and entry["videos"]["still.mp4"]["clips"] == 1
        assert abs(entry["videos"]["cut.mp4"]["pooled_gain_db"]) < 0.05
        assert entry["videos"]["cut.mp4"]["content_psnr"] > 50 and entry["all"]["clips"] == 4
        assert entry["all"]["rfvd"] > 0 and entry["all"]["lpips"] > 0
    assert main([*argv, "--no-progress"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["cut.mp4", "3"] for line in lines)
    assert any(line.startswith("Reducio (ft4)") and "35.88" in line for line in lines)
    assert main(["evaluate", "autoencoder"]) == 2 and "needs --videos" in capsys.readouterr().err


def test_videos_of_one_name_and_sizes_that_do_not_fit(videos: Path, tmp_path: Path, monkeypatch) -> None:
    for name, source in (("a", "cut.mp4"), ("b", "still.mp4")):
        (tmp_path / name).mkdir()
        shutil.copy(videos / source, tmp_path / name / "1.mp4")
    model = lively(ReducioVAE(VAEConfig(**VAE)))
    result = video_report.evaluate_autoencoder(model, [tmp_path / "a", tmp_path / "b"], [32], progress=False)
    assert {name: row["clips"] for name, row in result["32"]["videos"].items()} == {"a/1.mp4": 3, "b/1.mp4": 1}
    monkeypatch.setattr(video_report, "windows", None)  # nothing is decoded
    with pytest.raises(ReducioError, match="size: 100 is not a multiple of 32"):
        video_report.evaluate_autoencoder(model, [tmp_path], [32, 100], progress=False)


def test_clips_to_calibrate_on_are_taken_in_turn_and_decoded_when_needed(videos: Path, monkeypatch) -> None:
    opened = []

    def clips_of(path: str, size: int, length: int):
        name = Path(path).name
        opened.append(name)
        yield from (f"{name} {i}" for i in range(3 if name == "cut.mp4" else 1))

    monkeypatch.setattr(calibration, "_clips_of", clips_of)
    assert list(calibration.video_clips([videos], 64, 16, 1)) == ["cut.mp4 0"] and opened == ["cut.mp4"]
    assert list(calibration.video_clips([videos], 64, 16, 9)) == ["cut.mp4 0", "still.mp4 0", "cut.mp4 1", "cut.mp4 2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--videos x.mp4", "evaluate toy takes no --videos, which is of evaluate autoencoder"),
        ("autoencoder --videos x.mp4 --prompts 4", "takes no --prompts, which is of evaluate toy"),
        ("clips --videos x.mp4 --model m", "takes no --model"),
        ("clips --videos VIDEOS --fvd x.pt", "fvd needs real clips"),
        ("clips --videos VIDEOS --clip m --captions CAPTIONS", "captions: none given for VIDEOS/still.mp4"),
        ("clips --videos VIDEOS --clip m --captions EMPTY", "captions: none given for VIDEOS/still.mp4"),
        ("clips --videos VIDEOS --clip m --captions LIST", "must be one JSON object"),
        ("clips --videos VIDEOS --clip m --captions DEEP", "recursion"),
        ("vbench --vbench python --out o --captions CAPTIONS", "must be one JSON list of prompts"),
        ("vbench --vbench python --out o --captions LIST --device cuda:77", "device: 'cuda:77' cannot be used here"),
        ("clips --videos VIDEOS --device cuda:77", "device: 'cuda:77' cannot be used here"),
        ("clips --videos VIDEOS --dtype float16", "evaluate clips takes no --dtype"),
        ("autoencoder --videos VIDEOS --device cuda:77", "device: 'cuda:77' cannot be used here"),
        ("toy --device cuda:77", "device: 'cuda:77' cannot be used here"),
        ("clips --videos VIDEOS --real VIDEOS/cut.mp4 --fvd x.pt", "two clips of each kind, there are [1, 2]"),
    ],
)
def test_mistakes_are_named_before_any_work(
    argv: str, message: str, videos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(video_report, "read_video", None)
    one = {"cut.mp4": "a person"}
    files = {"CAPTIONS": json.dumps(one), "EMPTY": json.dumps(one | {"still.mp4": ""}), "LIST": '["a person"]'}
    for word, text in (files | {"DEEP": "[" * 200_000}).items():
        (tmp_path / f"{word}.json").write_text(text)
        argv = argv.replace(word, str(tmp_path / f"{word}.json"))
    argv, message = argv.replace("VIDEOS", str(videos)), message.replace("VIDEOS", str(videos))
    assert main(["evaluate", *argv.split(), "--no-progress"]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


def test_the_table_has_the_published_columns() -> None:
    table = autoencoder_table("mine", "4x32x32", 16, {"psnr": 30.123, "ssim": 0.9, "lpips_0_1": None, "rfvd": 12.0})
    assert table[0].split() == ["model", "factor", "z", "PSNR", "SSIM", "LPIPS", "rFVD"]
    assert table[-1].split() == ["mine", "4x32x32", "16", "30.12", "0.90", "-", "12.00"]
    assert len({len(line) for line in table}) == 1


def test_generated_clips_beside_real_ones(videos: Path, network: Path, capsys) -> None:
    still = [str(videos / "still.mp4")] * 1
    assert video_report.evaluate_clips(still, progress=False)["motion"] < 0.05
    both = [str(videos)]
    result = video_report.evaluate_clips(both, both, fvd=network, classifier=network, progress=False)
    assert result["clips"] == result["real_clips"] == 2 and result["motion"] == result["real_motion"] > 0.05
    assert abs(result["fvd"]) < 1e-4 and result["inception_score"] >= 1
    with pytest.raises(ReducioError, match="fvd needs real clips"):
        video_report.evaluate_clips(both, fvd=network, progress=False)
    assert main(["evaluate", "clips", "--videos", str(videos), "--no-progress"]) == 0
    assert "paper, FVD UCF-101" in capsys.readouterr().out


def pan(seed: int, count: int) -> np.ndarray:
    """A picture that moves one pixel per frame."""
    picture = photos.render(np.random.default_rng(seed), 160, 1)[0]
    return np.stack([picture[32:128, i : i + 96] for i in range(count)])


def test_real_video_is_compared_at_the_rate_of_the_clips(tmp_path: Path, network: Path, monkeypatch, capsys) -> None:
    """Real: 32 frames a second, one second of a pan, then black. Generated: the pan at 16 frames a second."""
    made, real = tmp_path / "made", tmp_path / "real"
    made.mkdir()
    real.mkdir()
    for seed in range(2):
        film = pan(seed, 64)
        film[32:] = 0
        write_video(film, real / f"{seed}.mp4", 32)
        write_video(film[:32:2], made / f"{seed}.mp4", 16)
    read, most = video_report.read_video, []

    def counted(path: str, start: int = 0, count: int | None = None):
        frames, fps = read(path, start, count)
        most.append(len(frames))
        return frames, fps

    monkeypatch.setattr(video_report, "read_video", counted)
    argv = ["evaluate", "clips", "--videos", str(made), "--real", str(real), "--no-progress", "--fvd", str(network)]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fps"] == result["real_fps"] == 16 and max(most) == 31
    assert result["real_motion"] == pytest.approx(result["motion"], rel=0.05) and result["motion"] > 1
    assert abs(result["fvd"]) < 1e-3
    assert main(argv[:-2]) == 0 and "first 16 frames, taken at about 16 a second" in capsys.readouterr().out


def test_a_video_too_short_for_the_step_gives_frames_closer_together(tmp_path: Path, network: Path, capsys) -> None:
    for seed, count in ((0, 20), (1, 10)):
        write_video(pan(seed, count), tmp_path / f"{count}.mp4", 32)
    frames, fps = video_report.first_second(str(tmp_path / "20.mp4"), 16)
    assert len(frames) == 16 and fps == 32
    assert len(video_report.first_second(str(tmp_path / "10.mp4"))[0]) == 10
    argv = ["evaluate", "clips", "--videos", str(tmp_path), "--classifier", str(network), "--no-progress"]
    assert main(argv) == 2 and "10.mp4 has 10 frames: 16 are needed" in capsys.readouterr().err


VBENCH = """
import argparse, json, os, vbench
parser = argparse.ArgumentParser()
for name in ("--videos_path", "--output_path", "--full_json_dir"):
    parser.add_argument(name)
parser.add_argument("--dimension", nargs="+", required=True)
parser.add_argument("--mode", choices=["custom_input", "vbench_standard", "vbench_category"], default="vbench_standard")
if __name__ == "__main__":
    arguments = parser.parse_args()
    if "human_action" in arguments.dimension:
        raise RuntimeError("no checkpoint")
    os.makedirs(arguments.output_path, exist_ok=True)
    names = sorted(os.listdir(arguments.videos_path))
    result = {"names": names, "dimension": arguments.dimension, "mode": arguments.mode}
    with open(os.path.join(arguments.output_path, "results_x_eval_results.json"), "w") as file:
        json.dump(result, file)
"""


@pytest.fixture
def vbench_python(tmp_path: Path) -> Path:
    """An interpreter with stand-ins for torch on a GPU and for vbench, which has the modules of the wheel 0.1.5."""
    package = tmp_path / "site" / "vbench"
    (package / "launch").mkdir(parents=True)
    for file in (package / "__init__.py", package / "launch" / "__init__.py"):
        file.write_text("")
    (package / "launch" / "evaluate.py").write_text(VBENCH)
    listed = [("a toilet, frozen in time", ["temporal_flickering"]), ("a cat", ["color", "motion_smoothness"])]
    listed += [("a person is running", ["human_action"])]
    entries = [{"prompt_en": prompt, "dimension": names} for prompt, names in listed]
    (package / "VBench_full_info.json").write_text(json.dumps(entries))
    (package.parent / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{package.parent}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


class Drawn:
    """A pipeline that counts its calls."""

    calls = 0

    def __call__(self, prompt: str, seed: int, progress: bool):
        self.calls += 1
        return type("Clip", (), {"frames": np.full((4, 32, 32, 3), seed, np.uint8), "fps": 8})


def test_vbench_runs_in_another_environment(tmp_path: Path, vbench_python: Path) -> None:
    names, python = ["motion_smoothness", "temporal_flickering"], str(vbench_python)
    result = run_vbench(Drawn(), ["a dog"], tmp_path / "dog", python, names, count=2)
    assert result == {"names": ["a dog-0.mp4", "a dog-1.mp4"], "dimension": names, "mode": "custom_input"}
    result = run_vbench(Drawn(), ["a cat"], tmp_path / "cat", python, ["color", "motion_smoothness"], count=1)
    assert result == {"names": ["a cat-0.mp4"], "dimension": ["color", "motion_smoothness"], "mode": "vbench_standard"}
    # A prompt of VBench's for another dimension is not found in standard mode either.
    assert run_vbench(Drawn(), ["a cat"], tmp_path / "cat", python, names, count=1)["mode"] == "custom_input"
    with pytest.raises(ReducioError, match="vbench failed: RuntimeError: no checkpoint"):
        run_vbench(Drawn(), ["a person is running"], tmp_path / "run", python, ["human_action"], count=1)


def test_what_vbench_cannot_score_is_named_before_clips_are_made(tmp_path: Path, vbench_python: Path) -> None:
    pipe, python, out = Drawn(), str(vbench_python), tmp_path / "out"
    for prompts, interpreter, name, message in (
        (["a dog"], str(tmp_path / "none"), "color", "none cannot be run: No such file"),
        (["a dog"], python, "colour", "dimension: must be one of color, .* is 'colour'"),
        (["a dog"], python, "color", "dimension color: VBench scores it on its own prompts"),
        (["a/dog"], python, "motion_smoothness", "prompt 'a/dog': holds /"),
        ([], python, "motion_smoothness", "prompt: must be text or a list of texts"),
    ):
        with pytest.raises(ReducioError, match=message):
            run_vbench(pipe, prompts, out, interpreter, [name])
    (tmp_path / "site" / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    with pytest.raises(ReducioError, match="VBench needs a CUDA GPU"):
        run_vbench(pipe, ["a dog"], out, python, ["motion_smoothness"])
    shutil.rmtree(tmp_path / "site" / "vbench")
    with pytest.raises(ReducioError, match="it cannot import vbench: ModuleNotFoundError: No module named 'vbench'"):
        run_vbench(pipe, ["a dog"], out, python, ["motion_smoothness"])
    assert pipe.calls == 0


def test_the_autoencoder_runs_in_the_dtype_and_once_per_clip(videos: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    save_model(lively(ReducioVAE(VAEConfig(**VAE))), tmp_path / "vae")
    dtypes = []

    def counted(vae: ReducioVAE, clip: np.ndarray, refine: int) -> np.ndarray:
        dtypes.append(next(vae.parameters()).dtype)
        return clip

    monkeypatch.setattr(video_report, "reconstruct", counted)
    monkeypatch.setattr(reconstruction, "reconstruct", counted)
    argv = ["evaluate", "autoencoder", "--model", str(tmp_path), "--videos", str(videos), "--size", "32"]
    for more, dtype in (([], torch.float32), (["--dtype", "bfloat16"], torch.bfloat16)):
        dtypes.clear()
        assert main([*argv, "--device", "cpu", "--no-progress", *more]) == 0
        assert dtypes == 4 * [dtype]


def test_the_networks_run_on_the_device(videos: Path, network: Path, capsys, monkeypatch) -> None:
    loaded = []

    class Network(ClipNetwork):
        def __init__(self, path: str, device: torch.device) -> None:
            loaded.append(device)
            super().__init__(path, "cpu")

    monkeypatch.setattr(video_report, "ClipNetwork", Network)
    both = ["--videos", str(videos), "--real", str(videos), "--fvd", str(network), "--classifier", str(network)]
    assert main(["evaluate", "clips", *both, "--device", "cpu:0", "--no-progress"]) == 0
    assert loaded == 2 * [torch.device("cpu:0")]
