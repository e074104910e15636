"""Clips of Stable Video Diffusion that are longer than the model's, previews, loops, contact sheets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reducio_fast.pipelines.svd.pipeline import SVDPipeline
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow

SIZE = {"height": 32, "width": 32, "num_inference_steps": 2, "progress": False, "seed": 3}


def latents_of(pipe: SVDPipeline, **kwargs: Any) -> tuple[list[torch.Tensor], np.ndarray]:
    """The latents that the decoder received, one per clip, and the frames of the call."""
    seen, decode = [], pipe.decoder.decode

    def watch(latent: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(latent.clone())
        return decode(latent, *args)

    pipe.decoder.decode = watch
    try:
        frames = pipe(**kwargs).frames
    finally:
        del pipe.decoder.decode
    return seen, frames


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_each_clip_begins_with_the_end_of_the_last(pipe: SVDPipeline, fast: SVDPipeline, picture: Any, backend: str):
    ours = {"reference": pipe, "fast": fast}[backend]
    length, overlap = ours.unet.config.num_frames, 2
    num_frames = length + (length - overlap)
    kwargs = SIZE | {"num_frames": num_frames, "overlap": overlap}
    (before, after), frames = latents_of(ours, image=picture, **kwargs)
    assert before.shape[1] == after.shape[1] == length and frames.shape == (num_frames, 32, 32, 3)
    assert torch.equal(after[:, :overlap], before[:, -overlap:]) and not torch.equal(after[:, overlap], before[:, -1])
    first = ours.stream(image=picture, **kwargs)
    assert np.array_equal(np.stack([next(first) for _ in range(length - overlap)]), frames[: length - overlap])


def test_previews_loops_and_sheets(pipe: SVDPipeline, picture: Any):
    seen = []
    kwargs = SIZE | {"num_frames": 4}
    out = pipe(
        picture, callback_on_step_end=lambda p, s, t, x: seen.append(x["frames"]), preview_every=2, loop=True, **kwargs
    )
    assert seen[0] is None and seen[1].shape == (4, 32, 32, 3) and out.frames.shape == (6, 32, 32, 3)
    assert np.abs(seen[1].astype(int) - out.frames[:4]).max() <= 1, "the last step ends on its data prediction"
    assert pipe(picture, num_videos_per_prompt=2, **kwargs).grid().shape == (4, 32, 64, 3)


def test_what_does_not_fit(pipe: SVDPipeline, picture: Any):
    length = pipe.unet.config.num_frames
    for kwargs, message in (
        ({"overlap": 0}, "overlap: must be a whole number from 1 to"),
        ({"overlap": length}, f"overlap: must be a whole number from 1 to {length - 1}, is {length}"),
        ({"overlap": 1, "num_frames": length + 1}, f"the two nearest are {length} and {2 * length - 1}"),
        ({"preview_every": 1}, "preview_every: given without callback_on_step_end"),
        ({"loop": 1}, "loop: must be True or False"),
    ):
        with pytest.raises(ReducioError, match=message):
            pipe(picture, **SIZE, **kwargs)


def test_warm_up_makes_a_clip_of_the_model_s_own_size(fast: SVDPipeline, monkeypatch: pytest.MonkeyPatch):
    """The warm-up passes no prompt, since these weights read none, and no number of frames."""
    monkeypatch.setattr(fast, "sample_height", 32)  # the published 576x1024 take more than five minutes on one core
    monkeypatch.setattr(fast, "sample_width", 64)
    for sizes, size in ((None, (32, 64)), ([(64, 32)], (64, 32))):
        assert fast.warmup(sizes, progress=False).complete
        assert fast.call is not None and (fast.call.request.height, fast.call.request.width) == size
