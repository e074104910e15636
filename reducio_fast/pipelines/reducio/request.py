"""A Reducio call's arguments -> the request that they become once checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ...media import aspect_buckets, image_files
from ...reference import VAEConfig
from ...system.errors import ReducioError, check_switch
from ..call import steering, validation
from ..call.chain import reducio_joint
from ..call.quality import Quality, resolve
from ..call.request import Arguments, ClipRequest, Request
from ..execution.drawing import check_content_kwargs
from ..execution.schedules import scheduled, trial_timesteps
from ..one_clip import preview_decoder


def request_of(pipe: Any, inputs: Arguments) -> Request:
    """Check the arguments and spread them over the clips of the call. Raises ReducioError."""
    config = pipe.vae.config
    prompts, negatives, many_prompts = steering.prompts_of(inputs)
    images = image_files.read_images(inputs.image, len(prompts))
    sizes = [i.shape[:2] for i in images if i is not None]
    model_size = (pipe.sample_height, pipe.sample_width)
    height, width = steering.check_motion(inputs, config.spatial_factor) or aspect_buckets.choose_size(
        inputs.height, inputs.width, model_size, sizes, config.spatial_factor
    )
    per_prompt = validation.check_count("num_videos_per_prompt", inputs.num_videos_per_prompt, validation.MAX_VIDEOS)
    validation.check_size(config, height, width)
    chosen = quality_of(pipe, inputs)
    content_kwargs = check_content_kwargs(pipe.text_to_image, inputs.content_kwargs)
    names = inputs.callback_on_step_end_tensor_inputs
    validation.check_callback(inputs.callback_on_step_end, names, pipe._callback_tensor_inputs)
    shape, count = config.latent_shape(height, width), len(prompts) * per_prompt
    is_list = many_prompts or per_prompt > 1
    generators = validation.check_generators(count, inputs.seed, inputs.generator)
    latents: Sequence[Tensor | None] = [None] * count
    if inputs.latents is not None:
        latents = validation.check_latents(inputs.latents, shape, count, is_list)
    motion = steering.motion_of_clips(inputs.motion_latents, shape, count)
    joint, executor, strength = reducio_joint(config), pipe.executor, steering.check_strength(inputs.motion_strength)
    if preview_decoder(pipe, strength) is not None:
        executor = None
    steered = steering.check_steering(inputs, joint, inputs.num_frames, inputs.direction, pipe.scheduler, executor)
    if steered["chain"] is not None and inputs.motion_latents is not None:
        raise ReducioError(f"motion_latents: are of {config.num_frames} frames, num_frames is {inputs.num_frames}")
    content_size = pipe.conditioner.content_size(height, width)
    embeds = validation.check_embeds(pipe.transformer.config, content_size, len(prompts), many_prompts, inputs)
    per_clip = ([x for x in each for _ in range(per_prompt)] for each in (prompts, negatives, images, embeds))
    return Request(
        clips=[ClipRequest(*clip) for clip in zip(*per_clip, generators, latents, motion, strict=True)],
        is_list=is_list,
        height=height,
        width=width,
        latent_shape=shape,
        num_inference_steps=chosen.num_inference_steps,
        schedule=chosen.schedule,
        shortcuts=chosen.shortcuts,
        guidance_scale=float(inputs.guidance_scale),
        output_type=inputs.output_type,
        fps=pipe.fps,
        callback_on_step_end=inputs.callback_on_step_end,
        callback_tensor_inputs=tuple(names),
        content_kwargs=pipe.content.first_stage.with_steps(chosen.content_steps, content_kwargs),
        progress=inputs.progress,
        motion_strength=strength,
        clip_condition=steering.clip_condition(inputs.motion_score, pipe.transformer.config, pipe.fps),
        keep_content=check_switch("keep_content", inputs.keep_content),
        **steered,
    )


def latents_with_images(config: VAEConfig, latents: Any, image: Any) -> list[tuple[Tensor, np.ndarray]]:
    """The arguments of `decode` as pairs: a latent [1, 16, T/f, H/32, W/32], and its content frame, uint8 [H, W, 3]."""
    is_list = isinstance(latents, Tensor) and latents.ndim == 5
    rows, columns = latents.shape[-2:] if isinstance(latents, Tensor) and latents.ndim in (4, 5) else (1, 1)
    height, width = rows * config.spatial_factor, columns * config.spatial_factor
    count = len(latents) if is_list else 1
    clips = validation.check_latents(latents, config.latent_shape(height, width), count, is_list)
    validation.check_size(config, height, width)
    images = image_files.read_images(image, count)
    if images[0] is None:
        raise ReducioError("image: None given; decoding needs the content frame of the clip (out.content)")
    fitted = [image_files.fit_image(each, height, width) for each in images if each is not None]
    return list(zip(clips, fitted, strict=True))


def quality_of(pipe: Any, inputs: Arguments) -> Quality:
    """The sampling settings that follow from the call's arguments and the model's own setting. Raises ReducioError."""
    scale = validation.check_number("guidance_scale", inputs.guidance_scale)
    names = ("num_inference_steps", "schedule", "guidance_interval", "guidance_reuse", "cache_threshold")
    arguments = {name: getattr(inputs, name) for name in names}
    chosen = resolve(pipe.sampling, inputs.quality, arguments, scale)
    steps, max_steps = chosen.num_inference_steps, pipe.scheduler.config.num_train_timesteps
    validation.check_sampling(steps, max_steps, scale, inputs.output_type)
    scheduler, timesteps = scheduled(pipe.scheduler, chosen.schedule, steps)
    if chosen.schedule != "own" or 2 * steps > max_steps:
        validation.check_times(scheduler, trial_timesteps(scheduler, steps, timesteps))
    # Without an executor the call is only checked, for another process that will run it.
    if chosen.cache_threshold and pipe.executor is not None and (why := pipe.executor.reason_without_cache()):
        raise ReducioError(f"cache_threshold: {chosen.cache_threshold} needs the fast path; {why}")
    return chosen
