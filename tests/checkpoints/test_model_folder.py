"""A model folder that grows from published parts until it loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from published_weights import NARROW_DIT, NARROW_SD, NARROW_VAE, json_file, pixart, randomized
from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints.convert import convert
from reducio_fast.cli.main import main
from reducio_fast.reference import DiTConfig, ReducioVAE, VAEConfig
from reducio_fast.system.errors import ReducioError


@pytest.mark.slow
def test_a_model_folder_grows_until_it_loads(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import shutil

    text_width = json.loads((bundle / "text_encoder" / "config.json").read_text())["d_model"]
    dit_kwargs = NARROW_DIT | {"caption_channels": text_width}
    model = tmp_path / "model"
    torch.save({"state_dict": randomized(ReducioVAE(VAEConfig(**NARROW_VAE))).state_dict()}, tmp_path / "vae.ckpt")
    randomized(pixart(DiTConfig(**dit_kwargs), sample_size=32)).save_pretrained(tmp_path / "pixart" / "transformer")
    json_file(tmp_path / "pixart" / "model_index.json", {"transformer": [None, None], "vae": [None, None]})
    four_levels = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [4] * 4,
    }
    randomized(AutoencoderKL(**NARROW_SD | four_levels)).save_pretrained(tmp_path / "sd")
    without = "text_encoder, tokenizer, image_encoder, content_encoder, preview_decoder, text_to_image"
    for source, config, expected in (
        ("vae.ckpt", NARROW_VAE, f"  the model can do without {without}\n  the model still needs transformer\n"),
        ("pixart", dit_kwargs, f"  the model can do without {without}\nwrote"),
        ("sd", {}, f"  the model can do without {without.replace('content_encoder, ', '')}\nwrote"),
    ):
        options = ["--into", str(model), "--config", json_file(tmp_path / "c.json", config)]
        options += ["--null-text", "fresh"] if source == "pixart" else []
        assert main(["convert", str(tmp_path / source), *options]) == 0
        assert expected in capsys.readouterr().out
    index = json.loads((model / "model_index.json").read_text())
    assert (index["sample_height"], index["sample_width"], index["fps"]) == (256, 256, 16)
    assert index["clean_caption"] is True, "PixArt's captions are cleaned"
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(bundle / name, model / name)
        index[name] = json.loads((bundle / "model_index.json").read_text())[name]
    json_file(model / "model_index.json", index)
    pipe = ReducioPipeline.from_pretrained(model, device="cpu", backend="reference")
    image = torch.rand(64, 64, 3).numpy()
    out = pipe("a circle", image, height=64, width=64, num_inference_steps=1, output_type="latent", progress=False)
    assert out.frames.shape == (16, 4, 2, 2) and out.frames.isfinite().all()

    before = {p: p.read_bytes() for p in model.rglob("*") if p.is_file()}
    torch.save({"state_dict": {"encoder_3d.odd": torch.zeros(1)}}, tmp_path / "vae.ckpt")
    with pytest.raises(ReducioError, match="1 unexpected: encoder_3d.odd"):
        convert(tmp_path / "vae.ckpt", into=model)
    assert {p: p.read_bytes() for p in model.rglob("*") if p.is_file()} == before, "a failure leaves the model alone"
    with pytest.raises(ReducioError, match="holds a ReducioVAE, which is not replaced by another class .AutoencoderKL"):
        convert(tmp_path / "sd", model / "vae")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(ReducioVAE(VAEConfig(**NARROW_VAE)).state_dict(), tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"model_type": "t5"}, "holds a config.json without _class_name, which is not replaced by another class"),
        ({"_class_name": "ReducioVAE"}, "holds the source a.ckpt, which it would replace; name another"),
        (None, "exists and is no component folder (it has no config.json)"),
    ],
    ids=["transformers", "own-source", "no-config"],
)
def test_a_folder_that_is_not_ours_to_replace(
    stated: dict | None, message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "folder"
    folder.mkdir()
    source = checkpoint
    if stated is not None:
        json_file(folder / "config.json", stated)
    if stated == {"_class_name": "ReducioVAE"}:
        source = checkpoint.rename(folder / "a.ckpt")
    (folder / "precious.safetensors").write_bytes(b"mine")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    config = json_file(tmp_path / "c.json", NARROW_VAE)
    assert main(["convert", str(source), "--out", str(folder), "--config", config]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize(
    "options",
    [
        ["--out", "~no-such-user/x"],
        ["--into", "~no-such-user/x"],
        ["--to", "official", "--out", "~no-such-user/x.ckpt"],
    ],
    ids=["out", "into", "official"],
)
def test_a_user_without_a_home_folder(options: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["convert", str(checkpoint), *options]) == 2
    error = capsys.readouterr().err
    assert f"{options[-2][2:]}: {options[-1]} cannot be expanded" in error and error.count("\n") == 1
