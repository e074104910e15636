"""Stage one: the content frame, drawn by any diffusers text-to-image pipeline or taken from the user's own image.

Reducio (arXiv 2411.13552) takes its content frames from an off-the-shelf model: PixArt-alpha where the paper measures
speed, SDXL where it measures quality. A drawn frame and a user's image are both uint8 pictures of the clip's size, so a
drawn frame that is saved and passed back makes the same clip. The content frame is the clip's centre frame, number
(T - 1) // 2, not its first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ...media.image_files import fit_image
from ..call.request import ClipRequest, Request
from ..execution.components import Components
from ..execution.executor import Executor
from ..execution.first_stage import FirstStage
from .encoders import clean_caption


class ContentFrame:
    """content.generate: the frame of a clip, from the user's image or drawn by the model's first stage."""

    def __init__(self, components: Components, executor: Executor) -> None:
        self.components, self.executor = components, executor
        self.first_stage = FirstStage(lambda: components["text_to_image"], executor, clean_caption)

    def __call__(
        self, clip: ClipRequest, request: Request, progress: bool, on_step: Callable[[int], None] = lambda step: None
    ) -> np.ndarray | None:
        """uint8 [H, W, 3] of the clip's size; None if nothing reads it. `on_step` is called after each step of a first
        stage that supports it; an exception from it ends the drawing."""
        if clip.image is not None:
            return fit_image(clip.image, request.height, request.width)
        if not needs_frame(self.components, clip, request):
            return None
        kwargs = {"clean_caption": self.components["clean_caption"]} | request.content_kwargs
        size = request.height, request.width
        return self.draw(clip.prompt, clip.negative_prompt, *size, clip.generator, progress, kwargs, on_step)

    @property
    def line(self) -> str:
        return self.first_stage.line

    def draw(
        self,
        prompt: str,
        negative_prompt: str,
        height: int,
        width: int,
        generator: torch.Generator,
        progress: bool,
        kwargs: dict[str, Any] | None = None,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> np.ndarray:
        """See `FirstStage.draw`."""
        given = (prompt, negative_prompt, height, width, generator, progress, kwargs, on_step)
        return self.first_stage.draw(*given)


def needs_frame(components: Components, clip: ClipRequest, request: Request) -> bool:
    """Whether anything reads the content frame: the decoder, or an encoder whose result is not given."""
    semantic = clip.embeds.semantic is None and components["image_encoder"] is not None
    latent = clip.embeds.content is None and components["content_encoder"] is not None
    steered = request.motion_strength != 1 or request.previews
    return semantic or latent or steered or request.output_type != "latent"
