"""Peers behind our interface: other models run by diffusers, with our seeds, output, timings and errors.

They run with random weights at a tiny size. Their clips are compared with those of diffusers' own pipeline on the
same weights. The published sizes are checked without their weights, by counting parameters on the meta device.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import reducio_fast
from reducio_fast.cli import main
from reducio_fast.cli.bench import comparison_lines
from reducio_fast.measurement import compare_models
from reducio_fast.media.video_files import read_video
from reducio_fast.pipelines import registry
from reducio_fast.pipelines.peers import models, pipeline
from reducio_fast.pipelines.svd.component_table import SCHEDULERS
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right on a black background"
STAGES = {"svd": {"image.encode"}, "ltx": {"text.encode", "image.encode"}, "wan": {"text.encode"}}


@pytest.fixture(scope="module")
def pipes() -> dict[str, pipeline.PeerPipeline]:
    return {name: pipeline.PeerPipeline.from_pretrained(f"{name}:random-tiny", device="cpu") for name in pipeline.PEERS}


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)


def inputs_of(pipe: pipeline.PeerPipeline, picture: np.ndarray) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"num_inference_steps": 2, "progress": False}
    return kwargs | ({"prompt": PROMPT} if pipe.reads_text else {}) | ({"image": picture} if pipe.takes_image else {})


@pytest.mark.parametrize("name", pipeline.PEERS)
def test_output_is_ours(name: str, pipes: dict[str, pipeline.PeerPipeline], picture: np.ndarray) -> None:
    pipe = pipes[name]
    call = pipe.source.defaults
    out = pipe(**inputs_of(pipe, picture), seed=3)
    assert out.frames.shape == (call["num_frames"], call["height"], call["width"], 3)
    assert out.frames.dtype == np.uint8 and out.frames.std() > 1
    assert (out.seed, out.fps, out.interrupted) == (3, call["fps"], False)
    assert set(out.timings) == {"dit.step", "vae.decode"} | STAGES[name]
    assert all(seconds > 0 for seconds in out.timings.values())
    if pipe.takes_image:
        assert out.content.shape == out.frames.shape[1:]
    else:
        assert out.content is None


def test_frames_are_those_of_diffusers(pipes: dict[str, pipeline.PeerPipeline], picture: np.ndarray) -> None:
    pipe = pipes["svd"]
    out = pipe(image=picture, num_inference_steps=2, guidance_scale=2.5, seed=3, progress=False)
    theirs = pipe.pipeline(
        Image.fromarray(out.content), height=32, width=32, num_frames=4, num_inference_steps=2, max_guidance_scale=2.5,
        fps=7, generator=torch.Generator().manual_seed(3), output_type="np",
    ).frames[0]  # fmt: skip
    assert np.array_equal(out.frames, (theirs * 255).round().astype(np.uint8))


@pytest.mark.parametrize(
    "own",
    [{"fps": 12}, {"motion_bucket_id": 20}, {"noise_aug_strength": 0.5}, {"decode_chunk_size": 1},
     {"min_guidance_scale": 2.0, "max_guidance_scale": 5.0}, {"sigmas": [700.0, 5.0, 0.1]}],
    ids=lambda own: next(iter(own)),
)  # fmt: skip
def test_the_peers_own_arguments_reach_it(
    pipes: dict[str, pipeline.PeerPipeline], picture: np.ndarray, own: dict[str, Any]
) -> None:
    pipe, steps = pipes["svd"], 3
    out = pipe(image=picture, num_inference_steps=steps, seed=3, progress=False, **own)
    call = {"height": 32, "width": 32, "num_frames": 4, "num_inference_steps": steps, "fps": 7, "decode_chunk_size": 8}
    theirs = pipe.pipeline(
        Image.fromarray(out.content), generator=torch.Generator().manual_seed(3), output_type="np", **(call | own)
    ).frames[0]
    assert np.array_equal(out.frames, (theirs * 255).round().astype(np.uint8)) and out.fps == own.get("fps", 7)


def test_an_unknown_argument_is_refused_with_the_known_ones(picture: np.ndarray) -> None:
    with pytest.raises(ReducioError, match="motion: no argument of a Stable Video Diffusion model; .*motion_bucket_id"):
        reducio_fast.generate(model="svd:random-tiny", image=picture, motion=3)
    with pytest.raises(ReducioError, match="motion: not a word of the peer ltx; known are "):
        reducio_fast.generate("a cat", model="ltx:random-tiny", image=picture, motion=3)
    with pytest.raises(ReducioError, match="motion_bucket_id: no argument of a Reducio model; known are prompt, image"):
        reducio_fast.generate("a red circle", motion_bucket_id=3)


def test_components_named_beside_random_weights() -> None:
    load = registry.find("svd:random-tiny").load
    call = (torch.float32, torch.device("cpu"), "reference")
    for name in ("euler", "dpm-solver++"):
        pipe = load(*call, scheduler=name, sample_height=32)
        assert type(pipe.scheduler) is type(SCHEDULERS[name]())
        assert pipe.usual_size == (32, 64) and pipe.unet.config.num_frames == 4
    for words, message in (
        ({"scheduler": "nonsense"}, "scheduler: 'nonsense' given; known are euler, dpm"),
        ({"variant": "nonsense"}, "variant: 'nonsense' given; random weights have no files"),
        ({"text_to_image": "/nowhere"}, "text_to_image: '/nowhere'"),
        ({"vae": "elsewhere"}, "vae: 'elsewhere' given; beside random weights only scheduler and text_to_image can be"),
        ({"unet": Path("unet")}, "unet: 'unet' given; beside random weights only"),
        ({"scheduler": None}, "scheduler: None given"),
        ({"unet": 5}, "unet: is a int, must be a VideoUNet"),
    ):
        with pytest.raises(ReducioError, match=message):
            load(*call, **words)


def test_a_clip_does_not_depend_on_its_list(pipes: dict[str, pipeline.PeerPipeline], picture: np.ndarray) -> None:
    pipe, kwargs = pipes["svd"], {"num_inference_steps": 2, "progress": False}
    pictures = [picture, 255 - picture]
    both = pipe(image=pictures, seed=5, **kwargs)
    assert both.seeds == [5, 6] and both.frames.shape[0] == 2 and both.is_list
    alone = pipe(image=pictures[1], seed=6, **kwargs)
    assert np.array_equal(both.frames[1], alone.frames)


def test_output_types(pipes: dict[str, pipeline.PeerPipeline], picture: np.ndarray) -> None:
    pipe = pipes["svd"]
    kwargs = inputs_of(pipe, picture)
    frames = pipe(**kwargs).frames
    pt, latent = pipe(**kwargs, output_type="pt").frames, pipe(**kwargs, output_type="latent").frames
    assert np.array_equal((pt.permute(0, 2, 3, 1) * 255).round().byte().numpy(), frames)
    assert latent.shape == (4, 4, 16, 16)
    assert np.array_equal(np.stack(pipe(**kwargs, output_type="pil").frames), frames)


def test_callback_stops_where_diffusers_can(pipes: dict[str, pipeline.PeerPipeline]) -> None:
    steps = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> None:
        steps.append((step, tensors["latents"].shape))
        pipe._interrupt = True

    out = pipes["wan"](PROMPT, num_inference_steps=3, callback_on_step_end=stop, progress=False)
    assert out.interrupted and [step for step, _ in steps] == [0]


def test_an_error_of_a_callback_passes_on(pipes: dict[str, pipeline.PeerPipeline]) -> None:
    error = KeyError("mine")

    def callback(*_: Any) -> None:
        raise error

    with pytest.raises(KeyError) as caught:
        pipes["wan"](PROMPT, num_inference_steps=1, callback_on_step_end=callback, progress=False)
    assert caught.value is error


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("svd", {"image": None}, "image: None given; Stable Video Diffusion XT animates an image"),
        ("svd", {"prompt": "a cat"}, "prompt: Stable Video Diffusion XT animates an image and reads no text"),
        ("svd", {"height": 50}, "height: 50 is not a multiple of 4; the two nearest legal sizes are 48 and 52"),
        ("svd", {"num_frames": 0}, "num_frames: must be a whole number from 1 to 100000, is 0"),
        ("svd", {"image": []}, "image: the list is empty"),
        ("ltx", {"num_frames": 20}, "num_frames: 20 is not a multiple of 8 plus 1; the two nearest legal counts are"),
        ("ltx", {"width": 100}, "width: 100 is not a multiple of 32"),
        ("ltx", {"prompt": None}, "prompt: must be text"),
        ("ltx", {"frame_rate": 0}, "frame_rate: must be a positive number, is 0"),
        ("ltx", {"frame_rate": "x"}, "frame_rate: must be a positive number, is 'x'"),
        ("ltx", {"latents": 5}, "ltx: "),
        ("ltx", {"guidance_rescale": "x"}, "ltx: "),
        ("wan", {"num_frames": 4}, "4 is not a multiple of 4 plus 1; the two nearest legal counts are 1 and 5"),
        ("wan", {"image": np.zeros((8, 8, 3), np.uint8)}, "image: Wan 2.1 T2V-1.3B makes clips from text alone"),
        ("wan", {"num_inference_steps": 0}, "num_inference_steps: must be a whole number from 1 to 1000, is 0"),
        ("wan", {"guidance_scale": float("nan")}, "guidance_scale"),
        ("wan", {"output_type": "gif"}, "output_type: must be one of np, pil, pt, latent, is 'gif'"),
        ("wan", {"seed": -1}, "seed"),
    ],
)
def test_mistakes(
    name: str, words: dict[str, Any], message: str, pipes: dict[str, pipeline.PeerPipeline], picture: np.ndarray
) -> None:
    with pytest.raises(ReducioError) as error:
        pipes[name](**(inputs_of(pipes[name], picture) | words))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_no_model_is_loaded_without_its_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.PeerPipeline, "from_pretrained", lambda *_: pytest.fail("work began"))
    with pytest.raises(ReducioError, match="prompt: None given; describe the clip"):
        reducio_fast.generate(image=Image.new("RGB", (64, 64)), model=f"{name}:random-tiny")


def test_ltx_folder_of_the_text_pipeline(
    pipes: dict[str, pipeline.PeerPipeline], picture: np.ndarray, tmp_path: Path
) -> None:
    """Its published repository names LTXPipeline; the same components animate an image."""
    pipe = pipes["ltx"]
    models.diffusers_class("LTXPipeline")(**pipe.pipeline.components).save_pretrained(tmp_path / "ltx")
    again = pipeline.PeerPipeline.from_pretrained(tmp_path / "ltx", device="cpu")
    kwargs = inputs_of(pipe, picture) | {"height": 64, "width": 64, "num_frames": 9}
    assert np.array_equal(again(**kwargs).frames, pipe(**kwargs).frames)


def test_models_that_are_not_peers(tmp_path: Path, bundle: Path) -> None:
    assert [pipeline.find(model) for model in (None, bundle, str(bundle), "owner/name", tmp_path)] == [None] * 5
    source = pipeline.find("svd")
    assert source is not None and source.weights == "stabilityai/stable-video-diffusion-img2vid-xt"
    with pytest.raises(ReducioError, match="is no peer; known are svd, ltx, wan"):
        pipeline.PeerPipeline.from_pretrained(bundle)
    with pytest.raises(ReducioError, match="is of a ReducioPipeline, svd takes StableVideoDiffusionPipeline"):
        pipeline.PeerPipeline.from_pretrained(f"svd:{bundle}")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("svd", {"unet": 1.52, "image_encoder": 0.632}),  # OpenCLIP ViT-H-14's image tower
        ("ltx", {"transformer": 1.92, "text_encoder": 4.76}),  # T5 v1.1 XXL's encoder
        ("wan", {"transformer": 1.42, "vae": 0.127}),  # "1.3B"
    ],
)
@torch.no_grad()
def test_published_sizes(name: str, billions: dict[str, float]) -> None:
    """Built on the meta device: the denoiser takes the encoders' outputs, and the VAE takes the denoiser's."""
    meta = torch.device("meta")
    pipe = models.build_random(pipeline.PEERS[name], False, torch.float32, meta)
    for component, size in billions.items():
        count = sum(p.numel() for p in getattr(pipe, component).parameters())
        assert count / 1e9 == pytest.approx(size, rel=0.005), component
    with meta:
        if name == "svd":
            embeds = pipe.image_encoder(torch.zeros(1, 3, 224, 224)).image_embeds[:, None]
            latent = torch.zeros(1, pipe.unet.config.num_frames, 8, 72, 128)
            made = pipe.unet(latent, torch.tensor(1.0), embeds, torch.zeros(1, 3)).sample
            assert made.shape == (1, 25, 4, 72, 128)
            assert pipe.vae.decode(made[0, :8], num_frames=8).sample.shape == (8, 3, 576, 1024)
            return
        text = pipe.text_encoder(torch.zeros(1, 16, dtype=torch.long))[0]
        if name == "ltx":
            tokens, mask = torch.zeros(1, 21 * 16 * 22, 128), torch.ones(1, 16)
            sizes = {"num_frames": 21, "height": 16, "width": 22, "rope_interpolation_scale": (8 / 25, 32, 32)}
            made = pipe.transformer(tokens, text, torch.zeros(1), mask, **sizes).sample
            assert made.shape == tokens.shape
            assert pipe.vae.decode(torch.zeros(1, 128, 21, 16, 22)).sample.shape == (1, 3, 161, 512, 704)
        else:
            latent = torch.zeros(1, 16, 21, 60, 104)
            assert pipe.transformer(latent, torch.zeros(1), text).sample.shape == latent.shape
            assert pipe.vae_scale_factor_temporal * 20 + 1 == 81 and pipe.vae_scale_factor_spatial * 60 == 480


def test_bench_row(picture: np.ndarray) -> None:
    row = compare_models.bench_row(
        "svd:random-tiny", image=picture, repeats=1, device="cpu", num_inference_steps=1, num_frames=2
    )
    assert (row["num_frames"], row["height"], row["width"], row["fps"]) == (2, 32, 32, 7)
    assert row["per_video_second"] == pytest.approx(row["seconds"] * 7 / 2)
    assert row["per_megapixel"] == pytest.approx(row["seconds"] / (2 * 32 * 32 / 1e6))
    assert 0 < sum(row["stages"].values()) <= row["seconds"]
    assert json.loads(json.dumps(row)) == row
    head, line = comparison_lines([row])
    assert "s per video s" in head and line.startswith("svd") and "2x32x32@7" in line


def test_bench_command_with_a_peer(capsys: pytest.CaptureFixture[str]) -> None:
    command = "bench narrow --contenders fast --pairs 1 --no-cold --no-progress --device cpu --json"
    assert main.main([*command.split(), "--peer", "svd:random-tiny"]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)["peers"]
    assert (ours["model"], theirs["model"]) == ("ours, fast", "svd")
    assert ours["per_video_second"] == pytest.approx(ours["seconds"] * 16 / ours["num_frames"])
    assert theirs["per_megapixel"] == pytest.approx(theirs["seconds"] / (4 * 32 * 32 / 1e6))
    assert len(comparison_lines([ours, theirs])) == 3


def test_bench_command_refuses_a_peer_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main("bench narrow --peer sora --device cpu --no-progress".split()) == 2
    assert "'sora' is unknown; known are svd, ltx, wan" in capsys.readouterr().err


@pytest.fixture
def here(tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    Image.fromarray(picture).save(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "generate cat --model ltx:random-tiny --image x.png --out clip.mp4 --num-inference-steps 1"
    assert main.main([*command.split(), "--device", "cpu", "--no-progress", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["config"]["guidance_scale"] == 3.0 and result["config"]["num_inference_steps"] == 1
    frames, fps = read_video(here / "clip.mp4")
    assert frames.shape == (9, 64, 64, 3) and fps == 25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model svd:random-tiny", "image: None given"),
        ("--model svd --image x.png", "hf download stabilityai/stable-video-diffusion-img2vid-xt"),
        ("cat --model ltx:random-tiny --image x.png --backend fast", "backend: 'fast' asked for, but a peer runs"),
        ("--model svd:absent --image x.png", "'absent' is neither a folder nor a hub id"),
        ("", "prompt: None given"),
    ],
)
def test_mistakes_of_the_command(words: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["generate", "--out", "clip.mp4", "--device", "cpu", *words.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (here / "clip.mp4").exists()
