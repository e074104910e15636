"""text.encode and image.encode: the conditioning inputs of the Reducio-DiT for a clip."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...media.pixels import to_unit
from ...reference import Condition
from ...system.errors import ReducioError
from ..call.request import ClipRequest, Embeds, Request
from ..execution.components import Components
from ..execution.executor import Executor
from .content_frame import needs_frame
from .encoders import ContentEncoder, TextEncoder, clean_caption

VAE_FACTOR = 8  # of the SD autoencoder, for content latents that are given to a model without one


class Conditioner:
    """Encodes prompts and content frames, unless their embeds are given."""

    def __init__(self, components: Components, executor: Executor) -> None:
        self.components, self.executor = components, executor

    def __call__(
        self,
        clip: ClipRequest,
        frame: np.ndarray | None,
        timings: dict[str, float],
        rate_and_motion: tuple[float, float] | None = None,
    ) -> Condition:
        with self.executor.stage(timings, "text.encode"):
            text, mask = self._to_device(*(clip.embeds.text or self.encode_text(clip.prompt)))
        with self.executor.stage(timings, "image.encode"):
            semantic, latent = self.encode_image(frame, clip.embeds)
        clip_values = None if rate_and_motion is None else torch.tensor([rate_and_motion], device=self.executor.device)
        return Condition(text, mask, semantic, latent, clip_values)

    def without_prompt(self, cond: Condition, clip: ClipRequest, timings: dict[str, float]) -> Condition:
        """The unconditional half of guidance. The image stays in both halves: guidance changes the text alone."""
        if clip.embeds.negative_text is not None:
            text, mask = self._to_device(*clip.embeds.negative_text)
        elif not clip.negative_prompt.strip():
            return cond.without_text(self.components.denoiser.null_text)  # type: ignore[arg-type]
        else:
            with self.executor.stage(timings, "text.encode"):
                text, mask = self._to_device(*self.encode_text(clip.negative_prompt))
        return dataclasses.replace(cond, text=text, text_mask=mask)

    def encode_text(self, prompt: str) -> tuple[Tensor, Tensor]:
        """text [1, L, C] and its mask bool [1, L]."""
        length = self.components["transformer"].config.caption_length
        encoder, tokenizer = self.components["text_encoder"], self.components["tokenizer"]
        return TextEncoder(encoder, tokenizer, length, self.components["clean_caption"])([prompt])

    def encode_prompts(
        self, prompts: list[str], negatives: list[str]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """See `ReducioPipeline.encode_prompt`."""
        pairs = [self.encode_text(text) for text in prompts]  # one by one: a text's bytes do not depend on the others
        negative_pairs = [self.encode_text(text) if text.strip() else None for text in negatives]
        embeds, masks = (torch.cat(each) for each in zip(*pairs, strict=True))
        if not any(text.strip() for text in negatives):
            return embeds, masks, None, None
        null = self.components["transformer"].null_text[None].to(embeds)
        chosen = [(null, mask) if pair is None else pair for pair, (_, mask) in zip(negative_pairs, pairs, strict=True)]
        negative_embeds, negative_masks = (torch.cat(each) for each in zip(*chosen, strict=True))
        return embeds, masks, negative_embeds, negative_masks

    def encode_image(self, frame: np.ndarray | None, embeds: Embeds) -> tuple[Tensor | None, Tensor | None]:
        """Semantic tokens and content latent of a frame, unless `embeds` has them; encoders read float32 pixels."""
        image = None if frame is None else to_unit(frame, self.executor.device, torch.float32)[None]
        semantic, latent = embeds.semantic, embeds.content
        if semantic is None and self.components["image_encoder"] is not None:
            assert image is not None  # needs_frame
            semantic = self.components["image_encoder"](image)
        if latent is None and self.components["content_encoder"] is not None:
            assert image is not None
            encoder, factor = self.components["content_encoder"], self.components["content_scaling_factor"]
            latent = ContentEncoder(encoder, factor)(image)
        return self._to_device(semantic, latent)

    def content_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the content latent of a frame."""
        encoder = self.components["content_encoder"]
        factor = VAE_FACTOR if encoder is None else ContentEncoder(encoder).factor
        return height // factor, width // factor

    def check(self, request: Request) -> None:
        """Raise ReducioError for a call that needs an encoder or a first stage that is not loaded."""
        for clip in request.clips:
            for name, argument, value in (
                ("image_encoder", "semantic_embeds", clip.embeds.semantic),
                ("content_encoder", "content_latents", clip.embeds.content),
            ):
                if value is None and name in self.components.unloaded:
                    raise ReducioError(f"{argument}: None given, and the {name} was unloaded")
            if clip.image is None and needs_frame(self.components, clip, request):
                if self.components["text_to_image"] is None:
                    raise ReducioError("image: None given, and this model has no text-to-image stage to draw one")
                if not clip.prompt:
                    raise ReducioError("image: None given, and without a prompt there is nothing to draw one from")
            if clip.motion is not None:  # nothing is sampled
                continue
            texts = [] if clip.embeds.text is not None else [clip.prompt]
            if clip.embeds.negative_text is None and clip.negative_prompt.strip() and request.guidance_scale > 1:
                texts.append(clip.negative_prompt)
            if texts:
                self.check_text_encoder()
            for text in texts:
                if self.components["clean_caption"] and not clean_caption(text):
                    raise ReducioError(
                        f"prompt: nothing is left of {text[:60]!r} after caption cleaning; "
                        "set pipe.clean_caption = False"
                    )

    def check_text_encoder(self) -> None:
        if self.components["text_encoder"] is None or self.components["tokenizer"] is None:
            raise ReducioError(
                "prompt_embeds: None given, and no text_encoder is loaded; give the embeds with their attention mask, "
                "or load one: from_pretrained(..., text_encoder=FOLDER_OR_HUB_ID)"
            )

    def _to_device(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        return tuple(None if tensor is None else tensor.to(self.executor.device) for tensor in tensors)
