"""The image encoder of the small embedded SVD: transformers' CLIP tower, 32 channels wide instead of 1280. It is
trained to encode in one token what the picture shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ...checkpoints.networks import quiet_transformers
from ...checkpoints.published_svd import FEATURE_EXTRACTOR
from ...data import toy_world
from ...media.antialias import blur_and_resize
from ...media.pixels import to_unit
from ...pipelines.svd.conditioner import CLIP_SIZE
from ..loop import LoopConfig
from ..recipe import Context
from .toy_clips import SIZE

VISIBLE = ("colour", "shape", "background")  # the attributes that a single frame shows


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEncoderSettings:
    loop: LoopConfig
    batch: int = 32
    evaluated: int = 256  # held-out pictures evaluated at the end
    size: int = SIZE
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 28,
            "image_size": CLIP_SIZE[0],
            "projection_dim": 32,
            "hidden_act": "gelu",
        }
    )


class PictureReader(nn.Module):
    """The tower with its training heads, for colour, shape and background, and for the position (x, y, radius)."""

    def __init__(self, tower: CLIPVisionModelWithProjection, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(toy_world.ATTRIBUTES[name])) for name in VISIBLE})
        self.place = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        token = self.tower(images).image_embeds.float()
        return {name: head(token) for name, head in self.heads.items()}, self.place(token)


def preprocess(frames: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] to the tower's input, as the pipeline does it."""
    mean, std = (
        torch.tensor(FEATURE_EXTRACTOR[name])[:, None, None].to(frames) for name in ("image_mean", "image_std")
    )
    return ((blur_and_resize(frames, CLIP_SIZE) + 1) / 2 - mean) / std


def train_image_encoder(context: Context, settings: ImageEncoderSettings) -> dict[str, float]:
    """Train and save `image_encoder/`. Figures: accuracy of each attribute on held-out pictures, and the mean error of
    x, y and radius in fractions of the frame."""
    torch.manual_seed(settings.loop.seed)
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings.model))
    reader = PictureReader(tower, settings.model["projection_dim"])

    def batch(rng: np.random.Generator, count: int, held_out: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        scenes = [toy_world.sample_scene(rng, held_out) for _ in range(count)]
        drawn = [toy_world.render_with_truth(scene, rng, settings.size, num_frames=1) for scene in scenes]
        frames = to_unit(np.stack([frame[0] for frame, _ in drawn]))
        labels = {name: torch.tensor([scene.labels()[name] for scene in scenes]) for name in VISIBLE}
        place = torch.tensor(np.array([(*truth.centres[0], truth.radii[0]) for _, truth in drawn]), dtype=torch.float32)
        return preprocess(frames), labels, place

    def loss_fn(step: int, _micro: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels, place = batch(rng, settings.batch, held_out=False)
        with sdpa_kernel(SDPBackend.MATH):  # on a CPU the fused kernel's backward pass is the slower one
            logits, places = reader(images.to(context.device))
        figures = {name: F.cross_entropy(logits[name], labels[name].to(context.device)) for name in VISIBLE}
        figures["place"] = F.smooth_l1_loss(places, place.to(context.device), beta=0.05)
        return sum(figures[name] for name in VISIBLE) + 10 * figures["place"], figures

    outcome = context.train("image_encoder", reader, loss_fn, settings)
    figures = {"steps": outcome.step, "seconds": outcome.seconds}
    with torch.inference_mode():
        images, labels, place = batch(np.random.default_rng((settings.loop.seed, 1 << 40)), settings.evaluated, True)
        logits, places = reader(images.to(context.device))
        for name in VISIBLE:
            figures[f"{name}_right"] = float((logits[name].argmax(-1).cpu() == labels[name]).float().mean())
        figures["place_error"] = float((places.cpu() - place).abs().mean())
    with quiet_transformers():
        tower.save_pretrained(context.out / "image_encoder")
    return context.record("image_encoder", figures)
