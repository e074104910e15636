"""Progress, and the callback at the end of each step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reducio_fast import ReducioPipeline
from reducio_fast.system.errors import ReducioError

PROMPT = "a red circle moving right"
FAST = {"num_inference_steps": 2, "progress": False}
SHAPE = (16, 4, 2, 2)  # motion latent of a 64x64 clip


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


def test_callback_gets_the_tensors_it_names(pipe: ReducioPipeline, clip):
    seen = []

    def watch(own, step, timestep, tensors):
        seen.append(tensors)
        assert own.num_timesteps == 2 and torch.equal(own.current_timestep, timestep)
        return dict(tensors)  # diffusers' own examples return the dict they receive

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    kwargs = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": names, **FAST}
    assert np.array_equal(pipe(PROMPT, seed=3, **kwargs).frames, clip.frames)
    assert [list(tensors) for tensors in seen] == [names] * 2
    assert seen[0]["prompt_embeds"].shape == seen[0]["negative_prompt_embeds"].shape == (1, 40, 32)
    pipe(PROMPT, clip.content, guidance_scale=1, output_type="latent", **kwargs)
    assert seen[-1]["negative_prompt_embeds"] is None
    for answer, message in (
        (5, "callback_on_step_end: must return a dict or None, returned a int"),
        ({"prompt_embeds": torch.zeros(1, 40, 32)}, "returned 'prompt_embeds'; only 'latents' can be replaced"),
        ({"latent": torch.zeros(1, *SHAPE)}, "returned 'latent'; only 'latents' can be replaced"),
    ):
        with pytest.raises(ReducioError, match=message):
            pipe(PROMPT, clip.content, callback_on_step_end=lambda p, s, t, x, answer=answer: answer, **FAST)


def test_an_error_in_the_callback_stays_the_users_own(pipe: ReducioPipeline, clip):
    def fails(own, step, timestep, tensors):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$") as caught:
        pipe(PROMPT, clip.content, callback_on_step_end=fails, **FAST)
    assert not isinstance(caught.value, ReducioError)

    def calls_again(own, step, timestep, tensors):
        own(PROMPT, clip.content, **FAST)

    with pytest.raises(ReducioError, match="called the pipeline that called it"):
        pipe(PROMPT, clip.content, callback_on_step_end=calls_again, **FAST)

    def previews(own, step, timestep, tensors):
        shown.append(own.decode(tensors["latents"][0], clip.content))

    shown = []
    assert np.array_equal(pipe(PROMPT, seed=3, callback_on_step_end=previews, **FAST).frames, clip.frames)
    assert np.array_equal(shown[-1], clip.frames) and not np.array_equal(shown[0], clip.frames)


@pytest.mark.slow
def test_threads_take_turns(pipe: ReducioPipeline, clip):
    """One pipeline, four threads: every clip equals one made alone, and a stop ends only the clip of its own call."""
    from concurrent.futures import ThreadPoolExecutor

    def stop(own, step, timestep, tensors):
        own._interrupt = True

    def make(i: int):
        return pipe(PROMPT, seed=3, callback_on_step_end=stop if i % 2 else None, output_type="latent", **FAST)

    whole, stopped = pipe(PROMPT, seed=3, output_type="latent", **FAST), make(1)
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(make, range(6)))
    for i, out in enumerate(made):
        assert out.interrupted == bool(i % 2) and torch.equal(out.frames, (stopped if i % 2 else whole).frames)


def test_encoders_wait_for_the_clip_of_another_thread(pipe: ReducioPipeline, clip):
    """No component that a running clip uses is moved, called or removed."""
    import threading
    from concurrent.futures import ThreadPoolExecutor
    from concurrent.futures import TimeoutError as NotYet

    reached, go_on = threading.Event(), threading.Event()

    def hold(own, step, timestep, tensors):
        reached.set()
        assert go_on.wait(30)

    expected = pipe.encode_prompt(PROMPT)[0], pipe.encode_image(clip.content)[0]
    with ThreadPoolExecutor(3) as threads:
        making = threads.submit(pipe, PROMPT, clip.content, callback_on_step_end=hold, output_type="latent", **FAST)
        assert reached.wait(30)
        others = [threads.submit(pipe.encode_prompt, PROMPT), threads.submit(pipe.encode_image, clip.content)]
        for other in others:
            with pytest.raises(NotYet):
                other.result(0.2)
        go_on.set()
        assert making.result(60).frames.shape
        for other, whole in zip(others, expected, strict=True):
            assert torch.equal(other.result(60)[0], whole)


@pytest.mark.slow
def test_a_model_that_loads_rests_while_another_thread_makes_a_clip(pipe: ReducioPipeline, folder, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from reducio_fast.pipelines.execution import loading

    pauses: list[float] = []
    monkeypatch.setattr(loading.time, "sleep", pauses.append)

    def load() -> ReducioPipeline:
        return ReducioPipeline.from_pretrained(folder, device="cpu", dtype="float32")

    load()
    assert not pauses, "alone it takes no rest"
    with ThreadPoolExecutor(1) as other:
        pipe(PROMPT, callback_on_step_end=lambda *_: other.submit(load).result(60) and None, **FAST)
    slices = loading.Yielding
    assert pauses and all(slices.REST * slices.SLICE < pause <= slices.REST * slices.LONGEST for pause in pauses)


def test_only_the_first_rank_shows_progress(pipe: ReducioPipeline, clip, monkeypatch, capsys):
    for rank, shown in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        pipe(PROMPT, clip.content, num_inference_steps=1, output_type="latent")
        assert ("dit.step" in capsys.readouterr().err) == shown
