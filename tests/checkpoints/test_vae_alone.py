"""The path of someone who has the published autoencoder and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import reducio_fast
from reducio_fast.checkpoints import convert
from reducio_fast.checkpoints.strict_files import load_tensors
from reducio_fast.cli.main import main
from reducio_fast.media.video_files import read_video, write_video
from reducio_fast.reference import ReducioVAE, VAEConfig
from reducio_fast.system.errors import ReducioError
from tiny_networks import VAE, lively

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


def test_add_and_linear_fusion_have_the_names_of_the_release(bundle: Path) -> None:
    names = {"add": {"conv_context", "temp_embed", "conv", "norm"}, "linear": {"conv_context", "conv", "norm"}}
    for fusion, expected in names.items():
        vae = ReducioVAE(VAEConfig(**VAE, fusion=fusion))
        parts = {
            name.split(".fuse.")[1].split(".")[1]
            for name in vae.state_dict()
            if name.startswith("decoder.up.") and ".fuse." in name
        }
        assert parts == expected
    # The embedded model was written before; its names are read as they are now.
    stored = load_tensors(bundle / "vae" / "diffusion_pytorch_model.safetensors")
    vae = reducio_fast.ReducioVAE.from_pretrained(bundle)
    earlier = [name for name in stored if ".content_conv." in name]
    assert earlier and all(
        torch.equal(stored[name], vae.state_dict()[name.replace("content_conv", "conv_context")]) for name in earlier
    )
