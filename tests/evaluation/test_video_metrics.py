"""Metrics that need networks: their arithmetic compared with scipy and lpips, on small networks."""

from __future__ import annotations

import json
import shutil
import sys
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
from reducio_fast.evaluation import calibration, video_report
from reducio_fast.evaluation.networks import ClipNetwork, FrechetDistance, inception_score, prepare
from reducio_fast.evaluation.published import autoencoder_table
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
    probabilities = special.softmax(np.stack([loaded(prepare(c))[0].double().numpy() for c in made]), axis=1)
    expected = np.exp(special.kl_div(probabilities, probabilities.mean(0)).sum(1).mean())
    assert inception_score(loaded, made)[0] == pytest.approx(expected, rel=1e-5)


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

    def windows(path: str, size: int, length: int):
        name = Path(path).name
        opened.append(name)
        yield from (f"{name} {i}" for i in range(3 if name == "cut.mp4" else 1))

    monkeypatch.setattr(calibration, "windows", windows)
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
        ("clips --videos VIDEOS --clip m --captions LIST", "must be one JSON object"),
        ("vbench --vbench python --out o --captions CAPTIONS", "must be one JSON list of prompts"),
    ],
)
def test_mistakes_are_named_before_any_work(
    argv: str, message: str, videos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(video_report, "read_video", None)
    captions, prompts = tmp_path / "captions.json", tmp_path / "list.json"
    captions.write_text(json.dumps({"cut.mp4": "a person"}))
    prompts.write_text(json.dumps(["a person"]))
    for word, path in (("VIDEOS", videos), ("CAPTIONS", captions), ("LIST", prompts)):
        argv, message = argv.replace(word, str(path)), message.replace(word, str(path))
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


def test_vbench_runs_in_another_environment(tmp_path: Path) -> None:
    """VBench runs in another interpreter; this one has a stand-in package called vbench, which counts the clips."""

    class Pipe:
        def __call__(self, prompt: str, seed: int, progress: bool):
            return type("Clip", (), {"frames": np.full((4, 32, 32, 3), seed, np.uint8), "fps": 8})

    package = tmp_path / "site"
    package.mkdir()
    (package / "vbench.py").write_text(
        "import json, os, sys\n"
        "argv = sys.argv\n"
        "folder, out = argv[argv.index('--videos_path') + 1], argv[argv.index('--output_path') + 1]\n"
        "os.makedirs(out, exist_ok=True)\n"
        "names = sorted(n for n in os.listdir(folder) if n.endswith('.mp4'))\n"
        "json.dump({'names': names, 'dimension': argv[argv.index('--dimension') + 1]},\n"
        "          open(os.path.join(out, 'x_eval_results.json'), 'w'))\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{package}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    result = video_report.run_vbench(Pipe(), ["a cat"], tmp_path / "out", str(python), ["motion_smoothness"], count=2)
    assert result == {"names": ["a cat-0.mp4", "a cat-1.mp4"], "dimension": "motion_smoothness"}
    with pytest.raises(ReducioError, match="cannot be run: No such file"):
        video_report.run_vbench(Pipe(), [], tmp_path / "out", str(tmp_path / "none"), ["x"])
    with pytest.raises(ReducioError, match="vbench ended with 1: .*No module named vbench"):
        video_report.run_vbench(Pipe(), [], tmp_path / "out", sys.executable, ["x"])
