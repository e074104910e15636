"""The image encoder of the tiny model: a small CLIP tower, trained to classify and locate the shape in a frame."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...data import toy_world
from ...media.antialias import blur_and_resize
from ...pipelines.reducio.encoders import SemanticEncoder
from ..loop import LoopConfig
from ..recipe import Context


def draw_still(
    rng: np.random.Generator, held_out: bool = False, size: int = 128
) -> tuple[toy_world.Scene, np.ndarray, toy_world.Truth]:
    """A random scene and its content frame, uint8 [size, size, 3], with the `Truth` of that frame.

    Renders three frames instead of sixteen: the middle frame has the same distribution, at a sixth of the cost.
    """
    scene = toy_world.sample_scene(rng, held_out)
    frames, truth = toy_world.render_with_truth(scene, rng, size, num_frames=3)
    return scene, frames[1], toy_world.Truth(truth.centres[1:2], truth.radii[1:2], truth.alpha[1:2])


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticSettings:
    """Settings of an open_clip visual tower that learns what the content frame shows and where."""

    loop: LoopConfig
    batch: int = 64
    evaluated: int = 512  # held-out frames evaluated at the end
    frame_size: int = 128  # stills are drawn at the size of a content frame and then reduced, as in the pipeline
    max_noise: float = 0.04  # greatest standard deviation of added noise, for pixels in 0..1
    blurred_share: float = 0.25  # share of frames that are blurred, since generated content frames are softer
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "embed_dim": 128,
            "vision_cfg": {
                "image_size": 64,
                "patch_size": 8,
                "width": 128,
                "layers": 3,
                "head_width": 32,
                "output_tokens": True,
            },
        }
    )


class FrameReader(nn.Module):
    """The tower with its training heads, which read only the patch tokens, because the motion model uses only these.

    The tokens' mean predicts colour, shape and background. Each token predicts how much of its patch the shape covers,
    and the shape's position and size (x, y, radius in fractions of the frame).
    """

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(toy_world.ATTRIBUTES[name])) for name in VISIBLE})
        self.cover, self.place = nn.Linear(width, 1), nn.Linear(width, 3)

    def forward(self, images_B3HW: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        x_BPD = self.tower(images_B3HW)[1].float()
        mean_BD = x_BPD.mean(1)
        return {name: head(mean_BD) for name, head in self.heads.items()}, self.cover(x_BPD)[..., 0], self.place(x_BPD)


VISIBLE = ("colour", "shape", "background")  # the attributes that a single frame shows


def preprocess(frames: Tensor, encoder: SemanticEncoder) -> Tensor:
    """Convert frames B 3 H W in 0..1 to the tower's input, as the pipeline does."""
    x = blur_and_resize(frames, encoder.visual.image_size)
    return (x - encoder.mean) / encoder.std


def train_semantic(context: Context, settings: SemanticSettings) -> dict[str, float]:
    """Train and save `image_encoder/` in open_clip's format, visual tower only (`visual.*`)."""
    torch.manual_seed(settings.loop.seed)
    normal = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    encoder = SemanticEncoder({"model_cfg": settings.model, "preprocess_cfg": normal})
    reader = FrameReader(encoder.visual, settings.model["vision_cfg"]["width"])
    grid = encoder.visual.grid_size

    def batch(rng: np.random.Generator, size: int, held_out: bool) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        drawn = [draw_still(rng, held_out, settings.frame_size) for _ in range(size)]
        frames = torch.from_numpy(np.stack([frame for _, frame, _ in drawn])).permute(0, 3, 1, 2).float() / 255
        labels = {name: torch.tensor([scene.labels()[name] for scene, _, _ in drawn]) for name in VISIBLE}
        alpha = torch.from_numpy(np.stack([truth.alpha for _, _, truth in drawn]))
        cover_BP = F.adaptive_avg_pool2d(alpha, grid).flatten(1)
        place_B3 = torch.tensor(
            np.stack([(*truth.centres[0], truth.radii[0]) for _, _, truth in drawn]), dtype=torch.float32
        )
        return frames, labels, cover_BP, place_B3

    def loss_fn(step: int, _micro: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        frames, labels, cover, place = batch(rng, settings.batch, held_out=False)
        soft = round(settings.batch * settings.blurred_share)
        blurred = F.interpolate(frames[:soft], scale_factor=float(rng.uniform(0.3, 0.5)), mode="area")
        frames[:soft] = F.interpolate(blurred, frames.shape[-2:], mode="bilinear", align_corners=False)
        images = preprocess(frames, encoder)
        images = images + torch.rand(len(images), 1, 1, 1) * settings.max_noise / 0.27 * torch.randn_like(images)
        # The unfused attention: on a CPU the fused kernel's backward pass takes longer than the rest of this step.
        with sdpa_kernel(SDPBackend.MATH):
            logits, covers, places = reader(images.to(context.device))
        figures = {name: F.cross_entropy(logits[name], labels[name].to(context.device)) for name in VISIBLE}
        figures["cover"] = F.binary_cross_entropy_with_logits(covers, cover.to(context.device))
        figures["place"] = F.smooth_l1_loss(places, place[:, None].expand_as(places).to(context.device), beta=0.05)
        return sum(figures[name] for name in VISIBLE) + 2 * figures["cover"] + 10 * figures["place"], figures

    outcome = context.train("semantic", reader, loss_fn, settings)
    figures = {"steps": outcome.step, "seconds": outcome.seconds}
    with torch.inference_mode():
        frames, labels, cover, place = batch(
            np.random.default_rng((settings.loop.seed, 1 << 40)), settings.evaluated, held_out=True
        )
        logits, covers, places = reader(preprocess(frames, encoder).to(context.device))
        for name in VISIBLE:
            figures[f"{name}_right"] = float((logits[name].argmax(-1).cpu() == labels[name]).float().mean())
        figures["cover_error"] = float((covers.sigmoid().cpu() - cover).abs().mean())
        figures["place_error"] = float((places.cpu() - place[:, None]).abs().mean())
    encoder.save_pretrained(context.out / "image_encoder")
    return context.record("semantic", figures)
