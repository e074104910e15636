"""Components that are named by folder or hub id, in Python and on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from encoder_folders import FAST, LENGTH, PROMPT, randomise
from reducio_fast import ReducioPipeline
from reducio_fast.pipelines.reducio.encoders import (
    SemanticEncoder,
    load_content_encoder,
    load_text_encoder,
    load_tokenizer,
)
from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def motion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the second stage alone: its encoders are named when it is loaded."""
    from diffusers import DPMSolverMultistepScheduler

    torch.manual_seed(0)
    narrow = {"base_channels": 8, "channel_multipliers": (1, 1, 1, 1, 2, 2), "norm_groups": 4, "num_res_blocks": 1}
    content = {"content_base_channels": 8, "content_channel_multipliers": (1, 1, 1, 2)}
    vae = randomise(ReducioVAE(VAEConfig(**narrow, **content, num_heads=2, fusion_head_dim=8)))
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "caption_channels": 32, "semantic_channels": 40}
    dit = randomise(ReducioDiT(DiTConfig(**sizes, learn_sigma=False)))
    folder = tmp_path_factory.mktemp("motion") / "model"
    pipe = ReducioPipeline(vae, dit, DPMSolverMultistepScheduler(), sample_height=64, sample_width=64)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pixart(t5: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage as published on the hub: with its own text encoder, tokenizer and autoencoder."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(1)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        in_channels=4,
        out_channels=8,
        caption_channels=32,
        cross_attention_dim=16,
    )
    parts = load_tokenizer(t5), load_text_encoder(t5, torch.float32, "cpu"), AutoencoderKL.from_pretrained(vae_folder)
    folder = tmp_path_factory.mktemp("pixart")
    PixArtAlphaPipeline(*parts, randomise(transformer), DPMSolverMultistepScheduler()).save_pretrained(folder)
    return folder


def test_a_pipeline_of_named_parts(motion: Path, t5: Path, clip_folder: Path, vae_folder: Path, pixart: Path):
    """Everything by folder; then the same with the parts as objects, and with the conditions precomputed."""
    names = {"text_encoder": str(t5), "image_encoder": clip_folder, "content_encoder": vae_folder}
    pipe = ReducioPipeline.from_pretrained(motion, device="cpu", text_to_image=pixart, **names)
    out = pipe(PROMPT, seed=3, **FAST)
    assert out.frames.shape == (16, 64, 64, 3) and out.frames.std() > 1
    objects = {
        "text_encoder": load_text_encoder(t5, torch.float32, "cpu"),
        "tokenizer": load_tokenizer(t5),
        "image_encoder": SemanticEncoder.from_pretrained(clip_folder, torch.float32),
        "content_encoder": load_content_encoder(vae_folder, torch.float32, "cpu"),
    }
    injected = ReducioPipeline.from_pretrained(motion, device="cpu", **objects)
    assert np.array_equal(injected(PROMPT, out.content, seed=3, **FAST).frames, out.frames)
    text, mask, *_ = pipe.encode_prompt(PROMPT)
    semantic, latents = pipe.encode_image(out.content)
    assert text.shape == (1, LENGTH, 32) and semantic.shape == (1, 256, 40) and latents.shape == (1, 4, 8, 8)
    bare = ReducioPipeline.from_pretrained(motion, device="cpu")
    conditions = {"prompt_embeds": text, "prompt_attention_mask": mask, "semantic_embeds": semantic}
    frames = bare(image=out.content, content_latents=latents, seed=3, **conditions, **FAST).frames
    assert np.array_equal(frames[0], out.frames)


def test_what_both_stages_name_is_loaded_once(motion: Path, pixart: Path, clip_folder: Path, tmp_path: Path):
    names = {"text_encoder": pixart, "content_encoder": pixart, "image_encoder": clip_folder}
    pipe = ReducioPipeline.from_pretrained(motion, device="cpu", text_to_image=pixart, **names)
    assert pipe.text_to_image.text_encoder is pipe.text_encoder and pipe.text_to_image.vae is pipe.content_encoder
    pipe.save_pretrained(tmp_path / "whole")
    inner = {path.name for path in (tmp_path / "whole/text_to_image").iterdir() if path.is_dir()}
    assert not inner & {"text_encoder", "vae"}, "written once as well"
    again = ReducioPipeline.from_pretrained(tmp_path / "whole", device="cpu")
    assert np.array_equal(again(PROMPT, seed=3, **FAST).frames, pipe(PROMPT, seed=3, **FAST).frames)


def test_generate_takes_the_same_names(motion: Path, pixart: Path, clip_folder: Path):
    import reducio_fast
    from reducio_fast.pipelines import generate

    generate.forget()
    names = {"text_encoder": str(pixart), "content_encoder": str(pixart), "image_encoder": str(clip_folder)}
    kwargs = {"model": motion, "device": "cpu", "text_to_image": str(pixart)} | names
    first = reducio_fast.generate(PROMPT, seed=3, **kwargs, **FAST)
    again = reducio_fast.generate(PROMPT, seed=3, **kwargs, **FAST)
    assert np.array_equal(first.frames, again.frames) and len(generate.kept()) == 1
    reducio_fast.generate(PROMPT, first.content, **(kwargs | {"text_to_image": None}), **FAST)
    assert len(generate.kept()) == 2


def test_an_encoder_of_another_width_is_refused_before_its_weights_are_read(motion: Path, tmp_path: Path):
    from diffusers import AutoencoderKL
    from transformers import T5Config

    T5Config(d_model=24).save_pretrained(tmp_path / "t5")
    (tmp_path / "clip").mkdir()
    tower = {"model_cfg": {"vision_cfg": {"width": 24}}}
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps(tower))
    AutoencoderKL(latent_channels=16, norm_num_groups=1, block_out_channels=(1,)).save_config(tmp_path / "vae")
    for name, message in (
        ("text_encoder", "text_encoder: .*t5 gives 24 channels, the transformer reads 32"),
        ("image_encoder", "image_encoder: .*clip gives 24 channels, the transformer reads 40"),
        ("content_encoder", "content_encoder: .*vae gives 16 channels, the transformer reads 4"),
    ):
        folder = tmp_path / {"text_encoder": "t5", "image_encoder": "clip", "content_encoder": "vae"}[name]
        kwargs = {name: folder} | ({"tokenizer": None} if name == "text_encoder" else {})
        with pytest.raises(ReducioError, match=message) as caught:
            ReducioPipeline.from_pretrained(motion, device="cpu", **kwargs)
        assert "\n" not in str(caught.value)


def test_injected_parts_of_another_width_are_refused_too(motion: Path, tmp_path: Path):
    from diffusers import AutoencoderKL
    from transformers import T5Config, T5EncoderModel

    text = T5EncoderModel(T5Config(vocab_size=8, d_model=24, num_layers=1, num_heads=2, d_kv=4, d_ff=8))
    vae = AutoencoderKL(latent_channels=16, norm_num_groups=1, block_out_channels=(1,))
    for kwargs, message in (
        ({"text_encoder": text}, "transformer has caption_channels=32, text_encoder gives 24"),
        ({"content_encoder": vae}, "transformer has content_channels=4, content_encoder gives 16"),
    ):
        with pytest.raises(ReducioError, match=message):
            ReducioPipeline.from_pretrained(motion, device="cpu", **kwargs)


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("text_encoder", "google/flan-t5-xxl"),
        ("content_encoder", "stabilityai/sd-vae-ft-ema"),
        ("text_to_image", "stabilityai/stable-diffusion-xl-base-1.0"),
    ],
)
def test_with_no_network_one_line_says_what_to_download(motion: Path, name: str, hub_id: str):
    with pytest.raises(ReducioError) as caught:
        ReducioPipeline.from_pretrained(motion, device="cpu", **{name: hub_id})
    message = str(caught.value)
    assert message.startswith(f"{name}: {hub_id!r} is no local folder and could not be fetched from the hub")
    assert f"run `hf download {hub_id} --local-dir DIR`, then pass DIR" in message and "\n" not in message


def test_a_hub_id_in_the_cache_needs_no_network(
    motion: Path, t5: Path, clip_folder: Path, vae_folder: Path, pixart: Path, tmp_path: Path, monkeypatch
):
    """The cache as huggingface_hub lays it out, HF_HUB_OFFLINE set as in all tests."""
    sources = {
        "google/flan-t5-xxl": t5,
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": clip_folder,
        "stabilityai/sd-vae-ft-ema": vae_folder,
        "PixArt-alpha/PixArt-XL-2-512x512": pixart,
    }
    for name, folder in sources.items():
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text, tower, vae, first_stage = sources
    pipe = ReducioPipeline.from_pretrained(
        motion,
        device="cpu",
        text_encoder=text,
        image_encoder="ViT-H-14/laion2b_s32b_b79k",
        content_encoder=vae,
        text_to_image=first_stage,
    )
    folders = {"text_encoder": t5, "image_encoder": clip_folder, "content_encoder": vae_folder, "text_to_image": pixart}
    local = ReducioPipeline.from_pretrained(motion, device="cpu", **folders)
    assert np.array_equal(pipe(PROMPT, **FAST).frames, local(PROMPT, **FAST).frames)
    both = ReducioPipeline.from_pretrained(motion, device="cpu", text_encoder=first_stage, text_to_image=first_stage)
    assert both.text_encoder is both.text_to_image.text_encoder


def test_code_in_a_folder_is_never_run(motion: Path, t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers would ask for permission at the terminal; the loader must not ask at all."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for file, changes in (
        ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "evil.Own"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "evil.Own"]}}),
    ):
        folder = Path(shutil.copytree(t5, tmp_path / file))
        (folder / "tokenizer.json").unlink()
        (folder / file).write_text(json.dumps(changes))
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: ...\n")
        with pytest.raises(ReducioError) as caught:
            ReducioPipeline.from_pretrained(motion, device="cpu", text_encoder=folder)
        assert str(folder) in str(caught.value) and not (tmp_path / "ran").exists()


def test_names_that_fit_no_part(motion: Path, t5: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    for kwargs, message in (
        ({"vae": str(t5)}, "vae: '.*' given; only encoders, preview_decoder and text_to_image can be named"),
        ({"text_encoder": tmp_path}, "text_encoder: .* is of the type 'resnet', which is no text encoder"),
        ({"content_encoder": t5}, "content_encoder: .* is of None, must be an AutoencoderKL"),
        ({"image_encoder": t5}, "open_clip_config.json: no such file"),
    ):
        with pytest.raises(ReducioError, match=message):
            ReducioPipeline.from_pretrained(motion, device="cpu", **kwargs)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_takes_the_names(motion: Path, pixart: Path, clip_folder: Path, tmp_path: Path, capfd: Any):
    from reducio_fast.cli import main

    out = tmp_path / "frames"
    line = f"--out {out} --model {motion} --text-encoder {pixart} --content-encoder {pixart}"
    line += f" --image-encoder {clip_folder} --text-to-image {pixart} --content-num-inference-steps 2 --device cpu"
    line += " --content-guidance-scale 2 --clean-caption --num-inference-steps 2 --seed 3 --no-progress --json"
    assert main.main(["generate", PROMPT, *line.split()]) == 0
    config = json.loads(capfd.readouterr().out)["config"]
    assert config["text_to_image"] == str(pixart) and config["clean_caption"] is True
    assert config["content_kwargs"] == {"num_inference_steps": 2, "guidance_scale": 2.0}
    names = {"text_encoder": pixart, "content_encoder": pixart, "image_encoder": clip_folder}
    pipe = ReducioPipeline.from_pretrained(motion, device="cpu", text_to_image=pixart, clean_caption=True, **names)
    expected = pipe(PROMPT, seed=3, content_kwargs=config["content_kwargs"], **FAST)
    written = np.stack([np.asarray(Image.open(path)) for path in sorted(out.iterdir())])
    assert np.array_equal(written, expected.frames)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--text-encoder google/flan-t5-xxl", "run `hf download google/flan-t5-xxl --local-dir DIR`, then pass DIR"),
        ("--image-encoder ViT-H-14/laion2b_s32b_b79k", "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K open_clip_"),
        ("--text-to-image no/such", "text_to_image: 'no/such' is no local folder and could not be fetched"),
        ("--text-encoder WIDE", "gives 24 channels, the transformer reads 32"),
        ("", "prompt_embeds: None given, and no text_encoder is loaded"),
    ],
)
def test_the_command_refuses_in_one_line(motion: Path, tmp_path: Path, capfd: Any, words: str, message: str):
    from transformers import T5Config

    from reducio_fast.cli import main

    T5Config(d_model=24).save_pretrained(tmp_path / "wide")
    argv = words.replace("WIDE", str(tmp_path / "wide")).split()
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(image)
    before = sorted(tmp_path.iterdir())
    line = ["generate", "a cat", "--image", str(image), "--out", str(tmp_path / "c.gif"), "--model", str(motion)]
    assert main.main([*line, *argv, "--device", "cpu"]) == 2
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err
    assert sorted(tmp_path.iterdir()) == before, "something was written"
