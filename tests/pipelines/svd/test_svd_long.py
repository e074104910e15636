"""Clips of Stable Video Diffusion that are longer than the model's, previews, loops, contact sheets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reducio_fast.pipelines.svd.pipeline import SVDPipeline
from reducio_fast.system.errors import ReducioError

SIZE = {"height": 64, "width": 64, "num_inference_steps": 2, "progress": False, "seed": 3}


def latents_of(pipe: SVDPipeline, picture: Any, **words: Any) -> list[torch.Tensor]:
    """What the decoder was given, clip by clip."""
    seen, decode = [], pipe.decoder.decode

    def watch(latent: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(latent.clone())
        return decode(latent, *rest)

    pipe.decoder.decode = watch
    try:
        pipe(picture, **SIZE, **words)
    finally:
        del pipe.decoder.decode
    return seen


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_each_clip_begins_with_the_end_of_the_last(pipe: SVDPipeline, fast: SVDPipeline, picture: Any, backend: str):
    ours = {"reference": pipe, "fast": fast}[backend]
    length, overlap = ours.unet.config.num_frames, 2
    asked = length + 2 * (length - overlap)
    clips = latents_of(ours, picture, num_frames=asked, overlap=overlap)
    assert [clip.shape[1] for clip in clips] == [length] * 3
    for before, after in zip(clips, clips[1:], strict=False):
        assert torch.equal(after[:, :overlap], before[:, -overlap:])
        assert not torch.equal(after[:, overlap], before[:, -1])
    long = ours(picture, num_frames=asked, overlap=overlap, **SIZE)
    one = ours(picture, num_frames=length, **SIZE)
    assert long.frames.shape == (asked, 64, 64, 3)
    assert np.array_equal(long.frames[: length - overlap], one.frames[: length - overlap])
    words = SIZE | {"image": picture, "num_frames": asked, "overlap": overlap}
    assert np.array_equal(np.stack(list(ours.stream(**words))), long.frames)


def test_previews_loops_and_sheets(pipe: SVDPipeline, picture: Any):
    seen = []
    words = SIZE | {"num_frames": 4}
    out = pipe(
        picture, callback_on_step_end=lambda p, s, t, x: seen.append(x["frames"]), preview_every=2, loop=True, **words
    )
    assert seen[0] is None and seen[1].shape == (4, 64, 64, 3) and out.frames.shape == (6, 64, 64, 3)
    assert np.abs(seen[1].astype(int) - out.frames[:4]).max() <= 1, "the last step ends on its data prediction"
    assert pipe(picture, num_videos_per_prompt=2, **words).grid().shape == (4, 64, 128, 3)


def test_what_does_not_fit(pipe: SVDPipeline, picture: Any):
    length = pipe.unet.config.num_frames
    for words, message in (
        ({"overlap": 0}, "overlap: must be a whole number from 1 to"),
        ({"overlap": length}, f"overlap: must be a whole number from 1 to {length - 1}, is {length}"),
        ({"overlap": 1, "num_frames": length + 1}, f"the two nearest are {length} and {2 * length - 1}"),
        ({"preview_every": 1}, "preview_every: given without callback_on_step_end"),
        ({"loop": 1}, "loop: must be True or False"),
    ):
        with pytest.raises(ReducioError, match=message):
            pipe(picture, **SIZE, **words)
