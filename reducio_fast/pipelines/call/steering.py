"""Checks of the arguments that lengthen a clip or steer its motion."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ...reference.data_prediction import KNOWN, family_of
from ...system.errors import ReducioError, check_switch, shown
from ...system.real_numbers import to_float
from . import chain, validation
from .request import Joint

MAX_STRENGTH = 4.0


def check_strength(strength: Any) -> float:
    """0 is a still, 1 the clip as generated; above 1 the motion grows, and saturates near 1.2 times that of 1."""
    number = to_float(strength)
    if not 0 <= number <= MAX_STRENGTH:
        raise ReducioError(f"motion_strength: must be a number from 0 to {MAX_STRENGTH:g}, is {shown(strength)}")
    return number


def clip_condition(motion_score: Any, config: Any, fps: float) -> tuple[float, float] | None:
    """Frame rate and motion score (NaN: not known) for a model with `clip_conditioning`; None for another model."""
    if motion_score is None:
        return (fps, math.nan) if config.clip_conditioning else None
    if not config.clip_conditioning:
        raise ReducioError(
            "motion_score: this model was trained without it (clip_conditioning); motion_strength works with each model"
        )
    score = to_float(motion_score)
    if not 0 <= score < math.inf:
        raise ReducioError(f"motion_score: must be a number of at least 0, is {shown(motion_score)}")
    return fps, score


def check_steering(
    inputs: Any, joint: Joint | None, num_frames: Any, direction: Any, scheduler: Any, executor: Any
) -> dict[str, Any]:
    """The fields of a `Request` that all families share: `chain`, `loop`, `preview_every`. joint None: clips are not
    chained in this call. executor: what runs the decoder of previews; None if they need no full decoder."""
    for name in ("match_colours", "progress", "return_dict"):
        check_switch(name, getattr(inputs, name))
    links = None if joint is None else chain.plan(joint, num_frames, direction, inputs.match_colours)
    every, loop = inputs.preview_every, check_switch("loop", inputs.loop)
    if every is not None:
        validation.check_count("preview_every", every)
        if inputs.callback_on_step_end is None:
            raise ReducioError("preview_every: given without callback_on_step_end, which receives the frames")
    previews = every is not None or "frames" in inputs.callback_on_step_end_tensor_inputs
    if previews and executor is not None:
        if executor.offload is not None:
            raise ReducioError(
                "preview_every: none while weights are offloaded: "
                "the decoder is not on the device, a preview_decoder is"
            )
        if executor.ranks is not None:
            raise ReducioError(
                "preview_every: none while several processes make a clip: they decode together, but the callback is "
                "in one of them; a preview_decoder runs there"
            )
    for name, asked in (("num_frames", links is not None), ("preview_every", previews)):
        if asked and family_of(scheduler) is None:
            raise ReducioError(
                f"{name}: needs a scheduler whose data prediction is known ({', '.join(KNOWN)}), "
                f"this one is a {type(scheduler).__name__}"
            )
    if inputs.output_type == "latent":
        for name, asked in (("num_frames", links is not None), ("loop", loop)):
            if asked:
                raise ReducioError(f"output_type: 'latent' is of one clip of the model; {name} asks for more frames")
    return {"chain": links, "loop": loop, "preview_every": every}


def check_motion(inputs: Any, factor: int) -> tuple[int, int] | None:
    """Height and width of `motion_latents` in pixels; None without them."""
    motion = inputs.motion_latents
    if motion is None:
        return None
    if inputs.latents is not None:
        raise ReducioError("latents: initial noise has no use beside motion_latents, which are not sampled")
    if not isinstance(motion, Tensor) or motion.ndim not in (4, 5):
        shape = list(motion.shape) if isinstance(motion, Tensor) else type(motion).__name__
        raise ReducioError(f"motion_latents: must be latents [C, T, H, W] or [N, C, T, H, W], are {shape}")
    rows, columns = motion.shape[-2:]
    size = rows * factor, columns * factor
    for name, given, own in zip(("height", "width"), (inputs.height, inputs.width), size, strict=True):
        if given is not None and given != own:
            raise ReducioError(f"motion_latents: are of {size[0]}x{size[1]} pixels, {name} asks for {given}")
    return size


def motion_of_clips(motion: Tensor | None, shape: Any, count: int) -> list[Tensor | None]:
    """One latent [1, ...] per clip; a single one is used for all clips."""
    if motion is None:
        return [None] * count
    if motion.ndim == 4:
        validation.check_values(motion, "motion_latents")
        motion = motion.expand(count, *motion.shape)
    return list(validation.check_latents(motion, shape, count, True, "motion_latents"))


def prompts_of(inputs: Any) -> tuple[list[str], list[str], bool]:
    """As `validation.check_prompts`; prompts may be left out when motion and images are given."""
    unprompted = inputs.prompt is None and inputs.prompt_embeds is None
    if inputs.motion_latents is None or not unprompted:
        return validation.check_prompts(inputs.prompt, inputs.negative_prompt, inputs.prompt_embeds)
    image, motion = inputs.image, inputs.motion_latents
    is_list = isinstance(image, list | tuple) or getattr(image, "ndim", 0) == 4
    if not is_list and isinstance(motion, Tensor) and motion.ndim == 5:
        return [""] * len(motion), [""] * len(motion), True
    count = len(image) if is_list else 1
    if not count:
        raise ReducioError("image: the list is empty")
    return [""] * count, [""] * count, is_list
