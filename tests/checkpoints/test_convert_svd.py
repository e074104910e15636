"""Stability AI's single files of Stable Video Diffusion: true names and shapes, the numbers of Stability's own classes,
folders that diffusers reads, and files that are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import load_file, save_file
from stability_svd import FRAMES, GOLDEN, TINY_CONFIG, draw, single_file, tiny_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from published_weights import json_file
from reducio_fast.checkpoints import published_svd
from reducio_fast.checkpoints.convert import convert
from reducio_fast.cli.main import main
from reducio_fast.pipelines.svd.pipeline import SVDPipeline
from reducio_fast.reference.svd.config import TemporalVAEConfig, VideoUNetConfig
from reducio_fast.reference.svd.unet import VideoUNet
from reducio_fast.reference.svd.vae import TemporalVAE
from reducio_fast.system.errors import ReducioError
from tiny_svd import QUIET, same, seeded

pytestmark = pytest.mark.slow

STABILITY_EPS = {"attention_down_eps": 1e-5, "up_eps": 1e-5}  # where diffusers has 1e-6


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stability") / "svd_xt.safetensors"
    save_file(tiny_file("svd_tiny"), path)
    return path


@pytest.fixture(scope="module")
def folder(file: Path) -> Path:
    out = file.with_suffix("")
    config = json_file(file.with_suffix(".json"), TINY_CONFIG)
    assert main(["convert", str(file), "--out", str(out), "--config", config, "--json"]) == 0
    return out


def test_the_whole_list_of_names_at_published_size():
    """Every tensor of svd_xt.safetensors maps to one of diffusers' classes, or is known to have no counterpart."""
    stated = single_file("svd_xt")
    parts, left_out = published_svd.split({n: torch.empty(s, device="meta") for n, s in stated.items()})
    assert not parts[""] and len(stated) == len(left_out) + 1428 + 374 + 392
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20))
        vae = AutoencoderKLTemporalDecoder(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            layers_per_block=2,
        )
        settings = published_svd.image_encoder_config(parts["image_encoder"])
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings))
    assert shapes(published_svd.unet_names(parts["unet"])) == shapes(unet.state_dict())
    assert shapes(published_svd.vae_names(parts["vae"])) == shapes(vae.state_dict())
    assert shapes(published_svd.image_encoder_names(parts["image_encoder"])) == shapes(encoder.state_dict())
    assert VideoUNetConfig.from_dict(published_svd.unet_config(parts["unet"])) == VideoUNetConfig()
    assert TemporalVAEConfig.from_dict(published_svd.vae_config(parts["vae"])) == TemporalVAEConfig()
    published = open_clip.get_model_config("ViT-H-14")["vision_cfg"]
    assert settings["num_attention_heads"] == published["width"] // published["head_width"]


def test_the_numbers_of_stabilitys_classes(folder: Path):
    """Our U-Net, encoder and decoder give the outputs of Stability's; a check of names alone could miss a swap."""
    golden = load_file(GOLDEN / "svd_stability.safetensors")
    config = json.loads((folder / "unet" / "config.json").read_text())
    unet = VideoUNet(VideoUNetConfig.from_dict(config | STABILITY_EPS))
    unet.load_state_dict(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    vae = TemporalVAE(TemporalVAEConfig.from_dict(json.loads((folder / "vae" / "config.json").read_text())))
    state = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    vae.load_state_dict(state)
    ids = torch.tensor([[6.0, 127.0, 0.02], [6.0, 90.0, 0.1]])
    sample, context = draw("sample", 2 * FRAMES, 8, 8, 8), draw("context", 2, 1, 24)
    with torch.no_grad():
        v = unet(sample.unflatten(0, (2, FRAMES)), torch.tensor(0.7), context, ids).flatten(0, 1)
        moments = vae.encoder(draw("image", 1, 3, 12, 16))
        frames = vae.decode(draw("latents", FRAMES, 4, 6, 8)[None])[0]
    for name, ours in (("unet", v), ("encoder", moments), ("decoder", frames)):
        torch.testing.assert_close(ours, golden[name], rtol=1e-5, atol=1e-5, msg=name)


def test_the_image_encoder_is_open_clips(folder: Path):
    tower = VisionTransformer(image_size=224, patch_size=32, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=24)
    prefix = "conditioner.embedders.0.open_clip.model.visual."
    tower.load_state_dict({n.removeprefix(prefix): t for n, t in tiny_file("svd_tiny").items() if prefix in n})
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    images = draw("images", 2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).image_embeds, tower(images), rtol=1e-4, atol=1e-5)


def test_the_folder_runs_here_and_in_diffusers(folder: Path):
    """Whole clips of both pipelines agree, and the folder has the expected number of tensors."""
    ours = SVDPipeline.from_pretrained(folder, device="cpu", dtype="float32", backend="reference")
    theirs = StableVideoDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    picture = (draw("picture", 40, 64, 3).sigmoid().numpy() * 255).astype(np.uint8)
    assert ours.unet.config.num_frames == 25
    call = {"height": 16, "width": 32, "num_frames": 2, "num_inference_steps": 2}
    expected = theirs(Image.fromarray(picture), **call, generator=seeded(), output_type="np").frames[0]
    same(ours(picture, **call, **QUIET, generator=seeded()).frames, expected)
    written = sum(len(load_file(next((folder / n).glob("*.safetensors")))) for n in ("unet", "vae", "image_encoder"))
    assert written == sum(map(len, published_svd.split(tiny_file("svd_tiny"))[0].values())) + 2 * 2 * 2


def test_half_precision_and_frames_by_preset(file: Path, tmp_path: Path):
    result = convert(file, tmp_path / "half", preset="svd", config=TINY_CONFIG, dtype=torch.float16)
    assert result["left_out"] and all(
        "first_stage_model.encoder" in n or "conditioner" in n for n in result["left_out"]
    )
    tensors = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "unet" / "config.json").read_text())["num_frames"] == 14


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ["--into", "there"], "is a whole model and makes a folder of its own; give out"),
        ({}, ["--out", "there", "--preset", "reducio-ft2"], "preset: must be one of svd, svd-xt for svd"),
        (
            {"model.diffusion_model.out.2.bias": None},
            ["--out", "there"],
            "unet: weights do not .* missing: conv_out",
        ),
        ({"model.diffusion_model.more.weight": (2,)}, ["--out", "there"], "1 unexpected: more.weight"),
        (
            {"first_stage_model.decoder.conv_out.bias": (4,)},
            ["--out", "there"],
            r"conv_out.bias \[4\] instead",
        ),
        ({"cond_stage_model.weight": (2,)}, ["--out", "there"], "1 unexpected: cond_stage_model.weight"),
        ({"conditioner.embedders.0.open_clip.model.visual.proj": None}, ["--out", "there"], "has no image_encoder"),
    ],
    ids=["into", "preset", "missing", "unexpected", "misshapen", "unknown", "no-encoder"],
)
def test_files_that_do_not_fit(
    change: dict, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    tensors = tiny_file("svd_tiny")
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "svd.safetensors")
    config = json_file(tmp_path / "config.json", TINY_CONFIG)
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "svd.safetensors", "--config", config, *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 7}, "hidden size .32. is not a multiple"),
        ({"num_attention_heads": 0}, "zero"),
        ({"hidden_act": "none-of-these"}, "unknown 'none-of-these'"),
        ([1], "must be an object of fields, is .1."),
    ],
    ids=["heads", "no-heads", "activation", "list"],
)
def test_a_configuration_that_the_image_encoder_refuses(
    fields: object, message: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = json_file(tmp_path / "config.json", TINY_CONFIG | {"image_encoder": fields})
    assert main(["convert", str(file), "--config", config, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(f"config: image_encoder:? .*{message}", error) and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_model_is_not_replaced(file: Path, tmp_path: Path):
    json_file(tmp_path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    with pytest.raises(ReducioError, match="holds a StableDiffusionPipeline, which is not replaced by another class"):
        convert(file, tmp_path, config=TINY_CONFIG)
    json_file(tmp_path / "model_index.json", {"_class_name": "StableVideoDiffusionPipeline"})
    inside = Path(shutil.copy(file, tmp_path))
    with pytest.raises(ReducioError, match="holds the source svd_xt.safetensors, which it would replace"):
        convert(inside, tmp_path, config=TINY_CONFIG)


def test_a_name_that_does_not_say_the_frames(file: Path, tmp_path: Path):
    renamed = tmp_path / "model.safetensors"
    renamed.symlink_to(file)
    with pytest.raises(ReducioError, match=r"does not say its frames in its name; give a preset, one of svd \(14"):
        convert(renamed, tmp_path / "out", config=TINY_CONFIG)
