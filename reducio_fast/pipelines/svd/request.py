"""A call of Stable Video Diffusion: its arguments as they were given, and the request that they become once checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ...media import image_files
from ...system.errors import ReducioError
from ..call.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class SVDArguments:
    """Arguments of a call, unchecked: see `SVDPipeline.__call__` for their meaning and their defaults."""

    prompt: Any
    image: Any
    negative_prompt: Any
    height: Any
    width: Any
    num_frames: Any
    num_inference_steps: Any
    sigmas: Any
    min_guidance_scale: Any
    max_guidance_scale: Any
    guidance_scale: Any
    fps: Any
    motion_bucket_id: Any
    noise_aug_strength: Any
    decode_chunk_size: Any
    num_videos_per_prompt: Any
    seed: Any
    generator: Any
    latents: Any
    output_type: Any
    callback_on_step_end: Any
    callback_on_step_end_tensor_inputs: Any
    progress: Any
    return_dict: Any
    image_fit: Any
    content_kwargs: Any
    last_image: Any
    overlap: Any
    match_colours: Any
    loop: Any
    preview_every: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SVDRequest(Request):
    """`latent_shape` is [T, 4, H/8, W/8], `guidance_scale` the highest of all frames. `time_ids`: the network's added
    time ids, float64 [n], or [T, n] if each frame has its own."""

    num_frames: int
    time_ids: Tensor
    noise_aug_strength: float
    decode_chunk_size: int | None
    crops: bool  # crop the picture instead of stretching it to the clip's shape


def last_images(last_image: Any, count: int) -> list[np.ndarray | None]:
    """The last pictures of `count` clips: one for all, or one for each. Raises ReducioError."""
    if isinstance(last_image, list | tuple) and len(last_image) != count:
        raise ReducioError(f"last_image: {len(last_image)} given for {count} images; give one for all or one an image")
    return image_files.read_images(last_image, count)
