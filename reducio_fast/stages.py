"""The stages of a clip, one method each: what a loaded model computes, below the words in which it is asked.

text.encode and image.encode make the joint condition of the DiT, dit.step the motion latent, vae.decode the frames.
`Stages` holds the components, checks that they fit each other, and picks per network what runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import content, folders, inputs
from .encoders import ContentEncoder, SemanticEncoder, TextEncoder
from .errors import ReducioError
from .reference import Condition, ReducioDiT, ReducioVAE, sample
from .reference.sampler import Callback


class Stages:
    """The components of a model and the computations between them. Each takes and gives tensors of one clip."""

    def __init__(
        self,
        vae: ReducioVAE,
        transformer: ReducioDiT,
        scheduler: Any,
        text_encoder: nn.Module,
        tokenizer: Any,
        image_encoder: SemanticEncoder | Callable[[Tensor], Tensor] | None,
        content_encoder: nn.Module | None,
        text_to_image: Any,
        backend: str,
    ) -> None:
        required = backend == "fast"
        self.backend, why = inputs.resolve_backend(backend)
        self.report = {name: f"{self.backend}: {why}" for name in ("transformer", "vae")}
        self.vae, self.transformer, self.scheduler = vae, transformer, scheduler
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.image_encoder, self.content_encoder, self.text_to_image = image_encoder, content_encoder, text_to_image
        self.vae_tiling: bool | None = None  # None: by the size of the clip
        self._engine: Any = None
        self._check_components()
        if self.backend == "fast":
            self._start_engine(required)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def _condition(self, prompt: str, frame: np.ndarray, timings: dict[str, float]) -> Condition:
        with self._stage(timings, "text.encode"):
            text, mask = self._encode_text(prompt)
        with self._stage(timings, "image.encode"):
            pixels = self._pixels(frame)
            semantic = None if self.image_encoder is None else self.image_encoder(pixels)
            latent = None if self.content_encoder is None else ContentEncoder(self.content_encoder)(pixels)
        return Condition(text, mask, semantic, latent)

    def _without_prompt(self, cond: Condition, negative_prompt: str, timings: dict[str, float]) -> Condition:
        """The half guidance leads away from. The image stays in both halves: guidance is about the text alone."""
        if not negative_prompt.strip():
            return cond.without_text(self.transformer.null_text)
        with self._stage(timings, "text.encode"):
            text, mask = self._encode_text(negative_prompt)
        return Condition(text, mask, cond.semantic, cond.content)

    def _encode_text(self, prompt: str) -> tuple[Tensor, Tensor]:
        length = self.transformer.config.caption_length
        return TextEncoder(self.text_encoder, self.tokenizer, length)([prompt])

    def _sample(
        self,
        noise: Tensor,
        cond: Condition,
        uncond: Condition | None,
        guidance_scale: float,
        steps: int,
        generator: torch.Generator,
        step_end: Callback,
    ) -> Tensor:
        """noise [1, 16, T/f, H/32, W/32] on any device -> the motion latent, float32, of the last step taken."""
        # The latent stays float32 whatever the networks run in: twenty updates in bfloat16 lose what they add.
        noise = noise.to(self.device)
        words = (noise, cond, uncond, guidance_scale, steps, step_end)
        try:
            if self._engine is None:
                return sample(self.transformer, self.scheduler, *words, generator)
            from .fast.sampler import sample as fast_sample

            twins = self._engine.twins(self.transformer, self.vae)
            return fast_sample(twins.transformer, self.scheduler, *words)
        except ReducioError:
            raise
        except ValueError as error:
            if error is getattr(step_end, "error", None):
                raise
            raise ReducioError(f"sampling: {error}") from error

    def _decode(self, latent: Tensor, frame: np.ndarray) -> Tensor:
        """[1, 16, T/f, H/32, W/32] and the content frame -> float32 [3, T, H, W] in [-1, 1]."""
        tiled = self.vae.config.needs_tiling(*frame.shape[:2]) if self.vae_tiling is None else self.vae_tiling
        vae = self.vae if self._engine is None else self._engine.twins(self.transformer, self.vae).vae
        features = vae.encode_content(self._pixels(frame), tiled=tiled)
        video = vae.decode(latent.to(self.device, self.dtype), features, tiled=tiled)[0].float()
        if not torch.isfinite(video).all():
            raise ReducioError("vae.decode: the clip has values that are not finite (NaN or infinite)")
        return video.clamp(-1, 1)

    def _pixels(self, frame: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> [1, 3, H, W] in [-1, 1], in the networks' dtype."""
        pixels = torch.from_numpy(frame).to(self.device).permute(2, 0, 1)[None].float()
        return (pixels / 127.5 - 1).to(self.dtype)

    def _start_engine(self, required: bool) -> None:
        """Fast twins for both networks; where one cannot have one, an error if `required`, else the reference."""
        from .fast.engine import Engine
        from .fast.sampler import coefficients

        obstacle = None
        for name, kind in (("transformer", ReducioDiT), ("vae", ReducioVAE)):
            if type(getattr(self, name)) is not kind:
                obstacle = (
                    f"{name} is a {type(getattr(self, name)).__name__}, fast twins are built from {kind.__name__}"
                )
        try:
            coefficients(self.scheduler, 2)
        except ValueError as error:
            obstacle = f"scheduler: {error}"
        if obstacle is None:
            self._engine = Engine()
        elif required:
            raise ReducioError(f"backend: 'fast' cannot run this model: {obstacle}")
        else:
            self.backend = "reference"
            self.report = dict.fromkeys(self.report, f"reference: {obstacle}")

    @contextmanager
    def _stage(self, timings: dict[str, float], name: str) -> Iterator[None]:
        start = self._clock()
        yield
        timings[name] = timings.get(name, 0.0) + self._clock() - start

    def _clock(self) -> float:
        return clock(self.device)

    def _networks(self) -> list[nn.Module]:
        own = [c for c in (getattr(self, name) for name in folders.COMPONENTS) if isinstance(c, nn.Module)]
        return own + ([] if self.text_to_image is None else content.networks(self.text_to_image))

    def _check_components(self) -> None:
        """Refuse networks that cannot work together: told now, not by a shape error in the middle of a clip."""
        config = self.transformer.config
        text_channels = getattr(getattr(self.text_encoder, "config", None), "hidden_size", config.caption_channels)
        tower = getattr(self.image_encoder, "visual", None)
        semantic_channels = config.semantic_channels if tower is None else tower.ln_post.normalized_shape[0]
        for name, needed, source, given in (
            ("latent_channels", config.latent_channels, "vae", self.vae.config.latent_channels),
            ("caption_channels", config.caption_channels, "text_encoder", text_channels),
            ("semantic_channels", config.semantic_channels, "image_encoder", semantic_channels),
        ):
            if needed != given:
                raise ReducioError(f"transformer has {name}={needed}, {source} gives {given}")


def clock(device: torch.device) -> float:
    """Seconds, read when the device has finished what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run on after their launch returns
    return time.perf_counter()
