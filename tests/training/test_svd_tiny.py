"""The recipe of the small embedded SVD at a few steps: it writes a folder that every interface to the model loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reducio_fast
from reducio_fast.checkpoints import strict_files
from reducio_fast.cli.main import main
from reducio_fast.media.image_files import fit_image
from reducio_fast.pipelines.svd.pipeline import SVDPipeline
from reducio_fast.system.errors import ReducioError
from reducio_fast.training.recipe import Context, Stage, run_stages
from reducio_fast.training.svd import tiny_autoencoder, tiny_unet, toy_clips
from reducio_fast.training.svd.tiny_recipe import STAGES
from tiny_svd import QUIET


def test_toy_clips_are_told_in_svds_terms():
    """The first frame is the picture; more motion, or fewer frames a second, moves more from frame to frame."""
    moved: dict[tuple[int, int], list[float]] = {}
    for seed in range(150):
        clip = toy_clips.draw_clip(np.random.default_rng(seed))
        assert clip.frames.shape == (14, 64, 64, 3) and clip.fps in toy_clips.RATES
        change = np.abs(np.diff(clip.frames.astype(float), axis=0)).mean()
        moved.setdefault((clip.fps, clip.motion_bucket_id), []).append(change)
    mean = {key: np.mean(changes) for key, changes in moved.items()}
    assert all(mean[rate, 64] < mean[rate, 127] < mean[rate, 191] for rate in toy_clips.RATES)
    assert all(mean[14, bucket] < mean[7, bucket] for bucket in (64, 127, 191))
    again = toy_clips.draw_clip(np.random.default_rng(3))
    assert np.array_equal(again.frames, toy_clips.draw_clip(np.random.default_rng(3)).frames)


def test_the_recipes_networks_fit_into_eight_megabytes():
    """Counted at two bytes per weight, before any training."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from reducio_fast.reference.svd.unet import VideoUNet
    from reducio_fast.reference.svd.vae import TemporalVAE

    settings = {name: stage.settings for name, stage in STAGES.items()}
    with torch.device("meta"):
        networks = (
            VideoUNet(settings["unet"].config),
            TemporalVAE(settings["autoencoder"].config),
            CLIPVisionModelWithProjection(CLIPVisionConfig(**settings["image_encoder"].model)),
        )
    weights = 2 * sum(p.numel() for network in networks for p in network.parameters())
    assert 7_000_000 < weights < settings["export"].max_bytes - 50_000 <= 8_000_000 - 50_000, weights


def test_an_autoencoder_starts_by_handing_flat_pictures_on():
    torch.manual_seed(0)
    vae = tiny_autoencoder.TemporalVAE(tiny_autoencoder.TINY_VAE)
    tiny_autoencoder.initialize(vae)
    with torch.no_grad():
        mean, logvar = tiny_autoencoder.moments(vae, torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16))
        frames = vae.decode(mean[None])
    assert mean.std() > 0.05 and torch.isfinite(frames).all() and frames.std() > 0.05
    assert logvar.mean() == pytest.approx(tiny_autoencoder.START_LOGVAR, abs=2)


def shortened() -> dict[str, Stage]:
    """Every stage of the recipe, with its networks and its code, at two steps and with as few clips as possible."""
    few = {
        "autoencoder": {"phases": ((0.5, 2, 32, 1), (1.0, 14, 64, 1)), "evaluated": 1},
        "image_encoder": {"batch": 2, "evaluated": 4},
        "unet": {"batch": 1, "pool": 2, "held_out_pool": 1},
        "export": {"clips": 1, "steps": 1},
    }
    stages = {}
    for name, stage in STAGES.items():
        settings = dataclasses.replace(stage.settings, **few[name])
        if name != "export":
            loop = dataclasses.replace(settings.loop, steps=2, warmup_steps=1, checkpoint_every=2)
            settings = dataclasses.replace(settings, loop=loop)
        stages[name] = dataclasses.replace(stage, settings=settings)
    return stages


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("svd-tiny")
    figures = run_stages(shortened(), out, progress=False)
    assert set(figures) == set(STAGES) and figures["autoencoder"]["steps"] == figures["unet"]["steps"] == 2
    assert all(np.isfinite(value) for row in figures.values() for value in row.values())
    assert 7_000_000 < figures["export"]["bytes"] <= 8_000_000
    assert figures["unet"]["held_out_1"] == pytest.approx(1, abs=0.6), "as good as an untrained network"
    return out / "bundle"


@pytest.mark.slow
def test_the_folder_is_one_of_svd(trained: Path):
    from diffusers import StableVideoDiffusionPipeline

    pipe = SVDPipeline.from_pretrained(trained, device="cpu")
    assert pipe.usual_size == (64, 64) and pipe.unet.config.num_frames == 14
    assert {p.suffix for p in trained.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".md"}
    assert {p.stat().st_mode & 0o777 for p in trained.rglob("*.safetensors")} == {0o644}
    peer = StableVideoDiffusionPipeline.from_pretrained(trained, torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    picture = toy_clips.draw_clip(np.random.default_rng(0)).frames[0]
    call = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    expected = peer(Image.fromarray(picture), **call, generator=torch.Generator().manual_seed(0)).frames[0]
    assert expected.shape == (14, 64, 64, 3)


@pytest.mark.slow
def test_every_road_to_the_embedded_model(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`svd-tiny` by name: without its folder the error names the command that makes it, with it 14 frames of 64x64."""
    monkeypatch.setattr(strict_files.resources, "files", lambda name: tmp_path)
    with pytest.raises(ReducioError, match=r"no svd-tiny .*; `reducio-fast train svd-tiny --out DIR` makes it"):
        reducio_fast.generate(model="svd-tiny", image=np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "svd-tiny").symlink_to(trained)
    clip = toy_clips.draw_clip(np.random.default_rng(1))
    call = {"num_inference_steps": 2, "device": "cpu", **QUIET}
    for backend in ("reference", "fast"):
        out = reducio_fast.generate(model="svd-tiny", image=clip.frames[0], backend=backend, **call)
        assert out.frames.shape == (14, 64, 64, 3) and out.fps == 7
        assert np.array_equal(out.content, fit_image(clip.frames[0], 64, 64))
    Image.fromarray(clip.frames[0]).save(tmp_path / "photo.png")
    argv = ["generate", "--model", "svd-tiny", "--image", f"{tmp_path}/photo.png", "--out", f"{tmp_path}/clip.gif"]
    assert main([*argv, "--num-inference-steps", "1", "--device", "cpu", "--no-progress"]) == 0
    assert "14 frames of 64x64 at 7 frames a second" in capsys.readouterr().out
    reducio_fast.pipelines.generate.forget()


@pytest.mark.slow
def test_stages_by_name(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "svd-tiny", "--out", f"{tmp_path}/new", "--stages", "unet", "--no-progress"]) == 2
    assert "needs" in (error := capsys.readouterr().err) and "'autoencoder' makes; run that first" in error
    assert main(["train", "svd-tiny", "--out", f"{tmp_path}/new", "--recipe", "svd-lora"]) == 2
    assert "train svd-tiny takes no --recipe" in capsys.readouterr().err


def test_a_pool_of_another_encoder_or_seed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the same number of clips too, and after --no-resume."""
    settings = dataclasses.replace(STAGES["unet"].settings, pool=1)
    for name in ("vae", "image_encoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    encoded: list[int] = []

    def encode(pool: tiny_unet.Pool, chosen: tiny_unet.UNetSettings, *_: object) -> dict[str, torch.Tensor]:
        encoded.append(chosen.loop.seed)
        return {"told": torch.zeros(2)}

    monkeypatch.setattr(tiny_unet.Pool, "_encode", encode)

    def made(settings: tiny_unet.UNetSettings, **options: bool) -> int:
        encoded.clear()
        assert len(tiny_unet.Pool(Context(out=tmp_path, data=tmp_path, **options), settings, False, None, None)) == 1
        return len(encoded)

    assert made(settings) == 1 and made(settings) == 0 and made(settings, resume=False) == 1
    other = dataclasses.replace(settings, loop=dataclasses.replace(settings.loop, seed=99))
    assert made(other) == 1 and made(other) == 0
    (tmp_path / "vae" / "config.json").write_text('{"other": 1}')
    assert made(other) == 1 and made(other) == 0
