"""Clips from a given first and last frame, with unchanged weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reducio_fast import ReducioError
from reducio_fast.cli.main import main
from reducio_fast.fast.svd.unet import FastVideoUNet
from reducio_fast.pipelines.svd.pipeline import SVDPipeline
from reducio_fast.reference.svd.sampler import EndConditions, ImageCondition
from tiny_networks import plan
from tiny_svd import CALL, QUIET, seeded, unets

pytestmark = pytest.mark.slow

TIME = torch.tensor(0.3)


@pytest.fixture(scope="module")
def ends() -> tuple[ImageCondition, ImageCondition]:
    draw = seeded(2)
    ids = torch.tensor([[6.0, 127.0, 0.02]])
    return tuple(  # type: ignore[return-value]
        ImageCondition(torch.randn(1, 1, 24, generator=draw), torch.randn(1, 4, 4, 4, generator=draw), ids)
        for _ in range(2)
    )


def test_each_end_is_what_its_picture_alone_gives(ends: tuple[ImageCondition, ImageCondition]):
    """At the first frame the prediction is that of the first picture; at the last frame it is that of the last picture
    for the reversed clip; at the middle frame it is their mean."""
    unet, _ = unets(32, 64)
    x, scale = torch.randn(1, 5, 4, 4, 4, generator=seeded(3)), torch.linspace(1, 3, 5)
    both = unet.denoiser(EndConditions(*ends), None, scale)(x, TIME)
    first, last = (unet.denoiser(end, None, scale) for end in ends)
    forwards, backwards = first(x, TIME), last(x.flip(1), TIME).flip(1)
    torch.testing.assert_close(both[:, 0], forwards[:, 0])
    torch.testing.assert_close(both[:, -1], backwards[:, -1])
    torch.testing.assert_close(both[:, 2], (forwards[:, 2] + backwards[:, 2]) / 2)
    assert (both[:, 2] - forwards[:, 2]).abs().max() > 0.01


@pytest.mark.parametrize("fast", [False, True], ids=["reference", "fast"])
def test_turning_everything_round_turns_the_clip_round(ends: tuple[ImageCondition, ImageCondition], fast: bool):
    """Swapped ends and reversed noise give the reversed clip, through all steps of sampling."""
    from reducio_fast import reference
    from reducio_fast.fast import sampler as fast_sampler
    from reducio_fast.pipelines.svd.component_table import euler_scheduler

    network: Any = unets(32, 64)[0]
    network = FastVideoUNet(network, plan()) if fast else network
    sample = fast_sampler.sample if fast else reference.sample
    noise, scale = torch.randn(1, 4, 4, 4, 4, generator=seeded(3)), torch.linspace(1, 3, 4)

    def clip(first: ImageCondition, last: ImageCondition, start: Tensor) -> Tensor:
        return sample(network.denoiser(EndConditions(first, last), None, scale), euler_scheduler(), start, 3)

    forwards, backwards = clip(*ends, noise), clip(*ends[::-1], noise.flip(1))
    torch.testing.assert_close(backwards.flip(1), forwards, rtol=1e-3, atol=1e-3)
    assert (forwards - clip(ends[0], ends[0], noise)).abs().max() > 0.1
    if fast:
        plain = reference.sample(
            unets(32, 64)[0].denoiser(EndConditions(*ends), None, scale), euler_scheduler(), noise, 3
        )
        torch.testing.assert_close(forwards, plain, rtol=1e-3, atol=1e-3)


def test_only_the_last_part_ends_with_the_last_image(
    pipe: SVDPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipe.unet, "config", dataclasses.replace(pipe.unet.config, num_frames=3))
    ends, inputs_of = [], pipe._sampling_inputs

    def watch(clip: Any, *args: Any) -> Any:
        inputs = inputs_of(clip, *args)
        ends.append(isinstance(inputs.cond, EndConditions))
        return inputs

    monkeypatch.setattr(pipe, "_sampling_inputs", watch)
    call = QUIET | {"height": 16, "width": 16, "num_inference_steps": 1, "seed": 1, "overlap": 1}
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    plain = pipe(picture, num_frames=7, **call).frames
    frames = pipe(picture, num_frames=7, last_image=other, **call).frames
    assert ends == [False] * 3 + [False, False, True]
    assert np.array_equal(frames[:4], plain[:4]) and not np.array_equal(frames[5:], plain[5:])
    assert len(pipe(picture, num_frames=3, last_image=other, **call).frames) == 3 and ends[-1], "a single part"


def test_the_call(pipe: SVDPipeline, fast: SVDPipeline, picture: Image.Image, tmp_path: Path):
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    call = CALL | QUIET | {"height": 16, "width": 16, "num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    ours, twins = (p(picture, last_image=other, **call).frames for p in (pipe, fast))
    torch.testing.assert_close(twins, ours, rtol=1e-3, atol=1e-3)
    assert not torch.equal(ours, pipe(picture, **call).frames)
    pair = pipe([picture, other], last_image=[other, picture], **call).frames
    assert torch.equal(pair[0], ours), "a clip's bytes do not depend on its list"
    still = call | {"noise_aug_strength": 0.0, "latents": torch.randn(4, 4, 8, 8, generator=seeded(1))}
    forwards = pipe(picture, last_image=other, **still).frames
    backwards = pipe(other, last_image=picture, **still | {"latents": still["latents"].flip(0)}).frames
    torch.testing.assert_close(backwards.flip(0), forwards, rtol=1e-3, atol=1e-3)
    with pytest.raises(ReducioError, match="last_image: 2 given for 1 images"):
        pipe(picture, last_image=[other, other], **call)
    with pytest.raises(ReducioError, match="no such image file: nowhere.png"):
        pipe(picture, last_image="nowhere.png", **call)
    for name, image in (("a", picture), ("b", other)):
        image.save(tmp_path / f"{name}.png")
    argv = [
        "generate",
        "--model",
        "svd:random-tiny",
        "--image",
        f"{tmp_path}/a.png",
        "--last-image",
        f"{tmp_path}/b.png",
    ]
    assert main([*argv, "--num-inference-steps", "1", "--device", "cpu", "-o", str(tmp_path / "clip.gif")]) == 0
    assert np.asarray(Image.open(tmp_path / "clip.gif").convert("RGB")).shape == (64, 64, 3)
