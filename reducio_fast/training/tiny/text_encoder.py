"""The text encoder of the tiny model, trained to classify the attributes that a caption names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from ...checkpoints.networks import quiet_transformers
from ...data import toy_world
from ..loop import LoopConfig
from ..recipe import Context

CAPTION_LENGTH = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings:
    """Settings of a byte-level T5 encoder that learns the attributes of a caption."""

    loop: LoopConfig
    batch: int = 64
    evaluated: int = 512  # held-out captions of each kind (clean, reworded) evaluated at the end
    clean_share: float = 0.5  # share of captions in the form of `Scene.caption`; the others are reworded
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 384,  # ByT5's: 3 special tokens, 256 bytes, 125 sentinels
            "d_model": 128,
            "num_layers": 3,
            "num_heads": 4,
            "d_kv": 32,
            "d_ff": 256,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
        }
    )


class CaptionReader(nn.Module):
    """The encoder with one linear head per attribute on the mean over the caption. Only the encoder is saved."""

    def __init__(self, encoder: T5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        # One more class than the attribute has values: the caption does not name the attribute.
        self.heads = nn.ModuleDict(
            {name: nn.Linear(encoder.config.d_model, len(known) + 1) for name, known in toy_world.ATTRIBUTES.items()}
        )

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, Tensor]:
        x_BLD = self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state.float()
        weight_BL1 = mask_BL[..., None].float()
        mean_BD = (x_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)
        return {name: head(mean_BD) for name, head in self.heads.items()}


def reword(scene: toy_world.Scene, rng: np.random.Generator) -> tuple[str, dict[str, int]]:
    """A caption as users type it (omissions, other case, a typo), with labels of the attributes that it still names."""
    text, labels = scene.caption(), scene.labels()
    unnamed = {name: len(known) for name, known in toy_world.ATTRIBUTES.items()}
    if rng.random() < 0.2:
        text = text[: text.index(" on a")]
        labels["background"] = unnamed["background"]
    if rng.random() < 0.12:
        action = f" moving {scene.motion}" if scene.motion in toy_world.DIRECTIONS else f" {scene.motion}"
        text = text.replace(f"{action} {scene.speed}".rstrip(), "", 1)
        labels |= {"motion": unnamed["motion"], "speed": unnamed["speed"]}
    elif scene.motion in toy_world.DIRECTIONS and rng.random() < 0.3:
        phrases = [f" {scene.motion}", f" moves {scene.motion}", f" going {scene.motion}"]
        if scene.motion in ("left", "right"):
            phrases.append(f" moving to the {scene.motion}")
        text = text.replace(f" moving {scene.motion}", phrases[rng.integers(len(phrases))], 1)
    if rng.random() < 0.1:
        text = text.replace(f"{scene.colour} ", "", 1)
        labels["colour"] = unnamed["colour"]
    if rng.random() < 0.3:
        text = text.split(" ", 1)[1] if text.startswith(("a ", "an ")) else text
    if rng.random() < 0.3:
        text = (text.upper(), text.title(), text.capitalize())[rng.integers(3)]
    if rng.random() < 0.2:
        text = text.replace(" ", " " * int(rng.integers(2, 4)), int(rng.integers(1, 4)))
    if rng.random() < 0.15:
        # Drop one letter, but not of a short word: "up" without a letter is no longer recognisable.
        place = int(rng.integers(len(text)))
        word_length = len(text[: place + 1].split(" ")[-1]) + len(text[place + 1 :].split(" ")[0])
        if word_length > 4:
            text = text[:place] + text[place + 1 :]
    if rng.random() < 0.2:
        text += "."
    return text, labels


def tokenize(tokenizer: ByT5Tokenizer, texts: list[str], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L], padded to the longest text or to `pad_to` tokens, and cut at `CAPTION_LENGTH`."""
    padding = {"padding": "longest"} if pad_to is None else {"padding": "max_length"}
    batch = tokenizer(texts, max_length=pad_to or CAPTION_LENGTH, truncation=True, return_tensors="pt", **padding)
    return batch.input_ids, batch.attention_mask


def train_text(context: Context, settings: TextSettings) -> dict[str, float]:
    """Train and save `text_encoder/` and `tokenizer/`. Figures: accuracy of each attribute on held-out captions."""
    torch.manual_seed(settings.loop.seed)
    tokenizer = ByT5Tokenizer()
    reader = CaptionReader(T5EncoderModel(T5Config(**settings.model)))

    def batch(rng: np.random.Generator, size: int, clean_share: float, held_out: bool) -> tuple[Tensor, Tensor, dict]:
        pairs = []
        for _ in range(size):
            scene = toy_world.sample_scene(rng, held_out)
            pairs.append((scene.caption(), scene.labels()) if rng.random() < clean_share else reword(scene, rng))
        labels = {name: torch.tensor([label[name] for _, label in pairs]) for name in toy_world.ATTRIBUTES}
        return *tokenize(tokenizer, [text for text, _ in pairs]), labels

    def loss_fn(step: int, _micro: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        ids, mask, labels = batch(rng, settings.batch, settings.clean_share, held_out=False)
        logits = reader(ids.to(context.device), mask.to(context.device))
        losses = {name: F.cross_entropy(logits[name], labels[name].to(context.device)) for name in labels}
        return sum(losses.values()), losses

    outcome = context.train("text", reader, loss_fn, settings)
    figures = {"steps": outcome.step, "seconds": outcome.seconds}
    with torch.inference_mode():
        for kind, clean_share in (("clean", 1.0), ("reworded", 0.0)):
            ids, mask, labels = batch(
                np.random.default_rng((settings.loop.seed, 1 << 40)), settings.evaluated, clean_share, held_out=True
            )
            logits = reader(ids.to(context.device), mask.to(context.device))
            right = torch.stack([logits[name].argmax(-1).cpu() == labels[name] for name in labels])
            figures |= {f"{kind}_{name}": float(row.float().mean()) for name, row in zip(labels, right, strict=True)}
            figures[f"{kind}_all"] = float(right.all(0).float().mean())
    with quiet_transformers():
        reader.encoder.save_pretrained(context.out / "text_encoder")
        tokenizer.save_pretrained(context.out / "tokenizer")
    return context.record("text", figures)
