"""Bad input raises an error of one line that names the argument and both values, before any work starts."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints import convert
from reducio_fast.checkpoints.networks import load_model
from reducio_fast.data.curation import curate, manifest
from reducio_fast.pipelines.reducio import encoders
from reducio_fast.reference import ReducioVAE, VAEConfig
from reducio_fast.server import batch
from reducio_fast.system.errors import ReducioError

PROMPT = "a red circle moving right"
FAST = {"num_inference_steps": 2, "progress": False}
SHAPE = (16, 4, 2, 2)  # motion latent of a 64x64 clip


NAN = torch.full(SHAPE, torch.nan)
BAD_CALLS = {
    "empty prompt": ({"prompt": "  "}, "prompt: is empty"),
    "empty list": ({"prompt": []}, "prompt: must be text or a list of texts, is list"),
    "empty item": ({"prompt": ["a", ""]}, "prompt number 1: is empty"),
    "number for a prompt": ({"prompt": 7}, "prompt: must be text .* is int 7"),
    "half a character": (
        {"prompt": "a \udcff star"},
        r"prompt: holds '\\udcff', which is no character; is str 'a .* star'",
    ),
    "half a negative": ({"negative_prompt": "\ud800"}, r"negative_prompt: holds '\\ud800', which is no character"),
    "negatives": ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 texts for 1 prompts"),
    "negative number": ({"negative_prompt": 1}, "negative_prompt: must be text"),
    "height": ({"height": 100}, "height: 100 is not a multiple of 32; the two nearest legal sizes are 96 and 128"),
    "small width": ({"width": 20}, "width: 20 is not a multiple of 32; the two nearest legal sizes are 32 and 64"),
    "negative width": ({"width": -64}, "width: must be a positive multiple of 32, is -64"),
    "fraction": ({"height": 64.0}, "height: must be a positive multiple of 32, is 64.0"),
    "frames": (
        {"num_frames": 25},
        "num_frames: 25 is not reached by clips of 16 frames that overlap; the two nearest are 24 and 32",
    ),
    "few frames": ({"num_frames": 8}, "num_frames: 8 is not reached .* the two nearest are 16, then 24"),
    "frames both ways": ({"num_frames": 64, "direction": "both"}, "the two nearest are 61 and 69"),
    "a life of frames": ({"num_frames": 10**9}, "num_frames: must be a whole number from 1 to 100000"),
    "half a frame": ({"num_frames": 24.0}, "num_frames: must be a whole number"),
    "direction": ({"direction": "up"}, "direction: must be one of forward, both, is 'up'"),
    "colours": ({"match_colours": 1}, "match_colours: must be True or False, is 1"),
    "frames of latents": ({"num_frames": 24, "output_type": "latent"}, "'latent' is of one clip of the model; num_fr"),
    "strength": ({"motion_strength": 4.5}, "motion_strength: must be a number from 0 to 4, is 4.5"),
    "negative strength": ({"motion_strength": -0.1}, "motion_strength: must be a number from 0 to 4, is -0.1"),
    "no strength": ({"motion_strength": float("nan")}, "motion_strength: must be a number from 0 to 4, is nan"),
    "motion": ({"motion_latents": torch.zeros(16, 4, 2)}, r"motion_latents: must be latents .* are \[16, 4, 2\]"),
    "motion of another size": (
        {"motion_latents": torch.zeros(SHAPE), "height": 96},
        "motion_latents: are of 64x64 pixels, height asks for 96",
    ),
    "motion of another model": (
        {"motion_latents": torch.zeros(16, 2, 2, 2)},
        r"motion_latents: has shape \[1, 16, 2, 2, 2\], this call needs \[1, 16, 4, 2, 2\]",
    ),
    "motion not finite": ({"motion_latents": NAN}, "motion_latents: holds values that are not finite"),
    "motion and noise": (
        {"motion_latents": torch.zeros(SHAPE), "latents": torch.zeros(SHAPE)},
        "latents: initial noise has no use beside motion_latents",
    ),
    "motion and frames": ({"motion_latents": torch.zeros(SHAPE), "num_frames": 24}, "motion_latents: are of 16 frames"),
    "kept": ({"keep_content": "yes"}, "keep_content: must be True or False, is 'yes'"),
    "loop": ({"loop": None}, "loop: must be True or False, is None"),
    "preview for no one": ({"preview_every": 2}, "preview_every: given without callback_on_step_end"),
    "preview": ({"preview_every": 0}, "preview_every: must be a whole number of at least 1, is 0"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps: must be a whole number from 1 to 1000, is 0"),
    "many steps": ({"num_inference_steps": 1001}, "from 1 to 1000, is 1001"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale: must be a finite number of at least 0, is nan"),
    "guidance as a switch": ({"guidance_scale": True}, "guidance_scale: must be a finite number .* is True"),
    "guidance beyond floats": ({"guidance_scale": 10**400}, "guidance_scale: must be a finite number of at least 0"),
    "strength beyond floats": ({"motion_strength": 10**400}, "motion_strength: must be a number from 0 to 4"),
    "cache beyond floats": ({"cache_threshold": 10**400}, "cache_threshold: must be a number of at least 0"),
    "seed": ({"seed": -1}, "seed: must be a whole number from 0 to .*, is -1"),
    "generators": ({"prompt": ["a", "b"], "generator": torch.Generator()}, "generator: 1 given for 2 clips"),
    "generator": ({"generator": 5}, "generator: must be a torch.Generator or a list of them, is int 5"),
    "latents": ({"latents": NAN}, r"latents: holds values that are not finite \(NaN or infinite\)"),
    "latent shape": ({"latents": torch.zeros(1, 16, 4, 4, 4)}, r"has shape \[1, 16, 4, 4, 4\], .* \[1, 16, 4, 2, 2\]"),
    "integer latents": ({"latents": torch.zeros(SHAPE).int()}, "latents: must be a floating-point tensor"),
    "output type": ({"output_type": "mp4"}, "output_type: must be one of np, pil, pt, latent, is 'mp4'"),
    "videos": ({"num_videos_per_prompt": 0}, "num_videos_per_prompt: must be a whole number from 1 to 1000, is 0"),
    "a life of video": (
        {"num_videos_per_prompt": 10**12},
        "num_videos_per_prompt: .* from 1 to 1000, is 1000000000000",
    ),
    "a wall": ({"height": 32 * 10**12}, "height: 32000000000000 is above the largest side, 16384"),
    "half a video": ({"num_videos_per_prompt": 1.5}, "num_videos_per_prompt: must be a whole number .* is 1.5"),
    "generators of videos": (
        {"num_videos_per_prompt": 3, "generator": [torch.Generator()]},
        "generator: 1 given for 3 clips; give one a clip",
    ),
    "latents of videos": (
        {"num_videos_per_prompt": 2, "latents": torch.zeros(SHAPE)},
        r"latents: has shape \[16, 4, 2, 2\], this call needs \[2, 16, 4, 2, 2\]",
    ),
    "tensor inputs": (
        {"callback_on_step_end_tensor_inputs": ["latents", "noise_pred"]},
        "callback_on_step_end_tensor_inputs: unknown noise_pred; "
        "known are latents, prompt_embeds, negative_prompt_embeds",
    ),
    "a name for a list": (
        {"callback_on_step_end_tensor_inputs": "latents"},
        "callback_on_step_end_tensor_inputs: must be a list of names, is str 'latents'",
    ),
    "callback": ({"callback_on_step_end": 3}, "callback_on_step_end: must be callable, is int 3"),
}


@pytest.mark.parametrize(("words", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_call(pipe: ReducioPipeline, words: dict, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipe, "text_to_image", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(ReducioError, match=message) as caught:
        pipe(**({"prompt": PROMPT} | FAST | words))
    assert "\n" not in str(caught.value)


def test_any_real_number_is_a_guidance_scale(pipe: ReducioPipeline):
    for scale in (Fraction(9, 2), np.float32(4.5)):
        request = pipe.check_inputs(prompt=PROMPT, guidance_scale=scale)
        assert (request.guidance_scale, type(request.guidance_scale)) == (4.5, float)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"backend": "triton"}, "backend: must be one of reference, fast, auto, is 'triton'"),
        ({"dtype": "int8"}, "dtype: must be one of float32, float16, bfloat16, is 'int8'"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "dtype=float32 and torch_dtype=float16 differ"),
        ({"device": "gpu"}, "device: 'gpu' cannot be used here"),
        ({"device": "meta"}, "device: 'meta' cannot be used here .its tensors hold no values"),
    ],
)
def test_bad_setting(folder: Path, words: dict, message: str):
    with pytest.raises(ReducioError, match=message):
        ReducioPipeline.from_pretrained(folder, **words)


@pytest.mark.slow
def test_values_that_stop_being_finite_are_named(folder: Path):
    broken = ReducioPipeline.from_pretrained(folder)
    broken.vae.decoder.conv_out.weight = nn.Parameter(broken.vae.decoder.conv_out.weight * torch.inf)
    with pytest.raises(ReducioError, match="vae.decode: the clip has values that are not finite"):
        broken(PROMPT, **FAST)
    broken.transformer.proj_out.bias = nn.Parameter(broken.transformer.proj_out.bias * torch.nan)
    with pytest.raises(ReducioError, match="sampling: the latent is not finite .* from step 1 of 2"):
        broken(PROMPT, **FAST)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"step": 0}, "step: must be a whole number from 1 to 2147483648, is 0"),
        ({"step": -1}, "step: must be a whole number from 1 to 2147483648, is -1"),
        ({"step": "2"}, "step: must be a whole number from 1 to 2147483648, is '2'"),
        ({"start": 1.5}, "start: must be a whole number from 0 to 2147483648, is 1.5"),
        ({"start": -20}, "start: must be a whole number from 0 to 2147483648, is -20"),
        ({"video": "clip.mp4", "start": 1.5}, "start: must be a whole number from 0 to 2147483648, is 1.5"),
        ({"video": np.zeros((40, 0, 64, 3), np.uint8)}, r"motion: must be .*; it is uint8 \[40, 0, 64, 3\]"),
    ],
)
def test_bad_motion(pipe: ReducioPipeline, words: dict, message: str):
    with pytest.raises(ReducioError, match=message):
        pipe.encode_motion(**({"video": np.zeros((40, 64, 64, 3), np.uint8)} | words))


def test_bad_images_and_sizes(pipe: ReducioPipeline):
    with pytest.raises(ReducioError, match="image: the list is empty"):
        pipe.encode_image([])
    for size, message in (
        ((100, 64), "height: 100 is not a multiple of 32"),
        ((0, 64), "height: must be a positive multiple of 32, is 0"),
        (("64", 64), "height: must be a positive multiple of 32, is '64'"),
    ):
        with pytest.raises(ReducioError, match=message):
            pipe.forecast(*size)


def test_tensors_of_no_clip(pipe: ReducioPipeline, clip):
    embeds = {"prompt_embeds": torch.zeros(0, 40, 32), "prompt_attention_mask": torch.ones(0, 40)}
    with pytest.raises(ReducioError, match=r"prompt_embeds: is empty, of shape \[0, 40, 32\]"):
        pipe(**embeds, **FAST)
    with pytest.raises(ReducioError, match="motion_latents: is empty"):
        pipe(image=clip.content, motion_latents=torch.zeros(0, *SHAPE), **FAST)
    with pytest.raises(ReducioError, match=r"semantic_embeds: is empty, of shape \[1, 0, 32\]"):
        pipe(PROMPT, clip.content, semantic_embeds=torch.zeros(0, 32), **FAST)


@pytest.mark.parametrize("timesteps", [5, [None]])
def test_timesteps_that_the_first_stage_cannot_follow(pipe: ReducioPipeline, timesteps: object):
    with pytest.raises(ReducioError, match="content frame: PixArtAlphaPipeline: "):
        pipe(PROMPT, content_kwargs={"timesteps": timesteps}, **FAST)


LONG = "x" * 300  # longer than a name may be on Linux
READERS: dict[str, Callable[[], object]] = {
    "image encoder": lambda: encoders.find_tower(LONG),
    "network": lambda: load_model(ReducioVAE, VAEConfig, LONG),
    "manifest": lambda: manifest.read(LONG),
    "videos": lambda: curate.find_sources([LONG]),
    "export": lambda: convert.export(LONG, "a.ckpt"),
    "clips": lambda: batch.make_clips([{"prompt": "a"}], batch.Settings(out=LONG, worker={}, call={}, suffix=".gif")),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_name_that_is_too_long_is_one_line(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReducioError, match="x{100}.* cannot be (accessed|created) .File name too long"):
        READERS[reader]()


def test_bad_decode(pipe: ReducioPipeline, clip):
    for latents, image, message in (
        (NAN, clip.content, "not finite"),
        (torch.zeros(3), clip.content, r"latents: has shape \[3\]"),
        (torch.zeros(2, *SHAPE), [clip.content], "image: 1 given for 2"),
        (torch.zeros(SHAPE), None, "image: None given"),
        (torch.zeros(0, *SHAPE), clip.content, r"latents: is empty, of shape \[0, 16, 4, 2, 2\]"),
        (torch.zeros(16, 4, 0, 2), clip.content, r"latents: is empty, of shape \[1, 16, 4, 0, 2\]"),
        (torch.zeros(16, 4, 1, 513), clip.content, "width: 16416 is above the largest side, 16384"),
    ):
        with pytest.raises(ReducioError, match=message):
            pipe.decode(latents, image)
    with pytest.raises(ReducioError, match="output_type: must be one of np, pil, pt"):
        pipe.decode(torch.zeros(SHAPE), clip.content, output_type="latent")
