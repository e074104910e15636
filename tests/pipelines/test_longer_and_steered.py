"""Clips longer than the model's, more or less motion, motion of another clip, previews and loops, on small random
networks: these tests hold whatever a model has learnt."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from reducio_fast import ReducioPipeline
from reducio_fast.measurement import instruments
from reducio_fast.media.similarity import pooled_psnr
from reducio_fast.media.video_files import write_video
from reducio_fast.pipelines.parallel import agree
from reducio_fast.reference.reducio.preview import PreviewConfig, PreviewDecoder
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow

PROMPT = "a red circle moving right"
FAST = {"num_inference_steps": 2, "progress": False, "seed": 3}
SHAPE = (16, 4, 2, 2)
BACKENDS = ("reference", "fast")


@pytest.fixture(scope="module", params=BACKENDS)
def both(request: pytest.FixtureRequest, folder: Path) -> ReducioPipeline:
    """The same weights on either backend."""
    return ReducioPipeline.from_pretrained(folder, device="cpu", dtype="float32", backend=request.param)


def latents_of(pipe: ReducioPipeline, **kwargs) -> list[torch.Tensor]:
    """The latents that the decoder received, one per clip."""
    seen, decode = [], pipe.decoder.decode

    def watch(latent, *args):
        seen.append(latent.clone())
        return decode(latent, *args)

    pipe.decoder.decode = watch
    try:
        pipe(PROMPT, **FAST, **kwargs)
    finally:
        del pipe.decoder.decode
    return seen


def test_half_of_the_latent_is_carried_over(both: ReducioPipeline):
    first, second, third = latents_of(both, num_frames=32)
    assert torch.equal(second[:, :, :2], first[:, :, 2:]) and torch.equal(third[:, :, :2], second[:, :, 2:])
    assert not torch.equal(second[:, :, 2:], first[:, :, 2:])
    middle, before, after = latents_of(both, num_frames=31, direction="both")
    assert torch.equal(before[:, :, 2:], middle[:, :, :2]) and torch.equal(after[:, :, :2], middle[:, :, 2:])
    assert torch.equal(middle, first)


@pytest.mark.parametrize(("direction", "count", "seams"), [("forward", 32, [7, 15, 23]), ("both", 31, [6, 14, 15, 22])])
def test_a_decoder_that_warps_makes_no_jump_at_a_seam(bundle: Path, direction: str, count: int, seams: list[int]):
    """The embedded model: each further clip holds the shared frames as its own encoder sees them."""
    pipe = ReducioPipeline.from_pretrained(bundle, device="cpu", dtype="float32", backend="fast")
    call = {"num_inference_steps": 8, "progress": False, "seed": 0, "num_frames": count, "direction": direction}
    prompt = "a cyan square moving right slowly on a gray background"
    change = np.abs(np.diff(pipe(prompt, **call).frames.astype(float), axis=0)).mean((1, 2, 3))
    # 1.1 and 1.0 times; with the neighbour's own latent 2.1 and 1.7.
    assert change[seams].mean() < 1.4 * np.delete(change, seams).mean(), change
    still = pipe(prompt, **call | {"motion_strength": 0}).frames.astype(float)
    assert np.abs(np.diff(still, axis=0)).mean() < 0.3 * change.mean()


def test_backends_agree_on_a_long_clip(folder: Path):
    clips = [
        ReducioPipeline.from_pretrained(folder, device="cpu", dtype="float32", backend=backend)(
            PROMPT, num_frames=24, **FAST
        ).frames
        for backend in BACKENDS
    ]
    assert pooled_psnr(*clips) > 45


def test_frames_come_as_they_are_finished(pipe: ReducioPipeline, clip):
    long = pipe(PROMPT, num_frames=40, **FAST)
    assert long.frames.shape == (40, 64, 64, 3) and np.array_equal(long.content, clip.content)
    assert np.array_equal(long.frames[:8], clip.frames[:8]), "those before the overlap are the model's own"
    assert np.array_equal(pipe(PROMPT, num_frames=40, **FAST).frames, long.frames), "same seed, same bytes"
    taken = []
    for frame in pipe.stream(prompt=PROMPT, num_frames=40, **FAST):
        taken.append(frame)
        if len(taken) == 8:  # another call takes its turn between two clips
            assert np.array_equal(pipe(PROMPT, **FAST).frames, clip.frames)
    assert np.array_equal(np.stack(taken), long.frames)
    part = pipe.stream(prompt=PROMPT, num_frames=64, **FAST)
    assert np.array_equal(np.stack([next(part) for _ in range(24)]), long.frames[:24]), "of the longer clip"
    part.close()
    assert np.array_equal(np.stack(list(pipe.stream(prompt=PROMPT, **FAST))), clip.frames)


def test_other_forms_of_a_long_clip(pipe: ReducioPipeline):
    long = pipe(PROMPT, num_frames=24, **FAST).frames
    pictures = pipe(PROMPT, num_frames=24, output_type="pil", **FAST).frames
    assert len(pictures) == 24 and np.array_equal(np.stack([np.asarray(p) for p in pictures]), long)
    floats = pipe(PROMPT, num_frames=24, output_type="pt", **FAST).frames
    assert floats.shape == (24, 3, 64, 64)
    assert np.abs(floats.permute(0, 2, 3, 1).numpy() * 255 - long).max() < 1.01
    two = pipe([PROMPT] * 2, num_frames=24, **FAST)
    assert two.frames.shape == (2, 24, 64, 64, 3) and np.array_equal(two.frames[0], long)
    for wrong, message in (
        ({"prompt": [PROMPT, PROMPT]}, "stream: makes one clip, 2 are asked for"),
        ({"prompt": PROMPT, "loop": True}, "stream: loop=True plays"),
        ({"prompt": PROMPT, "num_frames": 17}, "num_frames: 17 is not reached"),
    ):
        with pytest.raises(ReducioError, match=message):
            pipe.stream(**wrong)


def test_matched_colours_reach_the_next_clip(pipe: ReducioPipeline, monkeypatch: pytest.MonkeyPatch):
    content_frames, encode = [], pipe.conditioner.encode_image

    def watch(frame, embeds):
        content_frames.append(frame)
        return encode(frame, embeds)

    monkeypatch.setattr(pipe.conditioner, "encode_image", watch)
    pipe(PROMPT, num_frames=24, match_colours=True, **FAST)
    first, second = content_frames
    assert not np.array_equal(first, second)
    for statistic in (np.mean, np.std):
        assert np.allclose(statistic(first, (0, 1)), statistic(second, (0, 1)), atol=1.5)


def test_interrupted_long_clip_keeps_what_is_finished(pipe: ReducioPipeline):
    calls = []

    def stop(own, step, timestep, tensors):
        calls.append(step)
        own._interrupt = len(calls) == 5  # in the third clip

    out = pipe(PROMPT, num_frames=64, callback_on_step_end=stop, **FAST)
    assert out.interrupted and np.array_equal(out.frames, pipe(PROMPT, num_frames=24, **FAST).frames)
    calls.clear()
    out = pipe([PROMPT] * 2, num_frames=24, callback_on_step_end=lambda *a: stop(*a), **(FAST | {"seed": 5}))
    assert out.interrupted and out.frames.shape[0] == len(out.seeds)


def test_a_stop_during_a_decode_keeps_the_finished_parts(pipe: ReducioPipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipe.decoder, "tiling", True)  # a decode in tiles can be stopped
    whole = pipe(PROMPT, num_frames=24, **FAST).frames
    decoded, decode, stopped_part = [], pipe.decoder.decode, 3

    def stop(*args):
        decoded.append(args)
        pipe._interrupt = len(decoded) == stopped_part
        return decode(*args)

    monkeypatch.setattr(pipe.decoder, "decode", stop)
    out = pipe(PROMPT, num_frames=32, **FAST)
    assert out.interrupted and np.array_equal(out.frames, whole)
    decoded.clear()
    assert np.array_equal(np.stack(list(pipe.stream(prompt=PROMPT, num_frames=32, **FAST))), whole)
    decoded.clear()
    stopped_part = 1
    with pytest.raises(ReducioError, match="interrupted while the clip was decoded: there is no clip"):
        next(pipe.stream(prompt=PROMPT, num_frames=32, **FAST))


def test_a_long_clip_needs_the_memory_of_one_clip_and_its_frames(pipe: ReducioPipeline):
    one, long = (
        instruments.live_peak(lambda frames=frames: pipe(PROMPT, num_frames=frames, **FAST)) for frames in (16, 64)
    )
    assert one <= long <= one + (64 + 2 * 8) * 64 * 64 * 3, "beside the finished frames, those that will be cross-faded"


def test_held_part_with_other_schedulers(folder: Path):
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    pipe = ReducioPipeline.from_pretrained(folder, device="cpu", dtype="float32")
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(prediction_type="v_prediction", solver_order=1),
        UniPCMultistepScheduler(prediction_type="v_prediction"),
    ):
        pipe.scheduler = scheduler
        for backend in BACKENDS:
            other = ReducioPipeline(**pipe.components, sample_height=64, sample_width=64, backend=backend)
            first, second = latents_of(other, num_frames=24)
            assert torch.equal(second[:, :, :2], first[:, :, 2:])
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ReducioError, match="num_frames: needs a scheduler .* this one is a DDIMScheduler"):
        pipe(PROMPT, num_frames=24, **FAST)


def test_strength_lies_between_the_still_and_the_clip(both: ReducioPipeline, moving: np.ndarray):
    motion, still = both.encode_motion(moving), both.encode_motion([moving[7]] * 16)

    def latent(strength: float) -> torch.Tensor:
        kwargs = {"motion_latents": motion, "motion_strength": strength, "progress": False}
        return both(image=moving[7], output_type="latent", **kwargs).frames

    def share(strength: float) -> float:
        """The latent's position on the line from the still (0) to the clip (1)."""
        direction = (motion - still).flatten()
        return float((latent(strength) - still).flatten() @ direction / (direction @ direction))

    assert torch.equal(latent(1), motion) and torch.equal(latent(0), still)
    shares = [share(strength) for strength in (0.25, 0.75, 1.5, 4)]
    assert 0 < shares[0] < shares[1] < 1 < shares[2] < shares[3]
    frames = both(image=moving[7], motion_latents=motion, motion_strength=0.5, progress=False).frames
    assert np.array_equal(both.decode(latent(0.5), moving[7]), frames)
    assert np.array_equal(both.decode(motion, moving[7], motion_strength=0.5), frames)
    # The same holds for a sampled latent.
    plain = both(PROMPT, output_type="latent", **FAST)
    assert torch.equal(both(PROMPT, motion_strength=1, output_type="latent", **FAST).frames, plain.frames)
    assert torch.equal(
        both(PROMPT, motion_strength=0, output_type="latent", **FAST).frames, both.encode_motion([plain.content] * 16)
    )


def test_motion_of_another_clip(both: ReducioPipeline, moving: np.ndarray, tmp_path: Path):
    motion = both.encode_motion(moving)
    assert motion.shape == SHAPE
    expected = both.decode(motion, moving[3])
    assert np.array_equal(both(image=moving[3], motion_latents=motion, progress=False).frames, expected)
    out = both(image=[moving[3], moving[5]], motion_latents=motion, progress=False)
    assert out.frames.shape == (2, 16, 64, 64, 3) and np.array_equal(out.frames[0], expected)
    drawn = both(PROMPT, motion_latents=motion, **FAST)
    assert np.array_equal(drawn.content, both(PROMPT, **FAST).content)
    write_video(np.repeat(moving, 2, axis=0), tmp_path / "clip", 8)
    assert torch.equal(both.encode_motion(tmp_path / "clip", step=2), motion)
    for wrong, message in (
        ((moving[:15],), "motion: the clip has 15 frames; the model takes 16"),
        ((tmp_path / "clip", None, None, 20), "motion: .*clip has 12 frames from number 20 on; the model takes 16"),
        ((moving.astype(np.float32),), "motion: must be a path, a list of pictures or uint8 .* it is float32"),
        (([moving[0], moving[1][:32]],), "motion: its pictures differ in size"),
        ((moving, 100), "height: 100 is not a multiple of 32"),
    ):
        with pytest.raises(ReducioError, match=message):
            both.encode_motion(*wrong)
    with pytest.raises(ReducioError, match="without a prompt there is nothing to draw one from"):
        both(motion_latents=motion)


def test_content_frame_kept_where_nothing_moves(both: ReducioPipeline, moving: np.ndarray):
    still = both.encode_motion(np.repeat(moving[7:8], 16, axis=0))
    kept = both(image=moving[7], motion_latents=still, keep_content=True, progress=False).frames
    assert (kept == moving[7]).all(), "all of a still clip"
    assert not (both.decode(still, moving[7]) == moving[7]).all()
    from reducio_fast.pipelines.reducio.motion import kept_content

    clip, still_clip, frame = torch.zeros(4, 3, 32, 32), torch.zeros(4, 3, 32, 32), torch.full((3, 32, 32), 0.5)
    clip[:, :, 8:16, 8:16] = 1.0  # the moving part
    out = kept_content(clip, still_clip, frame)
    assert (out[:, :, 8:16, 8:16] == 1).all() and (out[:, :, 24:] == 0.5).all()


def test_previews(both: ReducioPipeline):
    seen = []

    def watch(own, step, timestep, tensors):
        seen.append((sorted(tensors), tensors["frames"]))

    kwargs = FAST | {"num_inference_steps": 4}
    plain = both(PROMPT, **kwargs)
    out = both(PROMPT, callback_on_step_end=watch, preview_every=2, **kwargs)
    assert np.array_equal(out.frames, plain.frames), "looking changes nothing"
    assert [names for names, _ in seen] == [["frames", "latents"]] * 4
    assert [None if frames is None else frames.shape for _, frames in seen] == [None, (16, 64, 64, 3)] * 2
    error = np.abs(seen[3][1].astype(int) - out.frames)
    assert error.max() <= 1, "the last step ends on its data prediction, but for the rounding of a solver's sum"
    assert {"preview", "dit.step", "vae.decode"} <= set(out.timings) and all(s >= 0 for s in out.timings.values())
    seen.clear()
    both(PROMPT, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["frames"], **kwargs)
    assert all(names == ["frames"] and frames is not None for names, frames in seen) and len(seen) == 4


@pytest.fixture
def small_decoder() -> PreviewDecoder:
    torch.manual_seed(0)
    return PreviewDecoder(PreviewConfig(width=8, fine_width=8, num_res_blocks=1)).requires_grad_(False)


def test_previews_of_a_preview_decoder(both: ReducioPipeline, small_decoder: PreviewDecoder):
    seen = []
    kwargs = FAST | {"num_inference_steps": 4}
    plain = both(PROMPT, **kwargs)
    both.preview_decoder = small_decoder
    try:
        out = both(PROMPT, callback_on_step_end=lambda *a: seen.append(a[3]["frames"]), preview_every=2, **kwargs)
        latent = both(PROMPT, output_type="latent", **kwargs).frames
        assert np.array_equal(out.frames, plain.frames), "looking changes nothing"
        assert [None if frames is None else frames.shape for frames in seen] == [None, (16, 32, 32, 3)] * 2
        image = torch.from_numpy(out.content).permute(2, 0, 1)[None] / 127.5 - 1
        expected = (small_decoder(latent[None], image)[0].permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5
        assert np.abs(seen[3] - expected.numpy()).max() <= 1, "the last step ends on its data prediction"
        seen.clear()  # the model's own decoder decodes a latent with more or less motion
        both(PROMPT, callback_on_step_end=lambda *a: seen.append(a[3]["frames"]), preview_every=4, motion_strength=2.0,
             **kwargs)  # fmt: skip
        assert seen[3].shape == (16, 64, 64, 3)
    finally:
        both.preview_decoder = None


def test_processes_that_decode_together_make_no_previews_with_the_full_decoder(
    pipe: ReducioPipeline, small_decoder: PreviewDecoder, monkeypatch: pytest.MonkeyPatch
):
    """Its tiles are exchanged between all processes, but only the first one has the callback."""
    monkeypatch.setattr(pipe.executor, "ranks", object())
    call = {"prompt": PROMPT, "callback_on_step_end": print, "preview_every": 1}
    message = "preview_every: none while several processes make a clip"
    with pytest.raises(ReducioError, match=message):
        pipe.check_inputs(**call)
    monkeypatch.setattr(pipe, "preview_decoder", small_decoder)
    assert pipe.check_inputs(**call).previews
    with pytest.raises(ReducioError, match=message):
        pipe.check_inputs(**call, motion_strength=2.0)


def test_processes_notice_that_their_calls_differ(pipe: ReducioPipeline):
    class Ranks:
        """Rank 0 sends its call first; the next calls are those of another rank."""

        sent = None

        def broadcast_value(self, value):
            self.sent = self.sent or value
            return self.sent

        def together(self):
            return nullcontext()

    ranks, latents = Ranks(), torch.zeros(SHAPE)
    call = {"prompt": PROMPT, "latents": latents, "callback_on_step_end": print}
    for _ in range(2):
        agree(ranks, pipe.check_inputs(**call))
    for other in (
        {"num_frames": 24},
        {"guidance_reuse": 2},
        {"guidance_interval": (0.2, 0.8)},
        {"callback_on_step_end_tensor_inputs": ["latents", "frames"]},
        {"preview_every": 2},
        {"latents": latents + 1},
        {"latents": None},
        {"latents": None, "motion_latents": latents},
    ):
        with pytest.raises(ReducioError, match="the processes were given different calls"):
            agree(ranks, pipe.check_inputs(**call | other))


def test_a_preview_decoder_is_saved_and_must_fit(folder: Path, tmp_path: Path, small_decoder: PreviewDecoder):
    pipe = ReducioPipeline.from_pretrained(folder, preview_decoder=small_decoder, device="cpu", dtype="float32")
    pipe.save_pretrained(tmp_path / "model")
    again = ReducioPipeline.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    for name, weight in again.preview_decoder.state_dict().items():
        assert torch.equal(weight, small_decoder.state_dict()[name])
    named = ReducioPipeline.from_pretrained(folder, preview_decoder=tmp_path / "model" / "preview_decoder")
    assert named.preview_decoder.config == small_decoder.config
    again.unload("preview_decoder")
    assert again.preview_decoder is None
    other = PreviewDecoder(PreviewConfig(temporal_factor=2, width=8, fine_width=8))
    with pytest.raises(ReducioError, match="preview_decoder has temporal_factor=2, vae has 4"):
        ReducioPipeline.from_pretrained(folder, preview_decoder=other)


def test_loops_and_contact_sheets(pipe: ReducioPipeline, clip):
    out = pipe(PROMPT, loop=True, **FAST)
    assert np.array_equal(out.frames[:16], clip.frames) and np.array_equal(out.frames[16:], clip.frames[14:0:-1])
    assert len(pipe(PROMPT, loop=True, output_type="pil", **FAST).frames) == 30
    assert pipe(PROMPT, loop=True, output_type="pt", **FAST).frames.shape == (30, 3, 64, 64)
    out = pipe(PROMPT, num_videos_per_prompt=3, **FAST)
    sheet = out.grid()
    assert sheet.shape == (16, 128, 128, 3) and np.array_equal(sheet[:, :64, 64:], out.frames[1])
    assert np.array_equal(sheet[:, 64:, :64], out.frames[2]) and not sheet[:, 64:, 64:].any()
    one = out.as_grid()
    assert np.array_equal(one.frames, sheet) and one.content is None and not one.is_list and one.seeds == out.seeds
    assert out.grid(3).shape == (16, 64, 192, 3) and np.array_equal(clip.grid(), clip.frames)
    for columns in (0, 4, 1.5, True):
        with pytest.raises(ReducioError, match="columns: must be a whole number from 1 to 3"):
            out.grid(columns)
