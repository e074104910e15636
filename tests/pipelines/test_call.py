"""What a call returns: the forms of a clip, lists, seeds, latents, guidance, saved files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reducio_fast import ReducioPipeline
from reducio_fast.pipelines.call.output import ByteFrames
from reducio_fast.pipelines.reducio.encoders import ContentEncoder, TextEncoder
from reducio_fast.system.errors import ReducioError

PROMPT = "a red circle moving right"
FAST = {"num_inference_steps": 2, "progress": False}
SHAPE = (16, 4, 2, 2)  # motion latent of a 64x64 clip


def test_output(clip, pipe: ReducioPipeline):
    assert clip.frames.shape == (16, 64, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.content.shape == (64, 64, 3) and clip.content.dtype == np.uint8
    assert (clip.seed, clip.seeds, clip.fps, clip.interrupted) == (3, [3], 12, False)
    assert list(clip.timings) == ["content.generate", "text.encode", "image.encode", "dit.step", "vae.decode"]
    assert all(seconds > 0 for seconds in clip.timings.values())
    assert clip.frames.std() > 1, "the fixture must not draw blank clips, or equality shows nothing"
    assert not np.array_equal(clip.frames, pipe(PROMPT, seed=4, **FAST).frames)
    assert not np.array_equal(clip.frames, pipe("a blue star", clip.content, seed=3, **FAST).frames)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_reference_networks_make_the_clip(folder: Path):
    """Repeats the whole second stage step by step from its parts."""
    from reducio_fast.reference import Condition, initial_latent, sample

    pipe = ReducioPipeline.from_pretrained(folder, device="cpu", backend="reference")

    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    text, mask = TextEncoder(pipe.text_encoder, pipe.tokenizer, 40)([PROMPT])
    posterior = pipe.content_encoder.encode(pixels).latent_dist
    assert torch.equal(ContentEncoder(pipe.content_encoder)(pixels), posterior.mode())
    cond = Condition(text, mask, pipe.image_encoder(pixels), posterior.mode())
    denoise = pipe.transformer.denoiser(cond, guidance_scale=4.5)
    latent = sample(denoise, pipe.scheduler, initial_latent((1, *SHAPE), [5]), 2)
    video = pipe.vae.decode(latent, pipe.vae.encode_content(pixels))[0].clamp(-1, 1)
    frames = ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert np.array_equal(pipe(PROMPT, image, seed=5, **FAST).frames, frames)


def test_above_a_tile_the_decoder_works_in_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch):
    pipe, seen = ReducioPipeline.from_pretrained(folder, device="cpu", backend="reference"), []
    monkeypatch.setattr(pipe.vae, "decode", lambda z, f, tiled: seen.append(tiled) or torch.zeros(1, 3, 16, 32, 352))
    for width in (320, 352):
        pipe(PROMPT, Image.new("RGB", (width, 32)), height=32, width=width, **FAST)
    assert seen == [False, True]
    pipe.disable_vae_tiling()
    pipe.decode(torch.zeros(16, 4, 1, 11), Image.new("RGB", (352, 32)))
    assert seen == [False, True, False], "not in the way of the call before"


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_guidance(pipe: ReducioPipeline, clip):
    def frames(**kwargs):
        return pipe(PROMPT, clip.content, seed=3, **kwargs, **FAST).frames

    assert np.array_equal(frames(negative_prompt=""), clip.frames), "no negative prompt is the null text"
    assert not np.array_equal(frames(negative_prompt="noise"), clip.frames)
    assert not np.array_equal(frames(guidance_scale=1), clip.frames)
    assert np.array_equal(frames(guidance_scale=1), frames(guidance_scale=1, negative_prompt="noise"))
    # A negative prompt equal to the prompt cancels: guidance then adds nothing (up to rounding in the batch of two).
    same = frames(negative_prompt=PROMPT).astype(int)
    assert np.abs(same - frames(guidance_scale=0)).max() <= 1


@pytest.mark.slow
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


def test_backend_is_reported(pipe: ReducioPipeline, folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert pipe.backend == "fast"
    assert list(pipe.report) == ["transformer", "vae", "text_to_image"]
    assert all(pipe.report[name].startswith("fast: the best there is; in ") for name in ("transformer", "vae"))
    assert pipe.report["text_to_image"] == "fast: its transformer and decoder run as twins"
    reference = ReducioPipeline.from_pretrained(folder, backend="reference")
    lines = dict.fromkeys(("transformer", "vae"), "reference: asked for")
    assert reference.report == lines | {"text_to_image": "diffusers: the networks run on the reference"}
    monkeypatch.setattr("triton.__version__", "3.5.1")
    old = ReducioPipeline.from_pretrained(folder)
    assert old.backend == "reference" and "Triton is 3.5.1, the kernels need 3.6" in old.report["vae"]
    with pytest.raises(ReducioError, match="backend: 'fast' cannot run here: Triton is 3.5.1"):
        ReducioPipeline.from_pretrained(folder, backend="fast")


@pytest.mark.slow
def test_several_clips_of_a_prompt(pipe: ReducioPipeline, clip):
    many = pipe([PROMPT, "a blue star growing"], seed=3, num_videos_per_prompt=2, negative_prompt=["", "noise"], **FAST)
    assert many.seeds == [3, 4, 5, 6] and np.array_equal(many.frames[0], clip.frames)
    alone = pipe("a blue star growing", seed=5, negative_prompt="noise", num_videos_per_prompt=1, **FAST)
    assert np.array_equal(many.frames[2], alone.frames)
    assert not np.array_equal(many.frames[1], many.frames[0]) and not np.array_equal(many.frames[3], many.frames[2])
    images = [clip.content, clip.content[::-1]]
    pair = pipe([PROMPT] * 2, images, num_videos_per_prompt=2, seed=3, output_type="latent", **FAST)
    assert [np.array_equal(c, clip.content) for c in pair.content] == [True, True, False, False]
    single_prompt = pipe(PROMPT, num_videos_per_prompt=2, latents=torch.zeros(2, *SHAPE), output_type="latent", **FAST)
    assert single_prompt.frames.shape == (2, *SHAPE), "more than one clip of a single prompt is a list"


def test_the_words_of_diffusers(pipe: ReducioPipeline, clip):
    assert np.array_equal(pipe(PROMPT, seed=3, return_dict=False, **FAST)[0], clip.frames)
    assert (pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps) == (4.5, True, 2)
    pipe(PROMPT, clip.content, guidance_scale=1, output_type="latent", **FAST)
    assert (pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.current_timestep) == (1, False, None)
    other = ReducioPipeline(**pipe.components, sample_height=64, sample_width=64)
    assert other.vae is pipe.vae and np.array_equal(other(PROMPT, seed=3, **FAST).frames, clip.frames)
    assert (other.guidance_scale, other.do_classifier_free_guidance, other.num_timesteps) == (4.5, True, 2)


def test_to_takes_a_device_and_a_dtype_in_diffusers_ways(folder: Path):
    pipe = ReducioPipeline.from_pretrained(folder, device="cpu", text_to_image=None)
    assert pipe.to(torch.float16) is pipe and pipe.dtype == torch.float16
    assert pipe.to("cpu", torch.bfloat16).dtype == torch.bfloat16 and pipe.to(dtype="float32").dtype == torch.float32
    with pytest.raises(ReducioError, match=r"to: two dtypes given, torch.float16 and torch.float32"):
        pipe.to(torch.float16, torch.float32)
    with pytest.raises(ReducioError, match="dtype: must be one of float32, float16, bfloat16, is torch.int8"):
        pipe.to(torch.int8)


@pytest.mark.slow
def test_tiling_can_be_asked_for_and_switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch):
    pipe, seen = ReducioPipeline.from_pretrained(folder, device="cpu", backend="reference"), []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, f, tiled: seen.append(tiled) or decode(z, f, tiled=tiled))
    latent, image = torch.zeros(16, 4, 1, 11), np.zeros((32, 352, 3), np.uint8)
    automatic = pipe.decode(latent, image)
    pipe.enable_vae_tiling()
    assert np.array_equal(pipe.decode(latent, image), automatic)
    assert pipe.decode(latent[..., :2], image[:, :64]).shape == (16, 32, 64, 3)
    pipe.disable_vae_tiling()
    whole = pipe.decode(latent, image)
    assert seen == [True, True, True, False] and not np.array_equal(whole, automatic)


@pytest.mark.parametrize("output_type", ["np", "pil", "pt"])
@pytest.mark.slow
def test_frames_go_through_export_to_video_of_diffusers(pipe: ReducioPipeline, clip, output_type: str, tmp_path: Path):
    """diffusers writes what a call returns; read back, it is the clip up to the codec's loss."""
    from diffusers.utils import export_to_video

    from reducio_fast.media.video_files import read_video

    out = pipe([PROMPT], clip.content, seed=3, output_type=output_type, **FAST)
    floats = out.as_float()
    assert floats.dtype == np.float32 and floats.shape == (1, 16, 64, 64, 3)
    assert np.array_equal((floats[0] * 255).round().astype(np.uint8), clip.frames)
    path = export_to_video(out.frames[0] if output_type == "pil" else floats[0], str(tmp_path / "clip.mp4"), fps=12)
    frames, fps = read_video(path)
    assert fps == 12 and frames.shape == clip.frames.shape
    error = np.abs(frames.astype(int) - clip.frames).mean()
    assert error < np.abs(frames.astype(int) - clip.frames[::-1]).mean() and error < 12, error


def test_numbers_computed_from_frames_are_plain() -> None:
    frames = np.arange(48, dtype=np.uint8).reshape(4, 2, 2, 3).view(ByteFrames)
    assert type(frames.mean()) is np.float64 and round(frames.mean(), 1) == 23.5
    assert type(frames / 255) is type(frames.sum(0)) is np.ndarray and type(frames[0]) is ByteFrames
    with pytest.raises(ReducioError, match="are bytes from 0 to 255 already"):
        frames * 255
