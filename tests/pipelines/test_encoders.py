"""The full-size encoders under their usual names, as small random networks of the same classes, against their peers:
transformers and diffusers' PixArt for text, open_clip for patch tokens, diffusers for latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from safetensors.torch import load_file, save_file
from torch import nn

from encoder_folders import LENGTH, PROMPT
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
from reducio_fast.reference import DiTConfig
from reducio_fast.system.errors import ReducioError

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
    """Pinned results, to notice a version of diffusers that cleans differently; cleaned twice, as upstream does."""
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
        kwargs = {"device": torch.device("cpu"), "do_classifier_free_guidance": False, "max_sequence_length": LENGTH}
        theirs, their_mask, *_ = peer.encode_prompt(text, clean_caption=True, **kwargs)
        ours, mask = TextEncoder(model, tokenizer, LENGTH, clean=True)([text])
        assert torch.equal(ours, theirs) and torch.equal(mask.long(), their_mask) and ours.shape == (1, LENGTH, 32)
        lowered = text.lower().strip()  # what diffusers does to a caption that it does not clean
        theirs, *_ = peer.encode_prompt(lowered, clean_caption=False, **kwargs)
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
    """T5-XXL exceeds float16's range in `wo`: transformers keeps `wo` in float32, and so does every cast here."""
    from transformers import T5EncoderModel

    theirs = T5EncoderModel.from_pretrained(t5, dtype=torch.float16)
    ours = load_text_encoder(t5, torch.float16, "cpu")
    again = networks.cast(load_text_encoder(t5, torch.float32, "cpu"), "cpu", torch.float16)
    dtypes = {name: tensor.dtype for name, tensor in theirs.state_dict().items()}
    assert set(dtypes.values()) == {torch.float16, torch.float32}
    for model in (ours, again):
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == dtypes[name] and torch.equal(tensor, theirs.state_dict()[name]), name
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
    special_tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    config = {"tokenizer_class": "T5Tokenizer", "additional_special_tokens": []} | special_tokens
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
    square = _resize_with_antialiasing(image, (224, 224))
    with torch.no_grad():
        kwargs = {"image_indices": 1, "normalize_intermediates": True, "image_output_fmt": "NLC"}
        prepared = normalise((square + 1) / 2)
        out = clip.forward_intermediates(prepared, intermediates_only=True, **kwargs)["image_intermediates"][0]
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
        # The same object: on a CPU with AVX2 alone a convolution's last bits depend on where its weights are in memory.
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
    """stabilityai/sd-vae-ft-ema predates diffusers' renaming of attention; strict loading must take the old names."""
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


# ---- full size, on the meta device -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_token_counts_and_widths_at_full_size():
    """The published configurations give the DiT's defaults: 120 x 4096, 256 x 1280 and 4 x H/8 x W/8."""
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
