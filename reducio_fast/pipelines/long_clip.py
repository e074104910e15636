"""Clips longer than the model makes, by chaining: each further clip continues from a frame of the one beside it.

A late frame of each clip (Reducio: the last; SVD: number `-overlap`) conditions the next clip. The steps of the latent
that both clips share are not made twice: they are carried over and held while the others are denoised, so the next clip
continues the motion. The frames that both clips decode are cross-faded. On a model whose decoder draws every pixel (8
scenes of 48 frames) carrying the latent cuts the error of the motion across a seam from 0.88 of a frame's step, with a
cross-fade alone, to 0.34.

A decoder that warps reads from the latent how far each pixel lies from its place in the content frame. The next clip
has another content frame, so there the shared frames are encoded once more, as the next clip has them, with a still in
place of the frames to come. With the neighbour's own latent the embedded model drew everything twice at a seam: the
picture changed 2.4 times as much as between other frames.

Holding: every step replaces the data prediction of the carried part by the carried latent z. The solver then moves that
part along alpha z + sigma noise, with its initial noise, and ends on z. Nothing else is needed.

Only one clip is in memory at a time, beside the finished frames, which are bytes unless floats are asked for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..media.colours import match_mean_and_spread
from ..reference.sampler import StopSampling
from ..system.errors import ReducioError
from .call.output import as_frames, from_frames
from .call.request import Chain, ClipRequest, Hold, Joint
from .call.state import CallState
from .execution.decoding import Decoding
from .one_clip import decode_clip, sample_clip

Guard = Callable[[], AbstractContextManager[Any]]  # around the work of each clip


class Link(NamedTuple):
    """What a clip of the chain leaves to its neighbours. Pictures are uint8 [H, W, 3]."""

    latent: Tensor
    content: np.ndarray
    before: np.ndarray  # content frame of the clip before it
    after: np.ndarray  # and of the clip after it
    following: ClipRequest  # the request of a further clip, without its content frame and the held steps
    clip: np.ndarray | None  # its frames [T, H, W, 3], where they are encoded again for its neighbours


def make(pipe: Any, clip: ClipRequest, call: CallState, decoding: Decoding) -> tuple[np.ndarray, Any]:
    """The content frame of the first clip, and all frames in the form asked for.

    An interrupted call returns the clips that are finished; if there is none, the first clip as it is.
    """
    content: np.ndarray | None = None
    chain = call.request.chain
    video, done = torch.empty(0), 0
    for content, frames in pieces_of(pipe, clip, call, decoding):  # noqa: B007 - the same content frame each time
        if not done:  # one buffer for all: pieces kept between the memory that each clip frees would fragment the heap
            video = frames.new_empty(chain.frames if chain else len(frames), *frames.shape[1:])
        video[done : done + len(frames)] = frames
        done += len(frames)
        del frames
    assert content is not None
    return content, from_frames(video[:done], call.request.output_type)


def check_stream(request: Any) -> None:
    """Raises ReducioError for a request whose frames cannot be given one by one."""
    if len(request.clips) != 1:
        raise ReducioError(f"stream: makes one clip, {len(request.clips)} are asked for")
    if request.loop or request.output_type == "latent":
        what = "loop=True plays" if request.loop else "output_type='latent' returns"
        raise ReducioError(f"stream: {what} what is known at the end; call the pipeline itself")


def stream(pipe: Any, call: CallState) -> Iterator[Any]:
    """The frames of a call's one clip, each as soon as it is final, in the form asked for."""
    request, turn = call.request, functools.partial(pipe.turn, call)
    with turn():
        decoding = pipe.fitter.settle(request.height, request.width)
    with call.show_progress(pipe._progress_bar_config):
        try:
            for _, frames in pieces_of(pipe, request.clips[0], call, decoding, turn):
                yield from from_frames(frames, request.output_type)
        except StopSampling:  # in the first clip of the chain
            raise call.stopped() from None
        finally:
            call.end()


def pieces_of(
    pipe: Any, clip: ClipRequest, call: CallState, decoding: Decoding, guard: Guard = nullcontext
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yields the first clip's content frame and finished frames, in time order, as they become ready."""
    chain = call.request.chain
    start = clip if chain is None else dataclasses.replace(clip, last_image=None)
    with guard():
        first, ready = _link(pipe, start, call, decoding)
    if chain is None:
        yield first.content, ready
        return
    last = first
    for _ in range(chain.before):
        if (made := _neighbour(pipe, last, first, call, decoding, chain, guard, backward=True)) is None:
            break
        last, ready = made[0], _join(made[1], ready, chain.joint.frames - chain.joint.hop_back)
        del made
    last = first
    for left in reversed(range(chain.after)):
        if left == 0:  # only the last clip of the chain ends with the last image
            last = last._replace(following=dataclasses.replace(last.following, last_image=clip.last_image))
        if (made := _neighbour(pipe, last, first, call, decoding, chain, guard)) is None:
            break
        last, ready = made[0], _join(ready, made[1], chain.joint.overlap)
        del made  # its frames are not needed while the next clip is made
        # What the next clip does not overlap is final.
        final = len(ready) - chain.joint.overlap
        yield first.content, ready[:final]
        ready = ready[final:].clone()  # a view would keep the final frames in memory while the next clip is made
    yield first.content, ready


def _link(pipe: Any, clip: ClipRequest, call: CallState, decoding: Decoding) -> tuple[Link, Tensor]:
    """A clip and its frames: uint8 [T, H, W, 3], or float32 [T, 3, H, W] in [0, 1] for output type "pt"."""
    output_type = "pt" if call.request.output_type == "pt" else "np"
    sampled = sample_clip(pipe, clip, call, decoding)
    assert sampled.frame is not None
    video = decode_clip(pipe, sampled.latent, sampled.frame, call, decoding, output_type)
    call.undecoded.clear()
    following = dataclasses.replace(clip, embeds=sampled.follow, latents=None, motion=None)
    chain = call.request.chain
    end = chain.joint.hop + chain.joint.content if chain else 0
    again = None
    if chain is not None and chain.joint.held and getattr(pipe.vae.config, "warps", False):
        again = _pictures(video)
    return Link(sampled.latent, sampled.frame, content_of(video, 0), content_of(video, end), following, again), video


def _pictures(video: Tensor) -> np.ndarray:
    """Its frames as uint8 [T, H, W, 3]."""
    return np.stack([content_of(video, number) for number in range(len(video))])


def _neighbour(
    pipe: Any,
    beside: Link,
    first: Link,
    call: CallState,
    decoding: Decoding,
    chain: Chain,
    guard: Guard,
    backward: bool = False,
) -> tuple[Link, Tensor] | None:
    """The clip after `beside`, or before it; None if the call was interrupted before it was finished."""
    if call.interrupted:
        return None
    joint = chain.joint
    picture = beside.before if backward else beside.after
    if chain.match_colours:
        picture = match_mean_and_spread(picture, first.content)
    try:
        with guard():
            hold = _carried(pipe, beside, call, decoding, joint, backward)
            clip = dataclasses.replace(beside.following, image=picture, hold=hold)
            made = _link(pipe, clip, call, decoding)
    except StopSampling:  # in the decode
        return None
    return None if call.interrupted else made


def _carried(pipe: Any, beside: Link, call: CallState, decoding: Decoding, joint: Joint, backward: bool) -> Hold | None:
    """The part of a neighbour's latent that the next clip shares, at its position in the next clip."""
    if not joint.held:
        return None
    latent, axis, held, new_steps = beside.latent, joint.time_axis, joint.held, joint.steps - joint.held
    # Backward, the end of the next clip is the beginning of its neighbour.
    place, source = (new_steps, 0) if backward else (0, new_steps)
    if beside.clip is not None:
        clip = beside.clip
        with pipe.executor.placed("vae.decode"):
            if call.request.motion_strength != 1:  # the call scales the motion, also of what is held, when it decodes
                unscaled = dataclasses.replace(call.request, motion_strength=1.0)
                clip = _pictures(as_frames(pipe.finished(latent, beside.content, unscaled, "np", decoding), "np"))
            latent, source = pipe.motion.encode(_in_next(clip, joint, backward)).to(latent), place
    mask = torch.zeros([joint.steps if i == axis else 1 for i in range(latent.ndim)], dtype=torch.bool)
    mask.narrow(axis, place, held).fill_(True)
    target = torch.zeros_like(latent)
    target.narrow(axis, place, held).copy_(latent.narrow(axis, source, held))
    return Hold(mask.to(latent.device), target)


def _in_next(clip: np.ndarray, joint: Joint, backward: bool) -> np.ndarray:
    """The frames that a clip shares with the next one, at their places there; those to come repeat the nearest."""
    if backward:
        return np.concatenate([np.repeat(clip[:1], joint.hop_back, axis=0), clip[: joint.frames - joint.hop_back]])
    return np.concatenate([clip[joint.hop :], np.repeat(clip[-1:], joint.hop, axis=0)])


def content_of(frames: Tensor, number: int) -> np.ndarray:
    """One frame as the uint8 picture [H, W, 3] that conditions the next clip."""
    frame = frames[number]
    if frame.dtype != torch.uint8:
        frame = (frame * 255).round().to(torch.uint8).movedim(0, -1)
    return frame.cpu().numpy().copy()  # a view would keep the whole clip in memory


def _join(earlier: Tensor, later: Tensor, shared: int) -> Tensor:
    """Two clips in a row; the `shared` frames that both have are cross-faded in equal steps."""
    weight = torch.arange(1, shared + 1, device=later.device) / (shared + 1)
    fade = torch.lerp(earlier[-shared:].float(), later[:shared].float(), weight.view(-1, 1, 1, 1))
    fade = fade.round().to(later.dtype) if later.dtype == torch.uint8 else fade
    return torch.cat([earlier[:-shared], fade, later[shared:]])
