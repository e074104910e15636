"""The conditioning inputs of a Reducio-DiT: text, semantic tokens and the content latent; and guidance by text."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..sampler import Denoiser, Guided


@dataclasses.dataclass(frozen=True, slots=True)
class Condition:
    """The conditioning inputs, in the shapes that `ReducioDiT` takes: text [B, L, C] and, if given, text_mask [B, L],
    semantic [B, n, C], content [B, C, h, w] and clip [B, 2] (frame rate and motion)."""

    text: Tensor
    text_mask: Tensor | None = None
    semantic: Tensor | None = None
    content: Tensor | None = None
    clip: Tensor | None = None

    def without_text(self, null_text: Tensor) -> Condition:
        """The unconditional half of guidance: `null_text` [L, C] under the prompt's own mask, as in PixArt-alpha.

        The image stays. Raises ValueError where the lengths or widths differ.
        """
        if null_text.shape != self.text.shape[1:]:
            raise ValueError(f"null_text has shape {tuple(null_text.shape)}, a prompt has {tuple(self.text.shape[1:])}")
        return dataclasses.replace(self, text=null_text.to(self.text).expand_as(self.text))


def join(first: Condition, second: Condition) -> Condition:
    """Both conditions in one batch, `first` (of guidance: the unconditional one) in its first half.

    Raises ValueError where they differ in shape.
    """
    joined = {}
    for field in dataclasses.fields(Condition):
        a, b = getattr(first, field.name), getattr(second, field.name)
        shapes = [None if x is None else tuple(x.shape) for x in (a, b)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{field.name} is {shapes[0]} in the unconditional half, {shapes[1]} in the conditional one"
            )
        joined[field.name] = None if a is None else torch.cat([a, b.to(a)])
    return Condition(**joined)


def denoiser(model: Any, cond: Condition, uncond: Condition | None = None, guidance_scale: float = 1.0) -> Denoiser:
    """The function that `sample` calls once per step: `model` with a condition, guided away from `uncond` if the scale
    exceeds 1.

    model: called as `ReducioDiT` is; a variance that it predicts is dropped. `uncond` defaults to
    `cond.without_text(model.null_text)`. Raises ValueError where the two conditions differ in shape.
    """

    def conditioned(condition: Condition) -> Denoiser:
        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            text, mask, semantic, content = condition.text, condition.text_mask, condition.semantic, condition.content
            optional = {} if condition.clip is None else {"clip": condition.clip}
            prediction = model(x, timestep.expand(len(x)), text, mask, semantic, content, **optional)
            return prediction[:, : x.shape[1]].to(x.dtype)

        return predict

    if not guidance_scale > 1:
        return conditioned(cond)
    both = conditioned(join(cond.without_text(model.null_text) if uncond is None else uncond, cond))
    return Guided(lambda x, timestep: both(torch.cat([x, x]), timestep), conditioned(cond), guidance_scale)
