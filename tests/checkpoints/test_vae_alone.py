"""What works with the published autoencoder alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import reducio_fast
from reducio_fast.checkpoints import convert, saved_latents
from reducio_fast.checkpoints.networks import load_model
from reducio_fast.checkpoints.strict_files import load_tensors, save_tensors
from reducio_fast.cli.main import main
from reducio_fast.evaluation.reconstruction import reconstruct
from reducio_fast.media.image_files import cover_crop
from reducio_fast.media.video_files import read_video, write_video
from reducio_fast.reference import ReducioVAE, VAEConfig
from reducio_fast.system.errors import ReducioError
from tiny_networks import VAE, lively

pytestmark = pytest.mark.slow

FOREIGN = {"model": {"target": "ldm.models.reducio_vae.ReducioVAE", "params": {"f_s": 32}}}  # not a config of ours


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Small(VAEConfig):
    """The release's configuration at a width for tests."""

    base_channels: int = VAE["base_channels"]
    channel_multipliers: tuple[int, ...] = VAE["channel_multipliers"]
    content_base_channels: int = VAE["content_base_channels"]
    content_channel_multipliers: tuple[int, ...] = VAE["content_channel_multipliers"]
    norm_groups: int = VAE["norm_groups"]
    num_heads: int = VAE["num_heads"]
    fusion_head_dim: int = VAE["fusion_head_dim"]
    num_res_blocks: int = VAE["num_res_blocks"]


@pytest.fixture(scope="module")
def network() -> ReducioVAE:
    return lively(ReducioVAE(VAEConfig(**VAE)))


@pytest.fixture
def release(tmp_path: Path, network: ReducioVAE, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A downloaded repository: a pickle with the losses of training, beside the configuration of another program."""
    monkeypatch.setattr(convert, "VAEConfig", Small)
    folder = tmp_path / "Reducio-VAE"
    folder.mkdir()
    state = {**network.state_dict(), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": state, "global_step": 3}, folder / "reducio-ft4-fs32-attn23.ckpt")
    (folder / "config.json").write_text(json.dumps(FOREIGN))
    return folder


def equal(vae: torch.nn.Module, network: ReducioVAE) -> bool:
    mine, theirs = vae.state_dict(), network.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_python_takes_it_from_every_place(release: Path, network: ReducioVAE, tmp_path: Path) -> None:
    file = next(release.glob("*.ckpt"))
    convert.convert(release, into=tmp_path / "model")
    convert.convert(file, out=tmp_path / "component")
    for source in (file, release, tmp_path / "model", tmp_path / "model" / "vae", tmp_path / "component"):
        assert equal(reducio_fast.ReducioVAE.from_pretrained(source), network), source
    half = reducio_fast.ReducioVAE.from_pretrained(file, torch_dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_convert_then_reconstruct_needs_no_size(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8), "in.gif", 16)
    assert main(["convert", str(release), "--into", "model"]) == 0
    for model in ("model", str(next(release.glob("*.ckpt")))):
        assert main(["reconstruct", "in.gif", "--model", model, "--out", "both.gif"]) == 0, capsys.readouterr().err
        assert read_video("both.gif")[0].shape == (16, 256, 512, 3)


def test_dtypes_and_devices_are_named_as_for_a_model(bundle: Path) -> None:
    load = reducio_fast.ReducioVAE.from_pretrained
    half = load(bundle, torch_dtype="float16", device=None)
    assert next(half.parameters()).dtype == torch.float16
    assert next(half.parameters()).is_cuda == torch.cuda.is_available()
    with pytest.raises(ReducioError, match="dtype: must be one of float32, float16, bfloat16, is 'half'"):
        load(bundle, torch_dtype="half")
    with pytest.raises(ReducioError, match="device: 'gpu' cannot be used here"):
        load(bundle, device="gpu")
    for name in ("ReducioDiT", "SemanticEncoder"):
        with pytest.raises(ReducioError, match="dtype: must be one of .* is 'half'"):
            getattr(reducio_fast, name).from_pretrained(bundle, torch_dtype="half")


def test_what_is_no_autoencoder_is_one_line(release: Path, tmp_path: Path) -> None:
    load = reducio_fast.ReducioVAE.from_pretrained
    shutil.copy(next(release.glob("*.ckpt")), release / "reducio-ft2-fs32-attn23.ckpt")
    with pytest.raises(ReducioError, match="holds reducio-ft2-fs32-attn23.ckpt, reducio-ft4-fs32-attn23.ckpt; name"):
        load(release)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReducioError, match="no model_index.json and no weights"):
        load(tmp_path / "empty")
    line = "hf download microsoft/Reducio-VAE reducio-ft4-fs32-attn23.ckpt --local-dir DIR`, then pass DIR/reducio-ft4"
    with pytest.raises(ReducioError, match=line):
        load("microsoft/Reducio-VAE")


def test_add_and_linear_fusion_have_the_names_of_the_release(bundle: Path, tmp_path: Path) -> None:
    names = {"add": {"conv_context", "temp_embed", "conv", "norm"}, "linear": {"conv_context", "conv", "norm"}}
    for fusion, expected in names.items():
        vae = ReducioVAE(VAEConfig(**VAE, fusion=fusion))
        parts = {
            name.split(".fuse.")[1].split(".")[1]
            for name in vae.state_dict()
            if name.startswith("decoder.up.") and ".fuse." in name
        }
        assert parts == expected
    # Names that models were saved under earlier are mapped to the present ones.
    shutil.copytree(bundle / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    stored = load_tensors(file)
    earlier = {name.replace("conv_context", "content_conv"): tensor for name, tensor in stored.items()}
    assert earlier.keys() != stored.keys()
    save_tensors(earlier, file)
    vae = load_model(ReducioVAE, VAEConfig, tmp_path / "vae", torch.float16)
    assert all(torch.equal(stored[name], vae.state_dict()[name]) for name in stored if "conv_context" in name)


def clip_file(folder: Path, frames: int = 40) -> Path:
    """A clip of 20 frames per second, close enough to the model's rate that every frame is read."""
    rows = np.linspace(0, 255, 80)[None, :, None, None]
    clip = np.broadcast_to((rows + np.arange(frames)[:, None, None, None] * 5) % 256, (frames, 80, 96, 3))
    return write_video(clip.astype(np.uint8), folder / "clip.mp4", 20)


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_encode_then_decode_needs_no_model_but_the_vae(
    release: Path, tmp_path: Path, backend: str, network: ReducioVAE
):
    """From the release's file alone, the latents equal the reference's and the clip equals that of `reconstruct`."""
    clip, weights = clip_file(tmp_path), str(next(release.glob("*.ckpt")))
    size = ["--height", "64", "--width", "96"]
    latents, out = tmp_path / "latents.safetensors", tmp_path / "frames"
    where = ["--model", weights, "--backend", backend, "--dtype", "float32"]
    assert main(["encode", str(clip), *where, *size, "--clips", "2", "-o", str(latents)]) == 0
    kept = saved_latents.load(latents)
    assert kept.latents.shape == (2, 16, 4, 2, 3) and kept.content.shape == (2, 64, 96, 3) and kept.seeds == []
    frames = read_video(clip)[0][:32]
    cropped = cover_crop(frames, 64, 96, Image.Resampling.BILINEAR)
    video = torch.from_numpy(cropped[:16]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        own = network.normalize_latent(network.encode(video).mode())
    torch.testing.assert_close(kept.latents[:1], own, rtol=0, atol=2e-5 * own.abs().max().item())
    assert np.array_equal(kept.content[1], cropped[16 + network.config.content_frame])

    assert main(["decode", str(latents), *where, "-o", str(out)]) == 0
    restored = reconstruct(network, cropped[:16])
    assert np.abs(read_video(f"{out}-0")[0].astype(int) - restored.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip.mp4", "-o", "latents.pt"], "kept in a .safetensors file"),
        (["clip.mp4", "-o", "no/such/latents.safetensors"], "no/such does not exist"),
        (["clip.mp4", "-o", "here.safetensors"], "kept in a .safetensors file"),
        (["clip.mp4", "-o", "l.safetensors", "--clips", "4"], "has 40 frames; 4 clips take 64"),
        (["clip.mp4", "-o", "l.safetensors", "--start", "30"], "has 10 frames from number 30 on"),
        (["none.mp4", "-o", "l.safetensors"], "none.mp4"),
    ],
)
def test_what_encode_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    clip_file(tmp_path)
    (tmp_path / "here.safetensors").mkdir()
    assert main(["encode", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("l*.safetensors"))


@pytest.mark.parametrize(
    ("name", "value"), [("fps", "16"), ("fps", None), ("fps", 0), ("fps", [16]), ("fps", -5), ("sample_width", "128")]
)
def test_settings_of_the_model_are_checked(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vae").symlink_to(bundle / "vae")
    index = json.loads((bundle / "model_index.json").read_text())
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index | {name: value}))
    where = ["--model", str(tmp_path / "model"), "--device", "cpu", "--out"]
    clip = str(clip_file(tmp_path))
    for command, out in (("reconstruct", "out.gif"), ("encode", "out.safetensors")):
        assert main([command, clip, *where, str(tmp_path / out)]) == 2
        line = capsys.readouterr().err
        assert f"{name}: must be " in line and line.count("\n") == 1, line


def test_latents_of_another_model_are_refused(tmp_path: Path, release: Path, capsys: pytest.CaptureFixture):
    kept = saved_latents.Latents(torch.zeros(1, 3, 4, 2, 3), np.zeros((1, 64, 96, 3), np.uint8), 16.0, [])
    saved_latents.save(tmp_path / "foreign.safetensors", kept)
    where = ["--model", str(next(release.glob("*.ckpt"))), "-o", str(tmp_path / "x.mp4")]
    assert main(["decode", str(tmp_path / "foreign.safetensors"), *where]) == 2
    assert "latents" in capsys.readouterr().err


def test_the_twin_alone_in_python(release: Path, network: ReducioVAE):
    weights = next(release.glob("*.ckpt"))
    fast = reducio_fast.ReducioVAE.from_pretrained(weights, backend="fast")
    latent, image = torch.randn(1, 16, 4, 2, 2), torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        theirs = network.decode(latent, network.encode_content(image))
        ours = fast.decode(latent, fast.encode_content(image))
    assert type(fast).__name__ == "FastReducioVAE"
    assert (ours - theirs).norm() / theirs.norm() < 2e-5
