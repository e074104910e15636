"""The full-size encoders by the names people know, as small random networks of the very classes, against their peers:
transformers and diffusers' PixArt for text, open_clip for patch tokens, diffusers for latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints import networks
from reducio_fast.pipelines.reducio.encoders import (
    ContentEncoder,
    SemanticEncoder,
    TextEncoder,
    clean_caption,
    find_tower,
    load_content_encoder,
    load_text_encoder,
    load_tokenizer,
)
from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.system.errors import ReducioError

PROMPT = "a red circle moving right on a black background"
LENGTH = 120
FAST = {"num_inference_steps": 2, "progress": False}
CLIP_SIZES = {
    "embed_dim": 16,
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


def randomise(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.normal_(0, 0.1)
    return network.requires_grad_(False).eval()


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    words = [(f"▁{word}", -3.0) for word in dict.fromkeys(PROMPT.split())]
    letters = [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz'\",."]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole T5 v1.1 (gated GELU, decoder, untied head) with its tokenizer, as google/flan-t5-xxl lies on the hub."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 48}
    words = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    folder = tmp_path_factory.mktemp("t5")
    randomise(T5ForConditionalGeneration(T5Config(**sizes, **words))).save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(64, 32)}, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ViT-H-14 scaled down (patch 14 at 224 pixels kept) as a whole CLIP, written by open_clip itself."""
    from open_clip.model import CLIP, set_model_preprocess_cfg
    from open_clip.push_to_hf_hub import save_config_for_hf

    torch.manual_seed(0)
    config = CLIP_SIZES | {
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 40, "head_width": 20, "patch_size": 14}
    }
    clip = randomise(CLIP(**config))
    statistics = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    set_model_preprocess_cfg(clip, {"size": 224} | statistics)
    folder = tmp_path_factory.mktemp("clip")
    save_config_for_hf(clip, folder / "open_clip_config.json", config)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    folder = tmp_path_factory.mktemp("vae")
    randomise(AutoencoderKL(**blocks, **sizes)).save_pretrained(folder)
    return folder


# ---- text ------------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "A Red CIRCLE": "a red circle",
    "  two   spaces\n": "two spaces",
    "A <person> & a dog!! http://foo.com/a.png": "a person a dog!! .",
    "see www.example.com/page now": "see now",
    "&lt;b&gt;bold&lt;/b&gt; text": "bold< b> text",
    "<p>bold</p> text": "bold text",
    "中文字幕 “red” circle": '"red" circle',
    "中文": "",
    "hello---world_this_is_a_test": "hello world this is a test",
    "a+b%20c": "a b c",
    "IMG_1234.jpg a cat": "a cat",
    "@user look": "look",
    "1920x1080 4k": "4k",
    "page 12 of 3": "of 3",
    "'quoted'": "quoted",
    "jc6640 abc123def": "",
    "50% off, FREE shipping worldwide": "50% off, worldwide",
    "＃123 at 127.0.0.1": "at",
    "naÃ¯ve cafÃ©": "naã¯ve cafã",
    "click for details": "",
}


def test_caption_cleaning_is_pixarts():
    """Pinned texts, so that another version of diffusers that cleans otherwise is noticed; twice, as upstream does."""
    from diffusers import PixArtAlphaPipeline

    pipeline = PixArtAlphaPipeline(None, None, None, None, None)
    assert {text: clean_caption(text) for text in CAPTIONS} == CAPTIONS
    for text, cleaned in CAPTIONS.items():
        assert pipeline._clean_caption(pipeline._clean_caption(text)) == cleaned
    once = pipeline._clean_caption("&lt;b&gt;bold&lt;/b&gt; text")
    assert once != clean_caption("&lt;b&gt;bold&lt;/b&gt; text"), "the second pass matters"


@pytest.mark.parametrize(("module", "name"), [("bs4", "beautifulsoup4"), ("ftfy", "ftfy")])
def test_cleaning_without_its_packages_is_refused(monkeypatch: pytest.MonkeyPatch, module: str, name: str):
    monkeypatch.setattr(networks, "_importable", lambda wanted: wanted != module)
    with pytest.raises(ReducioError, match=f"clean_caption: needs {name}, not installed here"):
        clean_caption("a cat")


def test_text_is_what_diffusers_pixart_feeds_its_transformer(t5: Path):
    """The same weights through `PixArtAlphaPipeline.encode_prompt`, cleaned and not, short and too long."""
    from diffusers import PixArtAlphaPipeline

    model, tokenizer = load_text_encoder(t5, torch.float32, "cpu"), load_tokenizer(t5)
    peer = PixArtAlphaPipeline(tokenizer, model, None, None, None)
    for text in (PROMPT, "a", "A <b>RED</b> circle http://a.com", PROMPT * 20):
        words = {"device": torch.device("cpu"), "do_classifier_free_guidance": False, "max_sequence_length": LENGTH}
        theirs, their_mask, *_ = peer.encode_prompt(text, clean_caption=True, **words)
        ours, mask = TextEncoder(model, tokenizer, LENGTH, clean=True)([text])
        assert torch.equal(ours, theirs) and torch.equal(mask.long(), their_mask) and ours.shape == (1, LENGTH, 32)
        lowered = text.lower().strip()  # what diffusers does to a caption that it does not clean
        theirs, *_ = peer.encode_prompt(lowered, clean_caption=False, **words)
        assert torch.equal(TextEncoder(model, tokenizer, LENGTH)([lowered])[0], theirs)


def test_text_is_what_transformers_computes(t5: Path):
    from transformers import AutoTokenizer, T5EncoderModel

    model, tokenizer = T5EncoderModel.from_pretrained(t5), AutoTokenizer.from_pretrained(t5)
    tokens = tokenizer([PROMPT], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state
    loaded = load_text_encoder(t5, torch.float32, "cpu")
    assert type(loaded) is T5EncoderModel and not loaded.training
    text, mask = TextEncoder(loaded, load_tokenizer(t5), LENGTH)([PROMPT])
    assert torch.equal(text, expected) and mask.sum() == len(PROMPT.split()) + 1 and mask.dtype == torch.bool


def test_float16_keeps_what_transformers_keeps(t5: Path):
    """T5-XXL leaves float16's range in `wo`: transformers keeps it in float32, and so does every cast here."""
    from transformers import T5EncoderModel

    theirs = T5EncoderModel.from_pretrained(t5, dtype=torch.float16)
    ours = load_text_encoder(t5, torch.float16, "cpu")
    again = networks.cast(load_text_encoder(t5, torch.float32, "cpu"), "cpu", torch.float16)
    kinds = {name: tensor.dtype for name, tensor in theirs.state_dict().items()}
    assert set(kinds.values()) == {torch.float16, torch.float32}
    for model in (ours, again):
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == kinds[name] and torch.equal(tensor, theirs.state_dict()[name]), name
    bfloat = networks.cast(ours, "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in bfloat.parameters()} == {torch.bfloat16}


def test_a_tokenizer_published_as_sentencepiece_alone(t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PixArt-alpha's tokenizer folder holds spiece.model and no tokenizer.json."""
    import sentencepiece

    texts = [PROMPT, "a blue star growing on white", "the green square jumps over lazy dogs"] * 20
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "spiece"), vocab_size=40, minloglevel=2, **ids
    )
    marks = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    config = {"tokenizer_class": "T5Tokenizer", "additional_special_tokens": []} | marks
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert load_tokenizer(tmp_path)(PROMPT).input_ids == [*peer.encode(PROMPT), peer.eos_id()]
    monkeypatch.setattr(networks, "_importable", lambda module: False)
    with pytest.raises(ReducioError, match=r"spiece.model: needs sentencepiece and protobuf, .*pip install sentencep"):
        load_tokenizer(tmp_path)


# ---- semantics -------------------------------------------------------------------------------------------------------


def test_patch_tokens_are_open_clips_own(clip_folder: Path):
    """open_clip loads the same folder its own way and gives its last intermediate, normalised, without class token."""
    from open_clip import create_model_from_pretrained

    clip, preprocess = create_model_from_pretrained(f"local-dir:{clip_folder}")
    clip.eval()
    encoder = SemanticEncoder.from_pretrained(clip_folder, torch.float32)
    normalise = preprocess.transforms[-1]
    assert encoder.mean.flatten().tolist() == pytest.approx(list(normalise.mean))
    assert encoder.std.flatten().tolist() == pytest.approx(list(normalise.std))
    assert encoder.visual.image_size == (224, 224)

    image = torch.rand(2, 3, 96, 160) * 2 - 1
    tokens = encoder(image)
    square = F.interpolate(image, (224, 224), mode="bicubic", align_corners=True, antialias=True)
    with torch.no_grad():
        words = {"image_indices": 1, "normalize_intermediates": True, "image_output_fmt": "NLC"}
        prepared = normalise((square + 1) / 2)
        out = clip.forward_intermediates(prepared, intermediates_only=True, **words)["image_intermediates"][0]
        clip.visual.output_tokens = True
        _, alone = clip.visual(prepared)
    assert tokens.shape == (2, 256, 40)
    assert torch.equal(tokens, alone) and torch.equal(tokens, out)


def test_the_whole_frame_goes_in_and_the_corners_stay():
    """Aspect ratio not kept, nothing cropped, corner pixels on corner pixels: the resize of the release."""
    frame = torch.zeros(1, 3, 64, 128)
    frame[..., :8] = 1.0
    frame[..., -8:] = -1.0
    seen: list[torch.Tensor] = []

    class Tower(nn.Module):
        image_size, grid_size = (224, 224), (16, 16)

        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 1, 1)

        def forward(self, x: torch.Tensor) -> tuple[None, torch.Tensor]:
            seen.append(x)
            return None, torch.zeros(1, 257, 4)

    encoder = SemanticEncoder.__new__(SemanticEncoder)
    nn.Module.__init__(encoder)
    encoder.visual, encoder.mean, encoder.std = Tower(), torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    assert encoder(frame).shape == (1, 256, 4)
    assert seen[0].shape == (1, 3, 224, 224)
    assert torch.allclose(seen[0][0, :, :, 0], torch.tensor(2.0)) and torch.allclose(
        seen[0][0, :, :, -1], torch.tensor(-2.0)
    )


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_open_clips_own_prefixes(clip_folder: Path, prefix: str):
    assert find_tower(f"{prefix}{clip_folder}") == clip_folder


@pytest.mark.parametrize(
    "name",
    [
        "ViT-H-14/laion2b_s32b_b79k",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ],
)
def test_the_tower_of_the_release_by_its_names(name: str):
    with pytest.raises(ReducioError) as caught:
        find_tower(name)
    assert (
        "run `hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K open_clip_config.json open_clip_model.safetensors "
        "--local-dir DIR`, then pass DIR" in str(caught.value)
    )
    assert "\n" not in str(caught.value)


# ---- content ---------------------------------------------------------------------------------------------------------


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_latents_are_diffusers_own(vae_folder: Path, tmp_path: Path):
    from diffusers import AutoencoderKL

    peer, vae = AutoencoderKL.from_pretrained(vae_folder), load_content_encoder(vae_folder, torch.float32, "cpu")
    assert type(vae) is type(peer) and same_weights(vae, peer)
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        # By the same object: on a CPU with AVX2 alone the last bits of a convolution depend on where its weights lie.
        posterior = vae.encode(image).latent_dist
    encoder = ContentEncoder(vae)
    assert (
        torch.equal(encoder(image), posterior.mode()) and encoder(image).shape == (2, 4, 8, 12) and encoder.factor == 8
    )
    drawn = encoder(image, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, posterior.sample(torch.Generator().manual_seed(1)))
    assert torch.equal(ContentEncoder(vae, 0.18215)(image), posterior.mode() * 0.18215)
    shutil.copytree(vae_folder, tmp_path / "pipeline/vae")
    inside = load_content_encoder(tmp_path / "pipeline", torch.float32, "cpu")
    assert same_weights(inside, peer)


def test_an_autoencoder_with_the_names_of_its_time(vae_folder: Path, tmp_path: Path):
    """stabilityai/sd-vae-ft-ema was published before diffusers renamed its attention; strict loading must know it."""
    folder = Path(shutil.copytree(vae_folder, tmp_path / "old"))
    file = folder / "diffusion_pytorch_model.safetensors"
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in load_file(file).items():
        for new, former in renamed.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        old[name] = tensor
    assert any(".query." in name for name in old)
    save_file(old, file, metadata={"format": "pt"})
    image = torch.rand(1, 3, 32, 32)
    encoders = [ContentEncoder(load_content_encoder(path, torch.float32, "cpu")) for path in (folder, vae_folder)]
    assert torch.equal(encoders[0](image), encoders[1](image))


# ---- full size, on no memory at all ----------------------------------------------------------------------------------


def test_token_counts_and_widths_at_full_size():
    """120 x 4096, 256 x 1280 and 4 x H/8 x W/8, the DiT's defaults, from the published configurations."""
    from diffusers import AutoencoderKL
    from open_clip import get_model_config
    from open_clip.model import CLIP
    from transformers import T5Config, T5EncoderModel

    config = DiTConfig()
    tower = get_model_config("ViT-H-14")
    with torch.device("meta"):
        encoder = SemanticEncoder({"model_cfg": tower, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
        clip = CLIP(**tower)
        xxl = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
        text = T5EncoderModel(T5Config(**xxl, feed_forward_proj="gated-gelu"))
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
        tokens = encoder(torch.empty(1, 3, 768, 1344))
        hidden = text(torch.zeros(1, LENGTH, dtype=torch.long))[0]
        latent = ContentEncoder(vae)(torch.empty(1, 3, 768, 1344))
    assert tokens.shape == (1, 256, config.semantic_channels) == (1, 256, 1280)
    assert hidden.shape == (1, config.caption_length, config.caption_channels) == (1, 120, 4096)
    assert latent.shape == (1, config.content_channels, 96, 168) == (1, 4, 96, 168)
    assert sum(p.numel() for p in encoder.parameters()) == 632_076_800
    assert sum(p.numel() for p in text.parameters()) == 4_762_310_656
    names = {name: tensor.shape for name, tensor in clip.state_dict().items() if name.startswith("visual.")}
    assert {name: tensor.shape for name, tensor in encoder.state_dict().items()} == names


# ---- a pipeline of named parts ---------------------------------------------------------------------------------------


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
    """A first stage as it lies on the hub: with a text encoder, a tokenizer and an autoencoder of its own."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(1)
    drawer = PixArtTransformer2DModel(
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
    PixArtAlphaPipeline(*parts, randomise(drawer), DPMSolverMultistepScheduler()).save_pretrained(folder)
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
    given = {"prompt_embeds": text, "prompt_attention_mask": mask, "semantic_embeds": semantic}
    frames = bare(image=out.content, content_latents=latents, seed=3, **given, **FAST).frames
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
    words = {"model": motion, "device": "cpu", "text_to_image": str(pixart)} | names
    first = reducio_fast.generate(PROMPT, seed=3, **words, **FAST)
    again = reducio_fast.generate(PROMPT, seed=3, **words, **FAST)
    assert np.array_equal(first.frames, again.frames) and len(generate.kept()) == 1
    reducio_fast.generate(PROMPT, first.content, **(words | {"text_to_image": None}), **FAST)
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
        words = {name: folder} | ({"tokenizer": None} if name == "text_encoder" else {})
        with pytest.raises(ReducioError, match=message) as caught:
            ReducioPipeline.from_pretrained(motion, device="cpu", **words)
        assert "\n" not in str(caught.value)


def test_injected_parts_of_another_width_are_refused_too(motion: Path, tmp_path: Path):
    from diffusers import AutoencoderKL
    from transformers import T5Config, T5EncoderModel

    text = T5EncoderModel(T5Config(vocab_size=8, d_model=24, num_layers=1, num_heads=2, d_kv=4, d_ff=8))
    vae = AutoencoderKL(latent_channels=16, norm_num_groups=1, block_out_channels=(1,))
    for words, message in (
        ({"text_encoder": text}, "transformer has caption_channels=32, text_encoder gives 24"),
        ({"content_encoder": vae}, "transformer has content_channels=4, content_encoder gives 16"),
    ):
        with pytest.raises(ReducioError, match=message):
            ReducioPipeline.from_pretrained(motion, device="cpu", **words)


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
    text, tower, vae, drawer = sources
    pipe = ReducioPipeline.from_pretrained(
        motion,
        device="cpu",
        text_encoder=text,
        image_encoder="ViT-H-14/laion2b_s32b_b79k",
        content_encoder=vae,
        text_to_image=drawer,
    )
    folders = {"text_encoder": t5, "image_encoder": clip_folder, "content_encoder": vae_folder, "text_to_image": pixart}
    local = ReducioPipeline.from_pretrained(motion, device="cpu", **folders)
    assert np.array_equal(pipe(PROMPT, **FAST).frames, local(PROMPT, **FAST).frames)
    both = ReducioPipeline.from_pretrained(motion, device="cpu", text_encoder=drawer, text_to_image=drawer)
    assert both.text_encoder is both.text_to_image.text_encoder


def test_code_in_a_folder_is_never_run(motion: Path, t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers would ask at the terminal; an answer must not even be wanted."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for file, words in (
        ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "evil.Own"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "evil.Own"]}}),
    ):
        folder = Path(shutil.copytree(t5, tmp_path / file))
        (folder / "tokenizer.json").unlink()
        (folder / file).write_text(json.dumps(words))
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: ...\n")
        with pytest.raises(ReducioError) as caught:
            ReducioPipeline.from_pretrained(motion, device="cpu", text_encoder=folder)
        assert str(folder) in str(caught.value) and not (tmp_path / "ran").exists()


def test_names_that_fit_no_part(motion: Path, t5: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    for words, message in (
        ({"vae": str(t5)}, "vae: '.*' given; only encoders and text_to_image can be named"),
        ({"text_encoder": tmp_path}, "text_encoder: .* is of the type 'resnet', which is no text encoder"),
        ({"content_encoder": t5}, "content_encoder: .* is of None, must be an AutoencoderKL"),
        ({"image_encoder": t5}, "open_clip_config.json: no such file"),
    ):
        with pytest.raises(ReducioError, match=message):
            ReducioPipeline.from_pretrained(motion, device="cpu", **words)


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
