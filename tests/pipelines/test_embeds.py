"""Conditions passed in instead of computed: the same bytes, no encoder needed, and networks that can be unloaded."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reducio_fast import ReducioPipeline
from reducio_fast.system.errors import ReducioError

PROMPT = "a red circle moving right"
FAST = {"num_inference_steps": 2, "progress": False}
ENCODERS = ("text_encoder", "tokenizer", "image_encoder", "content_encoder", "text_to_image")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def bare(folder: Path) -> ReducioPipeline:
    """The transformer and the VAE alone, as in a process that receives its conditions from another one."""
    return ReducioPipeline.from_pretrained(folder, device="cpu", dtype="float32", **dict.fromkeys(ENCODERS))


def encode(pipe: ReducioPipeline, prompt: Any, image: Any, negative: Any = None) -> dict[str, torch.Tensor]:
    text, mask, negative_text, negative_mask = pipe.encode_prompt(prompt, negative)
    semantic, latents = pipe.encode_image(image)
    embeds = {
        "prompt_embeds": text,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative_text,
        "negative_prompt_attention_mask": negative_mask,
        "semantic_embeds": semantic,
        "content_latents": latents,
    }
    return {name: tensor for name, tensor in embeds.items() if tensor is not None}


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [(PROMPT, None), (PROMPT, "noise"), ([PROMPT, "a blue star"], None), ([PROMPT, "a blue star"], ["", "noise"])],
    ids=["one", "negative", "list", "one negative of two"],
)
@pytest.mark.slow
def test_given_makes_the_bytes_of_computed(
    pipe: ReducioPipeline, bare: ReducioPipeline, image: np.ndarray, tmp_path: Path, prompt: Any, negative: Any
):
    computed = pipe(prompt, image, negative, seed=3, **FAST)
    many = isinstance(prompt, list)
    save_file(encode(pipe, prompt, [image] * len(prompt) if many else image, negative), tmp_path / "e.safetensors")
    stored = load_file(tmp_path / "e.safetensors")
    if not many:
        stored = {name: tensor[0] for name, tensor in stored.items()}  # without the clip axis it is a single clip
    for own in (pipe, bare):
        from_embeds = own(image=image, seed=3, **stored, **FAST)
        assert np.array_equal(from_embeds.frames, computed.frames) and from_embeds.seeds == computed.seeds
    text_only = {name: tensor for name, tensor in stored.items() if "prompt" in name}
    assert np.array_equal(pipe(image=image, seed=3, **text_only, **FAST).frames, computed.frames)
    image_only = {name: tensor for name, tensor in stored.items() if "prompt" not in name}
    assert np.array_equal(pipe(prompt, image, negative, seed=3, **image_only, **FAST).frames, computed.frames)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(min_size=1, max_size=60).filter(str.strip), seed=st.integers(0, 2**32 - 1), alone=st.booleans())
@pytest.mark.slow
def test_for_any_prompt(pipe: ReducioPipeline, bare: ReducioPipeline, prompt: str, seed: int, alone: bool):
    picture = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    words = {"height": 32, "width": 32, "seed": seed, "num_inference_steps": 1, "progress": False}
    computed = pipe(prompt, picture, output_type="latent", **words).frames
    text, mask, *_ = pipe.encode_prompt(prompt if alone else ["another text, longer than this one", prompt])
    semantic, latents = pipe.encode_image(picture, 32, 32)
    given = bare(
        prompt_embeds=text[-1],
        prompt_attention_mask=mask[-1],
        semantic_embeds=semantic,
        content_latents=latents,
        output_type="latent",
        **words,
    )
    assert torch.equal(given.frames, computed) and given.content is None, "nothing read the content frame"


def test_each_condition_reaches_the_model(pipe: ReducioPipeline, image: np.ndarray):
    embeds = encode(pipe, PROMPT, image, "noise")
    latent = pipe(image=image, output_type="latent", **embeds, **FAST).frames
    for name in embeds:
        if "mask" in name:
            changed = embeds[name].clone()
            changed[:, 0] = False
        else:
            changed = embeds[name] + 1
        other = pipe(image=image, output_type="latent", **(embeds | {name: changed}), **FAST).frames
        assert not torch.equal(other, latent), name


def test_one_clip_or_a_list_of_them(pipe: ReducioPipeline, image: np.ndarray):
    embeds = encode(pipe, PROMPT, image)
    listed = pipe(image=image, output_type="latent", **embeds, **FAST)
    assert listed.is_list and listed.frames.shape == (1, 16, 4, 2, 2)
    named = pipe(PROMPT, image, output_type="latent", **embeds, **FAST)
    assert not named.is_list and torch.equal(named.frames, listed.frames[0])
    twice = pipe(image=image, output_type="latent", num_videos_per_prompt=2, **embeds, **FAST)
    assert twice.frames.shape == (2, 16, 4, 2, 2) and torch.equal(twice.frames[0], named.frames)


def test_a_prompt_beside_its_embeds_only_draws_the_content_frame(pipe: ReducioPipeline, clip):
    text, mask, *_ = pipe.encode_prompt("a blue star")
    out = pipe(PROMPT, prompt_embeds=text, prompt_attention_mask=mask, seed=3, **FAST)
    assert np.array_equal(out.content, clip.content) and not np.array_equal(out.frames, clip.frames)
    assert np.array_equal(out.frames, pipe("a blue star", out.content, seed=3, **FAST).frames)


MASK = torch.ones(40, dtype=torch.bool)
TEXT = {"prompt_embeds": torch.zeros(40, 32), "prompt_attention_mask": MASK}
BAD = {
    "length": ({"prompt_embeds": torch.zeros(39, 32)}, r"prompt_embeds: has shape \[1, 39, 32\], .* \[1, 40, 32\]"),
    "width": ({"prompt_embeds": torch.zeros(1, 40, 16)}, r"prompt_embeds: has shape \[1, 40, 16\], .* \[1, 40, 32\]"),
    "no mask": (
        {"prompt_attention_mask": None},
        "prompt_attention_mask: must be the tensor that belongs to prompt_emb",
    ),
    "mask": ({"prompt_attention_mask": MASK[1:]}, r"prompt_attention_mask: has shape \[1, 39\], .* \[1, 40\]"),
    "NaN": ({"prompt_embeds": TEXT["prompt_embeds"] + torch.nan}, "prompt_embeds: holds values that are not finite"),
    "numbers": ({"prompt_embeds": torch.zeros(40, 32).long()}, "prompt_embeds: must be a floating-point tensor"),
    "list": ({"prompt": "a", "prompt_embeds": [1.0]}, "prompt_embeds: must be a floating-point tensor, is list"),
    "count": ({"prompt": ["a", "b"]}, r"prompt_embeds: has shape \[40, 32\], this call needs \[2, 40, 32\]"),
    "negative": (
        {"negative_prompt_embeds": torch.zeros(1, 40, 8), "negative_prompt_attention_mask": MASK},
        r"negative_prompt_embeds: has shape \[1, 40, 8\]",
    ),
    "mask alone": ({"negative_prompt_attention_mask": MASK}, "negative_prompt_attention_mask: given without neg"),
    "tokens": ({"semantic_embeds": torch.zeros(4, 16)}, r"semantic_embeds: has shape \[1, 4, 16\], .* \[1, any, 32\]"),
    "latent": ({"content_latents": torch.zeros(4, 8, 9)}, r"content_latents: .* \[1, 4, 8, 9\], .* \[1, 4, 8, 8\]"),
    "words": ({"content_kwargs": {"cfg": 3}}, "content_kwargs: PixArtAlphaPipeline has no word 'cfg'; known are num_"),
    "our word": ({"content_kwargs": {"prompt": "a"}}, "content_kwargs: 'prompt' is set by the call itself"),
    "no dict": (
        {"content_kwargs": 30},
        "content_kwargs: must be a dict of words for the text-to-image pipeline, is 30",
    ),
    "nothing to draw from": ({"image": None}, "image: None given, and without a prompt there is nothing to draw one"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_embeds(pipe: ReducioPipeline, image: np.ndarray, words: dict, message: str):
    with pytest.raises(ReducioError, match=message) as caught:
        pipe(**({"image": image} | TEXT | FAST | words))
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named_before_any_work(bare: ReducioPipeline, image: np.ndarray, monkeypatch):
    monkeypatch.setattr(bare, "run", lambda *_: pytest.fail("work began"))
    with pytest.raises(ReducioError, match=r"no text_encoder is loaded; give the embeds .* text_encoder=FOLDER_OR_HUB"):
        bare(PROMPT, image, **FAST)
    with pytest.raises(ReducioError, match="no text_encoder is loaded"):
        bare(image=image, negative_prompt="noise", **TEXT, **FAST)
    with pytest.raises(ReducioError, match="no text_encoder is loaded"):
        bare.encode_prompt(PROMPT)
    with pytest.raises(ReducioError, match="image: None given, and this model has no text-to-image stage"):
        bare(PROMPT, **TEXT, **FAST)


@pytest.mark.slow
def test_unload(folder: Path, image: np.ndarray, tmp_path: Path):
    pipe = ReducioPipeline.from_pretrained(folder, device="cpu")
    computed = pipe(PROMPT, image, "noise", **FAST)
    embeds = encode(pipe, PROMPT, image, "noise")
    with pytest.raises(ReducioError, match="unload: text_to_image uses the text_encoder too; unload both or neither"):
        pipe.unload("text_encoder")
    with pytest.raises(ReducioError, match="unload: must be one of text_encoder, image_encoder, .*, is 'vae'"):
        pipe.unload("vae")
    tower = pipe.image_encoder
    seen = [weakref.ref(x) for x in (pipe.text_encoder, pipe.content_encoder, pipe.text_to_image)]
    pipe.unload("text_encoder", "image_encoder", "content_encoder", "text_to_image")
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3, "something still holds a network that was let go"
    assert np.array_equal(pipe(PROMPT, image, **embeds, **FAST).frames, computed.frames)
    # Without the semantic embeds the model would silently make a different clip.
    with pytest.raises(ReducioError, match="semantic_embeds: None given, and the image_encoder was unloaded"):
        pipe(PROMPT, image, **(embeds | {"semantic_embeds": None}), **FAST)
    with pytest.raises(ReducioError, match="save_directory: content_encoder, image_encoder, .* unloaded"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.image_encoder = tower
    assert "image_encoder" not in pipe.unloaded
    assert np.array_equal(pipe(PROMPT, image, **(embeds | {"semantic_embeds": None}), **FAST).frames, computed.frames)


@pytest.mark.slow
def test_caption_cleaning_is_a_setting_of_the_model(folder: Path, image: np.ndarray, tmp_path: Path):
    plain = ReducioPipeline.from_pretrained(folder, device="cpu")
    clean = ReducioPipeline.from_pretrained(folder, device="cpu", clean_caption=True)
    shouted = "A RED circle moving <b>right</b> http://example.com/a"
    assert not plain.clean_caption
    for own, same in ((plain, False), (clean, True)):
        assert torch.equal(own.encode_prompt(shouted)[0], own.encode_prompt(PROMPT)[0]) is same
    with pytest.raises(ReducioError, match="prompt: nothing is left of '中文' after caption cleaning"):
        clean("中文", image, **FAST)
    clean.save_pretrained(tmp_path / "clean")
    assert json.loads((tmp_path / "clean/model_index.json").read_text())["clean_caption"] is True
    assert ReducioPipeline.from_pretrained(tmp_path / "clean", device="cpu").clean_caption


def test_the_scale_of_the_content_latent_is_a_setting_of_the_model(folder: Path, pipe: ReducioPipeline, image):
    scaled = ReducioPipeline.from_pretrained(folder, device="cpu", content_scaling_factor=0.18215)
    bare = pipe.encode_image(image)[1]
    posterior = pipe.content_encoder.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
    assert torch.equal(bare, posterior.mode()), "the release stores the latent without the autoencoder's own factor"
    assert torch.equal(scaled.encode_image(image)[1], bare * 0.18215)
