"""The two-stage pipeline on a folder of very small random networks of the real classes: 64x64 pixels, two steps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import reducio_fast
from reducio_fast import ReducioPipeline
from reducio_fast.encoders import ContentEncoder, SemanticEncoder, TextEncoder
from reducio_fast.errors import ReducioError
from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig

PROMPT = "a red circle moving right"
FAST = {"num_inference_steps": 2, "progress": False}
SHAPE = (16, 4, 2, 2)  # motion latent of a 64x64 clip
TOWER = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    },
    "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
}


def randomise(network: nn.Module) -> nn.Module:
    """Fresh values everywhere: several layers start at zero, which would leave whole paths unseen."""
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_(0, 0.08)
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    narrow = {"base_channels": 8, "channel_multipliers": (1, 1, 1, 1, 2, 2), "norm_groups": 4, "num_res_blocks": 1}
    content = {"content_base_channels": 8, "content_channel_multipliers": (1, 1, 1, 2)}
    vae = ReducioVAE(VAEConfig(**narrow, **content, num_heads=2, fusion_head_dim=8))
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "caption_length": 40}
    transformer = ReducioDiT(DiTConfig(**sizes, caption_channels=32, semantic_channels=32, learn_sigma=False))
    text_encoder = T5EncoderModel(T5Config(vocab_size=384, d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=32))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    content_encoder = AutoencoderKL(
        **blocks, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4
    )
    drawer = PixArtTransformer2DModel(
        sample_size=8, num_attention_heads=2, attention_head_dim=16, num_layers=1, in_channels=4, out_channels=4,
        caption_channels=32, cross_attention_dim=32,
    )  # fmt: skip
    tokenizer, schedule = ByT5Tokenizer(), {"beta_start": 1e-4, "beta_end": 0.02}
    for network in (vae, transformer, text_encoder, content_encoder, drawer):
        randomise(network)
    pipe = ReducioPipeline(
        vae,
        transformer,
        DPMSolverMultistepScheduler(**schedule),
        text_encoder,
        tokenizer,
        randomise(SemanticEncoder(TOWER)),
        content_encoder,
        PixArtAlphaPipeline(tokenizer, text_encoder, content_encoder, drawer, DPMSolverMultistepScheduler(**schedule)),
        fps=12,
        sample_height=64,
        sample_width=64,
    )
    path = tmp_path_factory.mktemp("model") / "small"
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> ReducioPipeline:
    return ReducioPipeline.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def clip(pipe: ReducioPipeline):
    return pipe(PROMPT, seed=3, **FAST)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder of the test's own, to break."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


# ---- the package and the folder --------------------------------------------------------------------------------------


def test_import_is_quick_and_exports_two_names():
    code = (
        "import sys, time; start = time.perf_counter(); import reducio_fast; seconds = time.perf_counter() - start\n"
        "assert not {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules), 'heavy imports'\n"
        "assert seconds < 0.2, seconds\n"
        "assert reducio_fast.__all__ == ['ReducioPipeline', '__version__', 'generate']\n"
        "assert [n for n in dir(reducio_fast) if n[0] != '_' and n not in ('TYPE_CHECKING', 'Any', 'annotations')] "
        "== ['ReducioPipeline', 'generate']\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert reducio_fast.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'sampler'"):
        _ = reducio_fast.sampler


def test_a_saved_model_loads_to_the_same_bits(folder: Path, pipe: ReducioPipeline, tmp_path: Path):
    pipe.save_pretrained(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(folder)
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index == json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["reducio_fast", "ReducioVAE"] and index["image_encoder"] == [
        "open_clip",
        "VisionTransformer",
    ]
    assert (index["fps"], index["sample_height"]) == (12, 64)
    assert not [p for p in tmp_path.iterdir() if p.name != "again"], "temporary folders left behind"


def test_half_precision_storage_round_trips(pipe: ReducioPipeline, folder: Path, tmp_path: Path):
    half = ReducioPipeline.from_pretrained(folder, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    assert (tmp_path / "half/vae/diffusion_pytorch_model.safetensors").stat().st_size < 0.6 * (
        folder / "vae/diffusion_pytorch_model.safetensors"
    ).stat().st_size
    full = ReducioPipeline.from_pretrained(tmp_path / "half", torch_dtype="float32")
    for name, value in full.vae.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, pipe.vae.state_dict()[name].half().float())
    assert all(p.dtype == torch.float32 for n in full._networks() for p in n.parameters())
    assert full.to(dtype="bfloat16").dtype == torch.bfloat16
    assert full(PROMPT, **FAST).frames.shape == (16, 64, 64, 3)


def test_the_first_stage_shares_what_its_folder_lacks(folder: Path, pipe: ReducioPipeline, copy: Path, tmp_path: Path):
    assert sorted(p.name for p in (folder / "text_to_image").iterdir()) == [
        "model_index.json",
        "scheduler",
        "transformer",
    ]
    assert pipe.text_to_image.text_encoder is pipe.text_encoder
    assert pipe.text_to_image.tokenizer is pipe.tokenizer
    assert pipe.text_to_image.vae is pipe.content_encoder
    shutil.copytree(copy / "content_encoder", copy / "text_to_image" / "vae")
    own = ReducioPipeline.from_pretrained(copy)
    assert own.text_to_image.vae is not own.content_encoder
    own.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own/text_to_image/vae/config.json").is_file()


def test_components_can_be_replaced_or_left_out(folder: Path, pipe: ReducioPipeline, tmp_path: Path):
    seen = []

    def tokens(image: torch.Tensor) -> torch.Tensor:
        seen.append((image.shape, image.min() >= -1, image.max() <= 1))
        return torch.zeros(1, 5, 32)

    own = ReducioPipeline.from_pretrained(folder, image_encoder=tokens, content_encoder=None, text_to_image=None)
    assert own(PROMPT, Image.new("RGB", (64, 64), "red"), **FAST).frames.shape == (16, 64, 64, 3)
    assert seen == [((1, 3, 64, 64), True, True)]
    with pytest.raises(ReducioError, match="image: None given, and this model has no text-to-image stage"):
        own(PROMPT, **FAST)
    with pytest.raises(ReducioError, match="image_encoder: a function cannot be saved"):
        own.save_pretrained(tmp_path / "own")
    assert not list(tmp_path.iterdir())
    own.image_encoder = None
    own.save_pretrained(tmp_path / "own")
    again = ReducioPipeline.from_pretrained(tmp_path / "own")
    assert again.image_encoder is None and again.content_encoder is None and again.text_to_image is None
    with pytest.raises(ReducioError, match="unknown unet; known are vae, transformer"):
        ReducioPipeline.from_pretrained(folder, unet=None)
    with pytest.raises(ReducioError, match="transformer has latent_channels=16, vae gives 8"):
        narrow = VAEConfig(
            base_channels=8, content_base_channels=8, norm_groups=4, latent_channels=8, fusion_head_dim=8
        )
        ReducioPipeline.from_pretrained(folder, vae=ReducioVAE(narrow))


def test_generate_keeps_the_loaded_model(folder: Path, clip, monkeypatch: pytest.MonkeyPatch):
    from reducio_fast import front

    monkeypatch.setattr(front, "_pipelines", type(front._pipelines)())
    first = reducio_fast.generate(PROMPT, model=folder, seed=3, device="cpu", **FAST)
    loaded = list(front._pipelines.values())
    again = reducio_fast.generate(PROMPT, model=str(folder), seed=3, dtype="float32", device="cpu", **FAST)
    assert list(front._pipelines.values()) == loaded and len(loaded) == 1
    assert np.array_equal(first.frames, clip.frames) and np.array_equal(again.frames, clip.frames)
    for backend, dtype in (("reference", "float32"), ("auto", "bfloat16"), ("auto", "float32")):
        reducio_fast.generate(PROMPT, model=folder, backend=backend, dtype=dtype, device="cpu", **FAST)
        assert len(front._pipelines) <= front.CACHED_PIPELINES


# ---- what a call returns ---------------------------------------------------------------------------------------------


def test_output(clip, pipe: ReducioPipeline):
    assert clip.frames.shape == (16, 64, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.content.shape == (64, 64, 3) and clip.content.dtype == np.uint8
    assert (clip.seed, clip.seeds, clip.fps, clip.interrupted) == (3, [3], 12, False)
    assert list(clip.timings) == ["content.generate", "text.encode", "image.encode", "dit.step", "vae.decode"]
    assert all(seconds > 0 for seconds in clip.timings.values())
    assert clip.frames.std() > 1, "the fixture must not draw blank clips, or equality shows nothing"
    assert not np.array_equal(clip.frames, pipe(PROMPT, seed=4, **FAST).frames)
    assert not np.array_equal(clip.frames, pipe("a blue star", clip.content, seed=3, **FAST).frames)


def test_output_types_hold_one_clip(pipe: ReducioPipeline, clip):
    pil = pipe(PROMPT, seed=3, output_type="pil", **FAST).frames
    assert np.array_equal(np.stack([np.asarray(f) for f in pil]), clip.frames)
    pt = pipe(PROMPT, seed=3, output_type="pt", **FAST).frames
    assert pt.shape == (16, 3, 64, 64) and pt.dtype == torch.float32 and pt.min() >= 0 and pt.max() <= 1
    assert np.array_equal((pt * 255).round().byte().permute(0, 2, 3, 1).numpy(), clip.frames)
    out = pipe(PROMPT, seed=3, output_type="latent", **FAST)
    assert out.frames.shape == SHAPE and "vae.decode" not in out.timings
    assert np.array_equal(pipe.decode(out.frames, out.content), clip.frames)
    both = torch.stack([out.frames, out.frames.flip(-1)])
    pair = pipe.decode(both, np.stack([out.content] * 2))
    assert pair.shape == (2, 16, 64, 64, 3) and np.array_equal(pair[0], clip.frames)


def test_the_reference_networks_make_the_clip(folder: Path):
    """The whole second stage once more, step by step from its parts."""
    from reducio_fast.reference import Condition, initial_latent, sample

    pipe = ReducioPipeline.from_pretrained(folder, device="cpu", backend="reference")

    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    text, mask = TextEncoder(pipe.text_encoder, pipe.tokenizer, 40)([PROMPT])
    posterior = pipe.content_encoder.encode(pixels).latent_dist
    assert torch.equal(ContentEncoder(pipe.content_encoder)(pixels), posterior.mode())
    cond = Condition(text, mask, pipe.image_encoder(pixels), posterior.mode())
    latent = sample(pipe.transformer, pipe.scheduler, initial_latent((1, *SHAPE), [5]), cond, num_inference_steps=2)
    video = pipe.vae.decode(latent, pipe.vae.encode_content(pixels))[0].clamp(-1, 1)
    frames = ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert np.array_equal(pipe(PROMPT, image, seed=5, **FAST).frames, frames)


def test_above_a_tile_the_decoder_works_in_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch):
    pipe, seen = ReducioPipeline.from_pretrained(folder, device="cpu", backend="reference"), []
    monkeypatch.setattr(pipe.vae, "decode", lambda z, f, tiled: seen.append(tiled) or torch.zeros(1, 3, 16, 32, 352))
    for width in (320, 352):
        pipe(PROMPT, Image.new("RGB", (width, 32)), height=32, width=width, **FAST)
    assert seen == [False, True]


def test_a_list_makes_the_bytes_of_its_items(pipe: ReducioPipeline, clip):
    prompts = [PROMPT, "a blue star growing", PROMPT]
    many = pipe(prompts, seed=3, negative_prompt=["", "noise", ""], **FAST)
    assert many.frames.shape == (3, 16, 64, 64, 3) and many.content.shape == (3, 64, 64, 3) and many.seeds == [3, 4, 5]
    assert np.array_equal(many.frames[0], clip.frames)
    alone = pipe("a blue star growing", seed=4, negative_prompt="noise", **FAST)
    assert np.array_equal(many.frames[1], alone.frames)
    assert not np.array_equal(many.frames[2], clip.frames)
    pil = pipe(prompts[:2], seed=3, output_type="pil", **FAST).frames
    assert [len(frames) for frames in pil] == [16, 16]


def test_generators_and_seeds(pipe: ReducioPipeline, clip):
    generators = [torch.Generator().manual_seed(s) for s in (3, 40)]
    many = pipe([PROMPT, PROMPT], generator=generators, **FAST)
    assert many.seeds == [3, 40] and np.array_equal(many.frames[0], clip.frames)
    random = pipe(PROMPT, seed=None, **FAST)
    assert np.array_equal(random.frames, pipe(PROMPT, seed=random.seed, **FAST).frames)
    assert random.seed != pipe(PROMPT, seed=None, **FAST).seed


def test_latents_replace_the_noise_alone(pipe: ReducioPipeline, clip):
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(SHAPE, generator=generator)
    assert np.array_equal(pipe(PROMPT, latents=noise, seed=3, **FAST).frames, clip.frames)
    other = pipe(PROMPT, latents=torch.zeros(1, *SHAPE).double(), seed=3, **FAST)
    assert np.array_equal(other.content, clip.content) and not np.array_equal(other.frames, clip.frames)


def test_guidance(pipe: ReducioPipeline, clip):
    def frames(**words):
        return pipe(PROMPT, clip.content, seed=3, **words, **FAST).frames

    assert np.array_equal(frames(negative_prompt=""), clip.frames), "no negative prompt is the null text"
    assert not np.array_equal(frames(negative_prompt="noise"), clip.frames)
    assert not np.array_equal(frames(guidance_scale=1), clip.frames)
    assert np.array_equal(frames(guidance_scale=1), frames(guidance_scale=1, negative_prompt="noise"))
    # A negative prompt equal to the prompt cancels: guidance then adds nothing (up to rounding in the batch of two).
    same = frames(negative_prompt=PROMPT).astype(int)
    assert np.abs(same - frames(guidance_scale=0)).max() <= 1


# ---- the image -------------------------------------------------------------------------------------------------------


def test_the_content_frame_given_back_makes_the_same_clip(pipe: ReducioPipeline, clip, tmp_path: Path):
    Image.fromarray(clip.content).save(tmp_path / "content.png")
    for image in (clip.content, Image.fromarray(clip.content), tmp_path / "content.png", str(tmp_path / "content.png")):
        assert np.array_equal(pipe(PROMPT, image, seed=3, **FAST).frames, clip.frames)
    stacked = pipe([PROMPT, PROMPT], np.stack([clip.content] * 2), seed=3, **FAST)
    assert np.array_equal(stacked.frames[0], clip.frames)
    both = pipe([PROMPT, PROMPT], [clip.content, Image.new("L", (64, 64))], seed=3, **FAST)
    assert np.array_equal(both.frames[0], clip.frames) and both.content[1].max() == 0


MODES = [
    "1",
    "L",
    "LA",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "PA",
    "RGBX",
    "RGBa",
]


@pytest.mark.parametrize("mode", MODES)
def test_image_of_any_mode(pipe: ReducioPipeline, mode: str):
    grey = Image.linear_gradient("L").resize((96, 64))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(np.asarray(grey).astype(np.int32) * 257)
    elif mode == "LAB":
        image = Image.merge("LAB", [grey, *[Image.new("L", grey.size, 128)] * 2])
    elif mode in ("RGBa", "PA"):
        image = grey.convert({"RGBa": "RGBA", "PA": "P"}[mode]).convert(mode)
    else:
        image = grey.convert("RGB").convert(mode)
    out = pipe(PROMPT, image, output_type="latent", num_inference_steps=1, progress=False)
    assert image.mode == mode and out.content.shape == (64, 64, 3)
    assert out.content[:8].mean() < 60 and out.content[-8:].mean() > 195, "black above, white below"


def test_image_is_scaled_to_cover_and_cropped(pipe: ReducioPipeline):
    wide = Image.new("RGB", (400, 100), "red")
    wide.paste("blue", (150, 0, 250, 100))  # the centre that is left, give or take the filter's ringing
    out = pipe(PROMPT, wide, output_type="latent", **FAST)
    assert (np.abs(out.content[:, 1:-1].astype(int) - (0, 0, 255)) <= 1).all() and (out.content[:, 0, 0] < 20).all()
    small = pipe(PROMPT, Image.new("RGB", (3, 5), "green"), height=32, width=96, output_type="latent", **FAST)
    assert small.content.shape == (32, 96, 3) and small.frames.shape == (16, 4, 1, 3)


def test_broken_images_are_refused(pipe: ReducioPipeline, tmp_path: Path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.effect_noise((64, 64), 50).save(good)
    bad.write_bytes(good.read_bytes()[:700])
    for image, message in (
        (bad, "bad.png cannot be read"),
        (tmp_path / "none.png", "no such image file"),
        (7, "image must be a path, a PIL image or a NumPy array"),
        ([good, good], "image: 2 given for 1 prompts"),
    ):
        with pytest.raises(ReducioError, match=message):
            pipe(PROMPT, image, **FAST)


class OtherDrawer:
    """A text-to-image pipeline with few words, as others in diffusers are."""

    components: dict = {}

    def __init__(self, value: float = 0.5):
        self.value, self.seen = value, []

    def set_progress_bar_config(self, **words):
        pass

    def __call__(self, prompt, height, width, num_inference_steps, guidance_scale, generator, output_type):
        self.seen.append((prompt, height, width, num_inference_steps, guidance_scale, output_type))
        if width > 96:
            raise ValueError("width 128 is too wide for me")
        return type("Images", (), {"images": np.full((1, height, width, 3), self.value, np.float32)})


def test_any_text_to_image_pipeline_will_do(folder: Path):
    own = ReducioPipeline.from_pretrained(folder, text_to_image=OtherDrawer())
    out = own(PROMPT, width=96, output_type="latent", **FAST)
    assert own.text_to_image.seen == [(PROMPT, 64, 96, 20, 4.5, "np")]
    assert (out.content == 128).all() and out.content.shape == (64, 96, 3)
    with pytest.raises(ReducioError, match="content frame: OtherDrawer: width 128 is too wide for me"):
        own(PROMPT, width=128, **FAST)
    own.text_to_image.value = np.nan
    with pytest.raises(ReducioError, match="content frame of .*: the text-to-image stage returned values that are not"):
        own(PROMPT, **FAST)


# ---- progress and callbacks ------------------------------------------------------------------------------------------


def test_callback_sees_every_step_and_may_replace(pipe: ReducioPipeline, clip):
    seen = []

    def watch(own, step, timestep, tensors):
        seen.append((own is pipe, step, int(timestep), tensors["latents"].shape))

    assert np.array_equal(pipe(PROMPT, seed=3, callback_on_step_end=watch, **FAST).frames, clip.frames)
    assert [s[:2] for s in seen] == [(True, 0), (True, 1)] and seen[0][2] > seen[1][2] and seen[0][3] == (1, *SHAPE)

    def replace(own, step, timestep, tensors):
        return {"latents": torch.full((1, *SHAPE), 0.5)}

    out = pipe(PROMPT, seed=3, callback_on_step_end=replace, output_type="latent", **FAST)
    assert (out.frames == 0.5).all()
    for wrong, message in (
        (torch.zeros(1, 2), r"has shape \[1, 2\]"),
        (torch.full((1, *SHAPE), torch.nan), "not finite"),
    ):
        with pytest.raises(ReducioError, match=f"callback_on_step_end: latents: .*{message}"):
            pipe(PROMPT, callback_on_step_end=lambda p, s, t, x, wrong=wrong: {"latents": wrong}, **FAST)


def test_callback_may_stop_the_call(pipe: ReducioPipeline, clip):
    seen = []

    def stop(own, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        own._interrupt = True
        return {"latents": tensors["latents"] * 2}

    out = pipe([PROMPT, PROMPT], seed=3, callback_on_step_end=stop, output_type="latent", **FAST)
    assert len(seen) == 1 and out.interrupted and out.seeds == [3] and out.frames.shape == (1, *SHAPE)
    assert torch.equal(out.frames, seen[0] * 2)
    assert np.array_equal(pipe(PROMPT, seed=3, **FAST).frames, clip.frames), "the next call starts afresh"


def test_progress_bar(pipe: ReducioPipeline, capsys: pytest.CaptureFixture[str]):
    pipe(PROMPT, num_inference_steps=2, progress=True)
    shown = capsys.readouterr().err
    assert "dit.step" in shown and "2/2" in shown and "content.generate" in shown
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe(PROMPT, np.zeros((8, 8, 3), np.uint8), num_inference_steps=2)
    finally:
        pipe.set_progress_bar_config()
    pipe(PROMPT, **FAST)
    assert capsys.readouterr().err == ""


# ---- saving the clip -------------------------------------------------------------------------------------------------


def test_save(pipe: ReducioPipeline, clip, tmp_path: Path):
    folder = clip.save(tmp_path / "frames")
    assert np.array_equal(np.asarray(Image.open(sorted(folder.iterdir())[5])), clip.frames[5])
    assert clip.timings.pop("video.write") > 0
    many = pipe([PROMPT, PROMPT], seed=3, output_type="pt", **FAST)
    paths = many.save(tmp_path / "clip.gif")
    assert [p.name for p in paths] == ["clip-0.gif", "clip-1.gif"] and all(p.stat().st_size > 1000 for p in paths)
    exact = pipe(PROMPT, seed=3, output_type="pil", **FAST).save(tmp_path / "pil")
    assert np.array_equal(np.asarray(Image.open(sorted(exact.iterdir())[5])), clip.frames[5])
    with pytest.raises(ReducioError, match="output_type='latent' holds no frames"):
        pipe(PROMPT, output_type="latent", **FAST).save(tmp_path / "clip.gif")
    with pytest.raises(ReducioError, match="does not exist"):
        clip.save(tmp_path / "nowhere" / "clip.gif")


# ---- what bad input gets ---------------------------------------------------------------------------------------------

NAN = torch.full(SHAPE, torch.nan)
BAD_CALLS = {
    "empty prompt": ({"prompt": "  "}, "prompt: is empty"),
    "empty list": ({"prompt": []}, "prompt: must be text or a list of texts, is list"),
    "empty item": ({"prompt": ["a", ""]}, "prompt number 1: is empty"),
    "number for a prompt": ({"prompt": 7}, "prompt: must be text .* is int 7"),
    "negatives": ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 texts for 1 prompts"),
    "negative number": ({"negative_prompt": 1}, "negative_prompt: must be text"),
    "height": ({"height": 100}, "height: 100 is not a multiple of 32; the two nearest legal sizes are 96 and 128"),
    "small width": ({"width": 20}, "width: 20 is not a multiple of 32; the two nearest legal sizes are 32 and 64"),
    "negative width": ({"width": -64}, "width: must be a positive multiple of 32, is -64"),
    "fraction": ({"height": 64.0}, "height: must be a positive multiple of 32, is 64.0"),
    "frames": ({"num_frames": 24}, "num_frames: 24 asked for, this model makes clips of 16 frames"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps: must be a whole number from 1 to 1000, is 0"),
    "many steps": ({"num_inference_steps": 1001}, "from 1 to 1000, is 1001"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale: must be a finite number of at least 0, is nan"),
    "seed": ({"seed": -1}, "seed: must be a whole number from 0 to .*, is -1"),
    "generators": ({"prompt": ["a", "b"], "generator": torch.Generator()}, "generator: 1 given for 2 clips"),
    "generator": ({"generator": 5}, "generator: must be a torch.Generator or a list of them, is int 5"),
    "latents": ({"latents": NAN}, r"latents: holds values that are not finite \(NaN or infinite\)"),
    "latent shape": ({"latents": torch.zeros(1, 16, 4, 4, 4)}, r"has shape \[1, 16, 4, 4, 4\], .* \[1, 16, 4, 2, 2\]"),
    "integer latents": ({"latents": torch.zeros(SHAPE).int()}, "latents: must be a floating-point tensor"),
    "output type": ({"output_type": "mp4"}, "output_type: must be one of np, pil, pt, latent, is 'mp4'"),
    "callback": ({"callback_on_step_end": 3}, "callback_on_step_end: must be callable, is int 3"),
}


@pytest.mark.parametrize(("words", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_call(pipe: ReducioPipeline, words: dict, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipe, "text_to_image", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(ReducioError, match=message) as caught:
        pipe(**({"prompt": PROMPT} | FAST | words))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"backend": "triton"}, "backend: must be one of reference, fast, auto, is 'triton'"),
        ({"dtype": "int8"}, "dtype: must be one of float32, float16, bfloat16, is 'int8'"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "dtype=float32 and torch_dtype=float16 differ"),
        ({"device": "gpu"}, "device: 'gpu' cannot be used here"),
    ],
)
def test_bad_setting(folder: Path, words: dict, message: str):
    with pytest.raises(ReducioError, match=message):
        ReducioPipeline.from_pretrained(folder, **words)


def test_backend_is_reported(pipe: ReducioPipeline, folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert pipe.backend == "fast"
    assert pipe.report == dict.fromkeys(("transformer", "vae"), "fast: the best there is")
    asked = ReducioPipeline.from_pretrained(folder, backend="reference")
    assert asked.report == dict.fromkeys(("transformer", "vae"), "reference: asked for")
    monkeypatch.setattr("triton.__version__", "3.5.1")
    old = ReducioPipeline.from_pretrained(folder)
    assert old.backend == "reference" and "Triton is 3.5.1, the kernels need 3.6" in old.report["vae"]
    with pytest.raises(ReducioError, match="backend: 'fast' cannot run here: Triton is 3.5.1"):
        ReducioPipeline.from_pretrained(folder, backend="fast")


def test_values_that_stop_being_finite_are_named(folder: Path):
    broken = ReducioPipeline.from_pretrained(folder)
    broken.vae.decoder.conv_out.weight = nn.Parameter(broken.vae.decoder.conv_out.weight * torch.inf)
    with pytest.raises(ReducioError, match="vae.decode: the clip has values that are not finite"):
        broken(PROMPT, **FAST)
    broken.transformer.proj_out.bias = nn.Parameter(broken.transformer.proj_out.bias * torch.nan)
    with pytest.raises(ReducioError, match="sampling: the latent is not finite .* from step 1 of 2"):
        broken(PROMPT, **FAST)


def test_bad_decode(pipe: ReducioPipeline, clip):
    for latents, image, message in (
        (NAN, clip.content, "not finite"),
        (torch.zeros(3), clip.content, r"latents: has shape \[3\]"),
        (torch.zeros(2, *SHAPE), [clip.content], "image: 1 given for 2"),
        (torch.zeros(SHAPE), None, "image: None given"),
    ):
        with pytest.raises(ReducioError, match=message):
            pipe.decode(latents, image)
    with pytest.raises(ReducioError, match="output_type: must be one of np, pil, pt"):
        pipe.decode(torch.zeros(SHAPE), clip.content, output_type="latent")


# ---- broken folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vae", "transformer", "text_encoder", "image_encoder", "content_encoder", "text_to_image/transformer"]
)
def test_damaged_weights_are_named(copy: Path, name: str):
    file = next((copy / name).glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ReducioError, match=f"{file}: truncated, has {len(content) - 100} bytes .* {len(content)}"):
        ReducioPipeline.from_pretrained(copy)
    file.unlink()
    torch.save({}, file.with_name("weights.bin"))
    with pytest.raises(ReducioError, match=f"{file.parent}: holds the pickle weights.bin and no safetensors"):
        ReducioPipeline.from_pretrained(copy)
    shutil.rmtree(file.parent)
    with pytest.raises(ReducioError, match="no such|shares no component"):
        ReducioPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    "name", ["vae", "transformer", "text_encoder", "image_encoder", "content_encoder", "text_to_image/transformer"]
)
def test_foreign_weights_are_listed(copy: Path, name: str):
    from safetensors.torch import load_file, save_file

    file = next((copy / name).glob("*.safetensors"))
    tensors = load_file(file)
    dropped = next(n for n in tensors if n.endswith("weight"))
    tensors["one.too.many"] = tensors.pop(dropped)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ReducioError) as caught:
        ReducioPipeline.from_pretrained(copy)
    message = str(caught.value)
    assert (
        str(file.parent) in message and f"1 missing: {dropped}" in message and "1 unexpected: one.too.many" in message
    )


def test_bad_index(copy: Path, tmp_path: Path):
    path = copy / "model_index.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"_class_name": "WanPipeline"}, "is of a WanPipeline, not of a ReducioPipeline"),
        ({"unet": ["diffusers", "UNet"]}, "unknown unet; known are vae"),
        ({"vae": None}, "vae is missing"),
        ({"scheduler": "DPM"}, r"scheduler must be \[library, class\], is 'DPM'"),
        ({"scheduler": ["os", "system"]}, "is of library 'os'; known are diffusers, transformers"),
        ({"scheduler": ["diffusers", "NoScheduler"]}, "is a NoScheduler, which diffusers .* does not have"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ReducioError, match=message):
            ReducioPipeline.from_pretrained(copy)
    path.write_text("{")
    with pytest.raises(ReducioError, match="model_index.json: not readable as JSON"):
        ReducioPipeline.from_pretrained(copy)
    path.unlink()
    with pytest.raises(ReducioError, match="model_index.json: no such file"):
        ReducioPipeline.from_pretrained(copy)


def test_the_first_stage_needs_what_it_cannot_share(copy: Path):
    path = copy / "text_to_image" / "model_index.json"
    good = json.loads(path.read_text())
    shutil.rmtree(copy / "text_to_image" / "scheduler")
    with pytest.raises(
        ReducioError, match="scheduler has no folder here and the model shares no component of that name"
    ):
        ReducioPipeline.from_pretrained(copy)
    path.write_text(json.dumps(good | {"_class_name": "NoPipeline"}))
    with pytest.raises(ReducioError, match="names the pipeline 'NoPipeline', which diffusers does not have"):
        ReducioPipeline.from_pretrained(copy)
    path.write_text(json.dumps(good | {"scheduler": [None, None], "unet": [None, None]}))
    with pytest.raises(ReducioError, match="PixArtAlphaPipeline cannot be built"):
        ReducioPipeline.from_pretrained(copy)
