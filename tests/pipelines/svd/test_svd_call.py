"""Stable Video Diffusion as users call it: against diffusers' own pipeline, from folders, and with what goes wrong."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reducio_fast import ReducioError
from reducio_fast.cli.main import main
from reducio_fast.pipelines.svd.decoder import ClipDecoding
from reducio_fast.pipelines.svd.pipeline import SVDPipeline
from reducio_fast.reference.svd.sampler import align_your_steps
from tiny_svd import CALL, QUIET, same, seeded

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("backend", ["reference", "fast"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_guidance_scale": 1.0},
        {"min_guidance_scale": 2.0, "max_guidance_scale": 5.0, "fps": 12, "motion_bucket_id": 30},
        {"noise_aug_strength": 0.3, "decode_chunk_size": 3},
        {"sigmas": [700.0, 15.9, 1.8, 0.4, 0.0]},
        {"height": 40, "width": 72, "num_frames": 2},
    ],
    ids=["defaults", "no-guidance", "guidance-and-motion", "chunks", "sigmas", "odd-size"],
)
def test_the_clip_is_diffusers(
    pipe: SVDPipeline, fast: SVDPipeline, theirs: Any, picture: Image.Image, arguments: dict, backend: str
):
    call = CALL | arguments
    ours = {"reference": pipe, "fast": fast}[backend](picture, **call, **QUIET, generator=seeded())
    same(ours.frames, theirs(picture, **call, generator=seeded(), output_type="np").frames[0])
    assert ours.fps == call.get("fps", 7) and ours.frames.shape[1:3] == (call["height"], call["width"])


def test_latents_and_clips_of_a_list(pipe: SVDPipeline, theirs: Any, picture: Image.Image):
    pictures = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    both = pipe(pictures, **CALL, **QUIET, generator=[seeded(1), seeded(2)])
    expected = theirs(pictures, **CALL, generator=[seeded(1), seeded(2)], output_type="np").frames
    for ours, clip in zip(both.frames, expected, strict=True):
        same(ours, clip)
    alone = pipe(pictures[1], **CALL, **QUIET, seed=2)
    assert np.array_equal(both.frames[1], alone.frames), "a clip's bytes do not depend on its list"
    latents = torch.randn(1, 4, 4, 16, 16, generator=seeded(7))
    ours = pipe(picture, **CALL, **QUIET, latents=latents, generator=seeded(), output_type="latent").frames
    clip = theirs(picture, **CALL, latents=latents.clone(), generator=seeded(), output_type="latent").frames[0]
    torch.testing.assert_close(ours, clip, rtol=1e-4, atol=1e-4)
    same(
        pipe.decode(ours),
        theirs.decode_latents(clip[None], 4, 4)[0].permute(1, 2, 3, 0).div(2).add(0.5).clamp(0, 1).numpy(),
    )


def test_half_precision_encodes_the_image_in_float32(theirs: Any, picture: Image.Image):
    """As diffusers does under `force_upcast`; the pipeline is unchanged afterwards."""
    half = copy.deepcopy(theirs).to(torch.float16)
    ours = SVDPipeline.from_diffusers(half, backend="reference")
    cond = []
    real = ours.conditioner.encode
    ours.conditioner.encode = lambda image: cond.append(real(image)) or cond[-1]
    out = ours(picture, **CALL | {"num_frames": 2, "num_inference_steps": 1}, **QUIET, seed=1)
    assert cond[0].dtype == torch.float32 and ours.vae.dtype == torch.float16
    assert {p.dtype for p in ours.vae.parameters()} == {torch.float16}
    assert out.frames.dtype == np.uint8 and out.frames.std() > 0


def test_cutting_instead_of_stretching(pipe: SVDPipeline, picture: Image.Image):
    from PIL import ImageOps

    cut = pipe(picture, **CALL, **QUIET, seed=1, image_fit="crop")
    fitted = ImageOps.fit(picture, (32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(cut.content, np.asarray(fitted))
    assert np.array_equal(cut.frames, pipe(fitted, **CALL, **QUIET, seed=1).frames)
    assert not np.array_equal(cut.content, pipe(picture, **CALL, **QUIET, seed=1).content)


def test_from_text_by_way_of_a_picture(pipe: SVDPipeline):
    drawn = []

    class Drawer:
        components: dict[str, Any] = {}

        def __call__(self, prompt, height, width, num_inference_steps=2, generator=None, output_type="np"):
            drawn.append((prompt, height, width))
            image = torch.rand(height, width, 3, generator=generator).numpy()
            return type("Images", (), {"images": [image]})

        def set_progress_bar_config(self, **kwargs: Any) -> None:
            pass

    ours = SVDPipeline(**pipe.components | {"text_to_image": Drawer()}, backend="reference")
    out = ours(prompt=["a cat", "a dog"], **CALL, **QUIET, seed=4)
    assert [prompt for prompt, *_ in drawn] == ["a cat", "a dog"] and out.frames.shape == (2, 4, 32, 32, 3)
    assert "content.generate" in out.timings
    with pytest.raises(ReducioError, match="reads no text; give an image or a prompt"):
        ours(out.content[0], prompt="a cat")


def test_callbacks_and_interruption(pipe: SVDPipeline, picture: Image.Image):
    seen = []

    def watch(owner: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen.append((step, float(timestep), tuple(tensors["latents"].shape)))
        if step == 1:
            owner._interrupt = True
        return {"latents": tensors["latents"] * 0 + 1}

    out = pipe(picture, **CALL, **QUIET, seed=1, callback_on_step_end=watch, output_type="latent")
    assert [s for s, *_ in seen] == [0, 1] and seen[0][2] == (1, 4, 4, 16, 16) and out.interrupted
    assert seen[0][1] == pytest.approx(0.25 * np.log(700), rel=1e-4)
    assert torch.equal(out.frames, torch.ones(4, 4, 16, 16))


def test_a_clip_that_does_not_fit_keeps_its_latents(
    pipe: SVDPipeline, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from reducio_fast.checkpoints import saved_latents

    expected = pipe(picture, **CALL, **QUIET, seed=6, output_type="latent").frames
    pipe.rescue_folder = tmp_path
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.decoder), "decode", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
        with pytest.raises(ReducioError, match="out of memory at 32x32; the latents are kept"):
            pipe(picture, **CALL, **QUIET, seed=6, decode_chunk_size=3)
    pipe.rescue_folder = None
    kept = saved_latents.load(next(tmp_path.glob("*.safetensors")))
    assert kept.pipeline == "StableVideoDiffusionPipeline" and torch.equal(kept.latents[0], expected)
    assert kept.decoding["decode_chunk_size"] == 3
    saved_latents.check_vae("kept.safetensors", kept, pipe.vae)


def test_a_forecast_before_the_first_step(pipe: SVDPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch):
    pipe(picture, **CALL, **QUIET, seed=1)
    few = pipe.forecast(64, 64)
    pipe(picture, **CALL | {"num_frames": 8}, **QUIET, seed=1)
    many = pipe.forecast(64, 64)
    assert many.peak() > 1.5 * few.peak() and {s.stage for s in few.stages} == {
        "image.encode",
        "dit.step",
        "vae.decode",
    }
    monkeypatch.setattr(pipe.fitter, "free_bytes", lambda device: 10_000_000)
    with pytest.raises(ReducioError, match="memory"):
        pipe(picture, **CALL | {"height": 256, "width": 256}, **QUIET, seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "image: None given; Stable Video Diffusion animates an image"),
        ({"prompt": "a cat"}, "prompt: Stable Video Diffusion reads no text"),
        ({"height": 63}, "height: 63 is not a multiple of 2"),
        ({"width": 0}, "width: must be a positive multiple of 2"),
        ({"num_frames": 0}, "num_frames: must be a whole number from 1 to 100000, is 0"),
        ({"num_frames": 10**12}, "num_frames: must be a whole number from 1 to 100000, is 1000000000000"),
        ({"num_frames": 10**20}, "num_frames: must be a whole number from 1 to 100000"),
        (
            {"sigmas": "align-your-steps", "num_inference_steps": 10**12},
            "num_inference_steps: must be a whole number from 1 to 1000, is 1000000000000",
        ),
        ({"sigmas": torch.tensor(5.0)}, "sigmas: must be a list of at least two numbers, is Tensor tensor(5.)"),
        ({"sigmas": np.array(5.0)}, "sigmas: must be a list of at least two numbers, is ndarray"),
        ({"sigmas": torch.ones(3, 2)}, "sigmas: must be a list of at least two numbers, is Tensor"),
        ({"sigmas": [torch.ones(3), torch.zeros(3)]}, "sigmas: must be numbers, are list"),
        ({"sigmas": [10**400, 0.0]}, "sigmas: must be numbers, are list"),
        ({"fps": 10**400}, "fps: must be a finite number of at least 0"),
        ({"motion_bucket_id": 10**400}, "motion_bucket_id: must be a finite number of at least 0"),
        ({"guidance_scale": 10**400}, "guidance_scale: must be a finite number of at least 0"),
        ({"guidance_scale": True}, "guidance_scale: must be a finite number of at least 0, is True"),
        *(
            ({name: 1e39}, f"{name}: must be a finite number of at least 0, is 1e+39, which float32 cannot hold")
            for name in ("guidance_scale", "fps", "motion_bucket_id", "noise_aug_strength")
        ),
        ({"max_guidance_scale": 1e39}, "guidance_scale: must be a finite number of at least 0, is 1e+39"),
        ({"min_guidance_scale": 1e39}, "guidance_scale: must be a finite number of at least 0, is 1e+39"),
        ({"sigmas": [1e39, 0.0]}, "sigmas: must fall from step to step, from a finite float32 to 0 or more"),
        ({"num_inference_steps": 0}, "num_inference_steps: must be a whole number from 1"),
        ({"sigmas": [1.0]}, "sigmas: must be a list of at least two"),
        ({"sigmas": ["a", "b"]}, "sigmas: must be numbers"),
        ({"sigmas": "karras"}, "sigmas: 'karras' is no schedule; known is align-your-steps"),
        ({"sigmas": [1.0, 2.0, 0.0]}, "sigmas: must fall from step to step"),
        ({"sigmas": [float("nan"), 2.0, 0.0]}, "sigmas: must fall from step to step"),
        ({"max_guidance_scale": -1}, "guidance_scale: must be a finite number"),
        ({"fps": 0}, "fps: must be above 0"),
        ({"fps": "7"}, "fps: must be a finite number"),
        ({"fps": True}, "fps: must be a finite number"),
        ({"fps": -7}, "fps: must be a finite number of at least 0, is -7"),
        ({"num_frames": 2.5}, "num_frames: must be a whole number from 1 to 100000, is 2.5"),
        ({"decode_chunk_size": 1.5}, "decode_chunk_size: must be a whole number"),
        ({"height": 2**20}, "height: 1048576 is above the largest side"),
        ({"height": 2, "width": 2}, "height, width: 2x2 with num_frames=4 is too small for the vae"),
        ({"height": 4, "width": 4, "num_frames": 1}, "height, width: 4x4 with num_frames=1 is too small for the unet"),
        ({"image": "no-such.png"}, "no-such.png"),
        ({"image": np.zeros((0, 8, 3), np.uint8)}, "image"),
        ({"image": np.full((8, 8, 3), np.nan, np.float32)}, "image"),
        ({"image": np.full((8, 8, 3), 7.0, np.float32)}, "image"),
        ({"image": [[1, 2], [3, 4]]}, "image"),
        ({"image": torch.full((3, 8, 8), 200.0)}, "image"),
        ({"motion_bucket_id": float("inf")}, "motion_bucket_id: must be a finite number"),
        ({"noise_aug_strength": -0.1}, "noise_aug_strength: must be a finite number"),
        ({"decode_chunk_size": 0}, "decode_chunk_size: must be a whole number"),
        ({"image_fit": "pad"}, "image_fit: must be one of stretch, crop"),
        ({"latents": torch.zeros(1, 4, 3, 16, 16)}, "latents"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "generator: 2 given for 1 clips"),
        ({"image": []}, "image: the list is empty"),
        ({"output_type": "gif"}, "output_type: must be one of"),
    ],
)
def test_mistakes_are_one_line(pipe: SVDPipeline, picture: Image.Image, arguments: dict, message: str, monkeypatch):
    monkeypatch.setattr(pipe, "run", lambda *_: pytest.fail("work began"))
    with pytest.raises(ReducioError) as error:
        pipe(**{"image": picture} | CALL | arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_call_takes_any_real_number(pipe: SVDPipeline, picture: Image.Image, tmp_path: Path):
    numbers = {"fps": np.int64(7), "motion_bucket_id": np.float32(127), "guidance_scale": Fraction(3)}
    call = QUIET | {"height": 16, "width": 16, "num_frames": 2, "num_inference_steps": 1}
    out = pipe(picture, **call, **numbers)
    assert (out.fps, type(out.fps)) == (7, float) and pipe.guidance_scale == 3
    assert np.array_equal(out.frames, pipe(picture, **call).frames)
    assert out.save(tmp_path / "clip.gif").is_file()


def test_a_folder_never_holds_an_adapter_or_a_gap_unnoticed(theirs: Any, tmp_path: Path):
    ours = SVDPipeline.from_diffusers(copy.deepcopy(theirs), backend="reference")
    path = "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q"
    rows, columns = ours.unet.get_submodule(path).weight.shape
    ours.load_lora_weights(
        {f"{path}.lora_A.weight": torch.ones(2, columns), f"{path}.lora_B.weight": torch.ones(rows, 2)}
    )
    with pytest.raises(
        ReducioError, match=r"save_pretrained: the adapters default_0 are active; fuse_lora\(\) to write"
    ):
        ours.save_pretrained(tmp_path / "model")
    ours.unload_lora_weights()
    ours.text_to_image = object()
    ours.unload("text_to_image")
    with pytest.raises(ReducioError, match="save_directory: text_to_image unloaded"):
        ours.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    ours.text_to_image = None


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "8", True])
def test_decoding_checks_its_chunk_as_a_call_does(pipe: SVDPipeline, chunk: Any):
    with pytest.raises(ReducioError, match="decode_chunk_size: must be a whole number of at least 1, is "):
        pipe.decode(torch.zeros(2, 4, 8, 8), decode_chunk_size=chunk)


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_a_chunk_may_be_longer_than_the_clip(pipe: SVDPipeline, fast: SVDPipeline, backend: str):
    chosen = {"reference": pipe, "fast": fast}[backend]
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = chosen.decode(latents, decode_chunk_size=3)
    assert np.array_equal(chosen.decode(latents, decode_chunk_size=2**63), frames)


def test_the_quick_check_counts_all_frames_whatever_the_chunk(pipe: SVDPipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipe.decoder, "frames", 25)
    monkeypatch.setattr(pipe.decoder, "chunk", 1)
    assert pipe.decoder.generous(512, 512) > pipe.forecast(512, 512).peak() > 2**32


def test_what_was_not_trained_is_said(pipe: SVDPipeline, picture: Image.Image, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "reducio_fast"):
        pipe(picture, **CALL | {"num_inference_steps": 1}, **QUIET, fps=60, motion_bucket_id=300)
    messages = "\n".join(caplog.messages)
    assert "num_frames: 4, these weights were made for 25" in messages
    assert "fps: 60, SVD was trained on 5 to 30" in messages and "motion_bucket_id: 300" in messages


def test_a_warm_up_makes_a_clip_of_the_usual_size(folder: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = SVDPipeline.from_pretrained(folder, device="cpu", dtype="float32", backend="fast")
    pipe.sample_height, pipe.sample_width = 32, 64
    pipe.unet.config = dataclasses.replace(pipe.unet.config, num_frames=3)
    made, run = [], pipe.run
    monkeypatch.setattr(pipe, "run", lambda request: made.append(run(request).frames.shape))
    outcome = pipe.warmup(progress=False)
    assert list(outcome.seconds) == ["32x64"] and outcome.complete and made == [(3, 32, 64, 3)]
    with pytest.raises(ReducioError, match="height: 63"):
        pipe.warmup([(63, 64)])


def test_fast_networks_follow_changed_weights(theirs: Any, picture: Image.Image):
    """Weights changed in place, or moved to another dtype, are packed anew before the next clip."""
    ours = SVDPipeline.from_diffusers(copy.deepcopy(theirs), backend="fast")
    assert all("fast" in ours.report[name] for name in ("unet", "vae")), ours.report
    before = ours(picture, **CALL, **QUIET, seed=0).frames
    for network in (ours.unet, ours.vae):
        for parameter in network.parameters():
            parameter.data.mul_(0.9)
    after = ours(picture, **CALL, **QUIET, seed=0).frames
    plain = SVDPipeline(**ours.components, backend="reference")(picture, **CALL, **QUIET, seed=0).frames
    assert np.abs(after.astype(int) - plain).max() <= 2 and not np.array_equal(before, after)
    ours.to(torch.bfloat16)
    half = ours(picture, **CALL, **QUIET, seed=0).frames
    assert half.shape == after.shape and not np.array_equal(half, after)


def test_the_fast_forecast_is_smaller(pipe: SVDPipeline, fast: SVDPipeline):
    """All frames are decoded together, but one frame at a time at full size."""
    plain, streamed = (
        next(stage.activations for stage in p.forecast(512, 512, ClipDecoding(5)).stages if stage.stage == "vae.decode")
        for p in (pipe, fast)
    )
    assert streamed < plain / 2, (streamed, plain)


def test_a_lora_on_temporal_attention(theirs: Any, fast: SVDPipeline, picture: Image.Image):
    """As camera motions are trained: diffusers' pipeline with the product added to its weights makes the same clip."""
    path = "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q"
    generator, merged = seeded(3), copy.deepcopy(theirs)
    weight = merged.unet.get_submodule(path).weight
    down, up = (torch.randn(*shape, generator=generator) for shape in ((2, weight.shape[1]), (weight.shape[0], 2)))
    before = fast(picture, **CALL, **QUIET, generator=seeded()).frames
    fast.load_lora_weights({f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up})
    try:
        assert fast.get_list_adapters() == {"unet": ["default_0"]}
        weight.data += up @ down
        expected = merged(picture, **CALL, generator=seeded(), output_type="np").frames[0]
        same(fast(picture, **CALL, **QUIET, generator=seeded()).frames, expected)
        assert np.abs(before - expected * 255).max() > 2
        with pytest.raises(ReducioError, match=r"components: must be \['unet'\]"):
            fast.fuse_lora(["transformer"])
        fast.fuse_lora()
        fast.unfuse_lora()
    finally:
        fast.unload_lora_weights()
    assert np.array_equal(fast(picture, **CALL, **QUIET, generator=seeded()).frames, before)


def test_align_your_steps(pipe: SVDPipeline, theirs: Any, picture: Image.Image, tmp_path: Path):
    from diffusers.schedulers import AysSchedules

    published = AysSchedules["StableDiffusionVideoSigmas"]
    assert align_your_steps(10) == pytest.approx(published, rel=1e-6)
    for steps in (1, 4, 25):
        sigmas = align_your_steps(steps)
        assert len(sigmas) == steps + 1 and sigmas[0] == pytest.approx(700) and sigmas[-1] == 0
        assert all(before > after for before, after in itertools.pairwise(sigmas))
    call = CALL | {"num_inference_steps": 10}
    expected = theirs(picture, **(call | {"sigmas": published}), generator=seeded(), output_type="np").frames[0]
    same(pipe(picture, **call, **QUIET, sigmas="align-your-steps", generator=seeded()).frames, expected)
    picture.save(tmp_path / "photo.png")
    argv = ["generate", "--model", "svd:random-tiny", "--image", str(tmp_path / "photo.png"), "--device", "cpu"]
    argv += ["--num-inference-steps", "3", "--out", str(tmp_path / "clip.gif"), "--image-fit", "crop"]
    for schedule in ("align-your-steps", "700,15.9,0.4,0"):
        assert main([*argv, "--sigmas", schedule]) == 0
    with pytest.raises(SystemExit, match="2"):
        main([*argv, "--sigmas", "700,many"])
