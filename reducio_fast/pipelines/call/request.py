"""A call: its arguments as they were given, and the request that they become once checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...reference.sampler import NO_SHORTCUTS, Shortcuts


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Arguments of a Reducio call, unchecked: see `ReducioPipeline.__call__` for their meaning and their defaults."""

    prompt: Any
    image: Any
    negative_prompt: Any
    height: Any
    width: Any
    num_frames: Any
    num_inference_steps: Any
    guidance_scale: Any
    seed: Any
    generator: Any
    latents: Any
    output_type: Any
    callback_on_step_end: Any
    progress: Any
    num_videos_per_prompt: Any
    callback_on_step_end_tensor_inputs: Any
    return_dict: Any
    prompt_embeds: Any
    prompt_attention_mask: Any
    negative_prompt_embeds: Any
    negative_prompt_attention_mask: Any
    semantic_embeds: Any
    content_latents: Any
    content_kwargs: Any
    quality: Any
    schedule: Any
    guidance_interval: Any
    guidance_reuse: Any
    cache_threshold: Any
    direction: Any
    match_colours: Any
    motion_strength: Any
    motion_score: Any
    motion_latents: Any
    keep_content: Any
    loop: Any
    preview_every: Any


@dataclass(frozen=True, slots=True)
class Embeds:
    """Conditions of one clip that the caller passed in and that need no encoder; None for those to be computed."""

    text: tuple[Tensor, Tensor] | None = None  # [1, L, C] and mask bool [1, L]
    negative_text: tuple[Tensor, Tensor] | None = None
    semantic: Tensor | None = None  # [1, n, C]
    content: Tensor | None = None  # [1, 4, H/8, W/8]


@dataclass(frozen=True, slots=True)
class Hold:
    """Part of a clip's latent that is known: where `mask` (which broadcasts) is True, sampling ends on `latent`."""

    mask: Tensor
    latent: Tensor

    def to(self, device: torch.device) -> Hold:
        return Hold(self.mask.to(device), self.latent.to(device))


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """The checked request for one clip of a call. `latents`: its initial noise, float32 [1, C, T/f, H/32, W/32].
    `motion`: its latent, which is then not sampled. `hold`: the part of its latent that comes from another clip.
    `last_image`: the picture that the clip ends with, uint8 [h, w, 3]; only SVD's have one."""

    prompt: str  # "" where only `embeds.text` was given
    negative_prompt: str  # "" for none
    image: np.ndarray | None  # uint8 [h, w, 3]; None: to be drawn from the prompt
    embeds: Embeds
    generator: torch.Generator
    latents: Tensor | None
    motion: Tensor | None = None
    hold: Hold | None = None
    last_image: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """How a model's clips fit together.

    frames: of one clip. content: the number of the frame that conditions a clip; it is frame `hop + content` of the
    clip before it, or frame 0 of the clip after it. steps: of the latent [1, ...] along `time_axis`; `held` of them lie
    in the overlap.
    """

    frames: int
    content: int
    steps: int
    held: int
    time_axis: int
    overlap: int  # frames that a clip shares with the one before it

    @property
    def hop(self) -> int:
        """Frames that a clip adds after its neighbour."""
        return self.frames - self.overlap

    @property
    def hop_back(self) -> int:
        """Frames that a clip adds before its neighbour: those before its content frame."""
        return self.content


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A chain of clips: the first one, `after` clips that follow it, and `before` clips that precede it."""

    joint: Joint
    after: int
    before: int = 0
    match_colours: bool = False

    @property
    def clips(self) -> int:
        return 1 + self.after + self.before

    @property
    def frames(self) -> int:
        return self.joint.frames + self.after * self.joint.hop + self.before * self.joint.hop_back


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The checked request for a call: its clips, and what they have in common."""

    clips: list[ClipRequest]
    is_list: bool  # whether results get a clip axis
    height: int
    width: int
    latent_shape: tuple[int, int, int, int]  # of one clip
    num_inference_steps: int
    guidance_scale: float
    output_type: str
    fps: float  # of the clips
    callback_on_step_end: Callable[..., Any] | None
    callback_tensor_inputs: tuple[str, ...]
    content_kwargs: dict[str, Any]  # for the text-to-image pipeline
    progress: bool = True
    guidance_per_frame: Tensor | None = None  # [T], in place of `guidance_scale`
    sigmas: Sequence[float] | None = None  # one more than there are steps, in place of the scheduler's own
    schedule: str = "own"  # of `quality.SCHEDULES`
    shortcuts: Shortcuts = NO_SHORTCUTS
    chain: Chain | None = None  # of clips that make one longer clip
    motion_strength: float = 1.0
    clip_condition: tuple[float, float] | None = (
        None  # frame rate and motion score (NaN: not known), where the model has them
    )
    keep_content: bool = False
    loop: bool = False
    preview_every: int | None = None

    @property
    def previews(self) -> bool:
        """Whether the callback receives frames."""
        return self.preview_every is not None or "frames" in self.callback_tensor_inputs


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """The inputs of sampling, which a family computes from one clip's request.

    frame: the content frame, uint8 [H, W, 3], None where nothing reads it. noise: of a unit normal, [1, ...]. cond,
    uncond: conditions of the family's own class. tensors: further tensors that a callback may request.
    """

    frame: np.ndarray | None
    noise: Tensor
    cond: Any
    uncond: Any = None
    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    follow: Embeds = field(default_factory=Embeds)  # conditions that a clip which continues this one reuses
