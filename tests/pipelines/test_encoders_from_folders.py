"""Encoders that are loaded from folders, against open_clip and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from safetensors.torch import load_file, save_file

from reducio_fast.checkpoints.networks import assign
from reducio_fast.pipelines.reducio.encoders import SemanticEncoder, TextEncoder
from reducio_fast.system.errors import ReducioError


def tower_config(**vision) -> dict:
    vision_cfg = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16} | vision
    statistics = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
    return {"model_cfg": {"embed_dim": 24, "vision_cfg": vision_cfg}, "preprocess_cfg": statistics}


def test_semantic_encoder_against_open_clip(tmp_path: Path):
    """Our tokens are what open_clip's whole CLIP model computes inside: normalised by ln_post, class token dropped."""
    from open_clip.model import CLIP

    config = tower_config()
    text = {"context_length": 4, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
    clip = CLIP(**config["model_cfg"], text_cfg=text).eval()
    encoder = SemanticEncoder(config)
    visual = {f"visual.{n}": t for n, t in clip.visual.state_dict().items()}
    assign(encoder, visual, tmp_path)
    encoder.save_pretrained(tmp_path)
    encoder = SemanticEncoder.from_pretrained(tmp_path, torch.float32)
    assert load_file(tmp_path / "open_clip_model.safetensors").keys() == visual.keys()

    image = torch.rand(2, 3, 64, 96) * 2 - 1
    resized = _resize_with_antialiasing(image, (32, 32))
    mean, std = (torch.tensor(config["preprocess_cfg"][k]).view(3, 1, 1) for k in ("mean", "std"))
    caught = []
    clip.visual.ln_post.register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        clip.encode_image((resized / 2 + 0.5 - mean) / std)
    tokens = encoder(image)
    assert tokens.shape == (2, 16, 32)
    torch.testing.assert_close(tokens, caught[0][:, 1:], rtol=1e-5, atol=1e-5)
    half = SemanticEncoder.from_pretrained(tmp_path, torch.bfloat16)(image)
    assert (
        half.dtype == torch.bfloat16
        and torch.nn.functional.cosine_similarity(half.float(), tokens, dim=-1).min() > 0.99
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attentional_pool": True}, "needs a VisionTransformer that normalises all of its tokens"),
        ({"final_ln_after_pool": True}, "needs a VisionTransformer that normalises all of its tokens"),
        ({"layers": (1, 1, 1, 1), "width": 32, "head_width": 32}, "needs a VisionTransformer"),
        ({"colour": 1}, "colour"),
    ],
)
def test_other_towers_are_refused(change: dict, message: str):
    with pytest.raises(ReducioError, match=f"open_clip configuration: .*{message}"):
        SemanticEncoder(tower_config(**change))


def test_incomplete_tower_configuration():
    with pytest.raises(ReducioError, match="open_clip configuration: 'preprocess_cfg' is missing"):
        SemanticEncoder({"model_cfg": tower_config()["model_cfg"]})


@pytest.mark.parametrize(
    "values",
    [
        {"model_cfg": None},
        tower_config(patch_size=0),
        tower_config() | {"preprocess_cfg": {"mean": None, "std": [1, 1, 1]}},
        tower_config() | {"preprocess_cfg": {"mean": 0.5, "std": [1, 1, 1]}},
        tower_config() | {"preprocess_cfg": {"mean": [0.5, 0.5], "std": [1, 1, 1]}},
    ],
)
def test_wrong_values_of_a_tower_are_one_line(values: dict, tmp_path: Path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    save_file({"a": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ReducioError, match="^open_clip configuration: .+$"):
        SemanticEncoder.from_pretrained(tmp_path, width=32)


def test_text_encoder_pads_cuts_and_warns(caplog: pytest.LogCaptureFixture):
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(vocab_size=384, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)).eval()
    encode = TextEncoder(model, ByT5Tokenizer(), 12)
    text, mask = encode(["red", "a red circle moving right"])
    assert text.shape == (2, 12, 16) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [4, 12], "three bytes and the end mark; cut at twelve"
    assert "prompt has 26 tokens, the model reads the first 12: 'a red circle moving right'" in caplog.text
    with torch.no_grad():
        ids = ByT5Tokenizer()("red", return_tensors="pt").input_ids
        torch.testing.assert_close(text[:1, :4], model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)
