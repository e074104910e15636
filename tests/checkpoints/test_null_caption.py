"""The null caption is read from where a published PixArt stores it; sizes and hub ids of converted models."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from safetensors.torch import save_file

from encoder_folders import write_t5
from published_weights import NARROW_DIT, pixart, randomized
from reducio_fast.checkpoints.convert import convert
from reducio_fast.checkpoints.networks import load_model
from reducio_fast.cli.main import main
from reducio_fast.reference import DiTConfig, ReducioDiT
from reducio_fast.system.errors import ReducioError

CONFIG = NARROW_DIT | {"caption_channels": 32, "caption_length": 7}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole PixArt in diffusers' layout: transformer, text encoder and tokenizer in one folder."""
    from transformers import AutoTokenizer, T5EncoderModel

    folder = tmp_path_factory.mktemp("pixart")
    t5 = write_t5(folder / "t5")
    encoder, tokenizer = T5EncoderModel.from_pretrained(t5), AutoTokenizer.from_pretrained(t5)
    transformer = randomized(pixart(DiTConfig(**CONFIG), sample_size=32))
    parts = {"text_encoder": encoder, "tokenizer": tokenizer, "transformer": transformer}
    PixArtAlphaPipeline(**parts, vae=None, scheduler=DPMSolverMultistepScheduler()).save_pretrained(folder / "whole")
    return folder / "whole"


def converted(folder: Path) -> ReducioDiT:
    return load_model(ReducioDiT, DiTConfig, folder)


def test_it_is_the_empty_prompt_of_diffusers(pipeline: Path, tmp_path: Path):
    from transformers import AutoTokenizer, T5EncoderModel

    for name, source in (("whole", pipeline), ("part", pipeline / "transformer")):
        result = convert(source, tmp_path / name, config=CONFIG)
        assert "null_text" not in result["fresh"]
    theirs = PixArtAlphaPipeline(
        text_encoder=T5EncoderModel.from_pretrained(pipeline / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(pipeline / "tokenizer"),
        transformer=randomized(pixart(DiTConfig(**CONFIG), sample_size=32)),
        vae=None,
        scheduler=DPMSolverMultistepScheduler(),
    )
    with torch.no_grad():
        expected = theirs.encode_prompt("a", max_sequence_length=7, clean_caption=False)[2][0]
    for name in ("whole", "part"):
        torch.testing.assert_close(converted(tmp_path / name).null_text, expected, rtol=0, atol=1e-6)


def test_it_can_be_named(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    alone = tmp_path / "transformer"
    shutil.copytree(pipeline / "transformer", alone)
    own = torch.randn(7, 32)
    torch.save({"state_dict": {"y_embedder.y_embedding": own, "x": torch.zeros(1)}}, tmp_path / "PixArt.pth")
    save_file({"null_text": own}, tmp_path / "null.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    arguments = ["convert", str(alone), "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "ours")]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "holds no null caption" in message and "'fresh'" in message and message.count("\n") == 1
    assert not (tmp_path / "ours").exists()
    for source in ("PixArt.pth", "null.safetensors"):
        assert main([*arguments, "--null-text", str(tmp_path / source)]) == 0
        assert torch.equal(converted(tmp_path / "ours").null_text, own)
    assert main([*arguments, "--null-text", str(pipeline)]) == 0
    assert not torch.equal(converted(tmp_path / "ours").null_text, own)
    assert main([*arguments, "--null-text", "fresh"]) == 0
    assert "null_text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("short.safetensors", r"one of shape \[5, 32\] instead of \[7, 32\]"),
        ("without.safetensors", "holds none of y_embedder.y_embedding, null_text"),
        ("empty", "has no text_encoder/ and tokenizer/"),
        ("nowhere", "is neither a folder nor a hub id"),
        ("some/where", "run `hf download some/where"),
    ],
)
def test_what_holds_none_is_one_line(pipeline: Path, tmp_path: Path, source: str, message: str):
    save_file({"null_text": torch.zeros(5, 32)}, tmp_path / "short.safetensors")
    save_file({"x": torch.zeros(5, 32)}, tmp_path / "without.safetensors")
    (tmp_path / "empty").mkdir()
    place = source if "/" in source else tmp_path / source
    place = source if source == "nowhere" else place
    with pytest.raises(ReducioError, match=message):
        convert(pipeline / "transformer", tmp_path / "ours", config=CONFIG, null_text=place)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("size", [256, 512, 1024])
@pytest.mark.parametrize("base", [4, 16, 32])
def test_the_clip_size_is_the_checkpoints_whatever_its_coordinates(tmp_path: Path, size: int, base: int):
    """`position_base_size` only scales coordinates: a PixArt-256 with the value 16 is not a model of 512 pixels."""
    peer = randomized(pixart(DiTConfig(**CONFIG), sample_size=size // 8, use_additional_conditions=size == 1024))
    peer.save_pretrained(tmp_path / "transformer")
    changes = CONFIG | {"position_base_size": base, "size_conditioning": size == 1024, "content_groups": 1}
    convert(tmp_path / "transformer", into=tmp_path / "model", config=changes, null_text="fresh")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert (index["sample_height"], index["sample_width"]) == (size, size)
    assert dataclasses.asdict(converted(tmp_path / "model" / "transformer").config)["position_base_size"] == base


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("microsoft/Reducio-VAE", "hf download microsoft/Reducio-VAE reducio-ft4-fs32-attn23.ckpt --local-dir DIR"),
        (
            "PixArt-alpha/PixArt-alpha/PixArt-XL-2-256x256.pth",
            "hf download PixArt-alpha/PixArt-alpha PixArt-XL-2-256x2",
        ),
        ("PixArt-alpha/PixArt-XL-2-512x512", "hf download PixArt-alpha/PixArt-XL-2-512x512 --local-dir DIR"),
    ],
)
def test_a_hub_id_says_how_to_fetch_it(tmp_path: Path, source: str, line: str):
    with pytest.raises(ReducioError) as error:
        convert(source, tmp_path / "ours")
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_hub_id_in_the_cache_is_converted(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The cache has huggingface_hub's layout; only the files of the component are requested."""
    repository = tmp_path / "models--some--pixart"
    shutil.copytree(pipeline, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = convert("some/pixart", tmp_path / "ours", config=CONFIG, null_text="fresh")
    assert result["component"] == "transformer"
