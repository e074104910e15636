"""The condition encoders of the tiny model: a byte-level T5 for captions, an open_clip tower for the content frame.

Each stage trains one component against the toy world and writes it in the component's own save format (transformers,
open_clip), float32, under the output folder. Letters in shapes: B batch, L text positions, P image patches, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from reducio_fast.checkpoints import quiet_transformers
from reducio_fast.encoders import SemanticEncoder

from . import world
from .loop import LoopConfig
from .stage import Context

CAPTION_LENGTH = 120

# --- text
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings:
    """A byte-level T5 encoder, taught to know the attributes a caption names."""

    loop: LoopConfig
    batch: int = 64
    judged: int = 512  # held-out captions of each kind that are read at the end
    clean_share: float = 0.5  # captions exactly as the world writes them; the others are reworded
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
    """The encoder with one linear head per attribute on the mean over the caption. Only the encoder is kept."""

    def __init__(self, encoder: T5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        # One class more than the world has: "the caption does not say".
        self.heads = nn.ModuleDict(
            {name: nn.Linear(encoder.config.d_model, len(known) + 1) for name, known in world.ATTRIBUTES.items()}
        )

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, Tensor]:
        x_BLD = self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state.float()
        weight_BL1 = mask_BL[..., None].float()
        mean_BD = (x_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)
        return {name: head(mean_BD) for name, head in self.heads.items()}


def reword(scene: world.Scene, rng: np.random.Generator) -> tuple[str, dict[str, int]]:
    """A caption as people type it (parts left out, other case, a typo), with labels for what it still says."""
    text, labels = scene.caption(), scene.labels()
    silent = {name: len(known) for name, known in world.ATTRIBUTES.items()}
    if rng.random() < 0.2:
        text = text[: text.index(" on a")]
        labels["background"] = silent["background"]
    if rng.random() < 0.12:
        action = f" moving {scene.motion}" if scene.motion in world.DIRECTIONS else f" {scene.motion}"
        text = text.replace(f"{action} {scene.speed}".rstrip(), "", 1)
        labels |= {"motion": silent["motion"], "speed": silent["speed"]}
    elif scene.motion in world.DIRECTIONS and rng.random() < 0.3:
        phrases = [f" {scene.motion}", f" moves {scene.motion}", f" going {scene.motion}"]
        if scene.motion in ("left", "right"):
            phrases.append(f" moving to the {scene.motion}")
        text = text.replace(f" moving {scene.motion}", phrases[rng.integers(len(phrases))], 1)
    if rng.random() < 0.1:
        text = text.replace(f"{scene.colour} ", "", 1)
        labels["colour"] = silent["colour"]
    if rng.random() < 0.3:
        text = text.split(" ", 1)[1] if text.startswith(("a ", "an ")) else text
    if rng.random() < 0.3:
        text = (text.upper(), text.title(), text.capitalize())[rng.integers(3)]
    if rng.random() < 0.2:
        text = text.replace(" ", " " * int(rng.integers(2, 4)), int(rng.integers(1, 4)))
    if rng.random() < 0.15:
        # One letter lost, but not from the short words that are all that tells two attributes apart ("up").
        place = int(rng.integers(len(text)))
        word_length = len(text[: place + 1].split(" ")[-1]) + len(text[place + 1 :].split(" ")[0])
        if word_length > 4:
            text = text[:place] + text[place + 1 :]
    if rng.random() < 0.2:
        text += "."
    return text, labels


def tokenize(tokenizer: ByT5Tokenizer, texts: list[str], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L], padded to the longest of the batch, or to `pad_to`; cut at `CAPTION_LENGTH`."""
    padding = {"padding": "longest"} if pad_to is None else {"padding": "max_length"}
    batch = tokenizer(texts, max_length=pad_to or CAPTION_LENGTH, truncation=True, return_tensors="pt", **padding)
    return batch.input_ids, batch.attention_mask


def train_text(context: Context, settings: TextSettings) -> dict[str, float]:
    """Trains and saves `text_encoder/` and `tokenizer/`. Figures: shares of held-out captions that are read rightly."""
    torch.manual_seed(settings.loop.seed)
    tokenizer = ByT5Tokenizer()
    reader = CaptionReader(T5EncoderModel(T5Config(**settings.model)))

    def batch(rng: np.random.Generator, size: int, clean_share: float, held_out: bool) -> tuple[Tensor, Tensor, dict]:
        pairs = []
        for _ in range(size):
            scene = world.sample_scene(rng, held_out)
            pairs.append((scene.caption(), scene.labels()) if rng.random() < clean_share else reword(scene, rng))
        labels = {name: torch.tensor([label[name] for _, label in pairs]) for name in world.ATTRIBUTES}
        return *tokenize(tokenizer, [text for text, _ in pairs]), labels

    def loss_fn(step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        ids, mask, labels = batch(rng, settings.batch, settings.clean_share, held_out=False)
        logits = reader(ids.to(context.device), mask.to(context.device))
        losses = {name: F.cross_entropy(logits[name], labels[name].to(context.device)) for name in labels}
        return sum(losses.values()), losses

    outcome = context.train("text", reader, loss_fn, settings.loop)
    figures = {"steps": outcome.step, "seconds": outcome.seconds}
    with torch.inference_mode():
        for kind, clean_share in (("clean", 1.0), ("reworded", 0.0)):
            ids, mask, labels = batch(
                np.random.default_rng((settings.loop.seed, 1 << 40)), settings.judged, clean_share, held_out=True
            )
            logits = reader(ids.to(context.device), mask.to(context.device))
            right = torch.stack([logits[name].argmax(-1).cpu() == labels[name] for name in labels])
            figures |= {f"{kind}_{name}": float(row.float().mean()) for name, row in zip(labels, right, strict=True)}
            figures[f"{kind}_all"] = float(right.all(0).float().mean())
    with quiet_transformers():
        reader.encoder.save_pretrained(context.out / "text_encoder")
        tokenizer.save_pretrained(context.out / "tokenizer")
    return context.record("text", figures)


# --- semantics
# ------------------------------------------------------------------------------------------------------------


def draw_still(
    rng: np.random.Generator, held_out: bool = False, size: int = 128
) -> tuple[world.Scene, np.ndarray, world.Truth]:
    """A scene and its content frame: uint8 [size, size, 3], with a `Truth` of that one frame.

    Three frames stand for the clip: their middle one is distributed like the middle of sixteen, at a sixth of the cost.
    """
    scene = world.sample_scene(rng, held_out)
    frames, truth = world.render_with_truth(scene, rng, size, num_frames=3)
    return scene, frames[1], world.Truth(truth.centres[1:2], truth.radii[1:2], truth.alpha[1:2])


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticSettings:
    """An open_clip visual tower, taught what is in the content frame and where."""

    loop: LoopConfig
    batch: int = 64
    judged: int = 512  # held-out frames that are read at the end
    frame_size: int = 128  # stills are drawn at the size of a content frame and then reduced, as in the pipeline
    max_noise: float = 0.04  # of the 0..1 range
    blurred_share: float = 0.25  # generated content frames are softer than drawn ones
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
    """The tower with the heads it is trained through. Only the patch tokens are asked: the motion model sees no others.

    Their mean tells colour, shape and background; each single one tells how much of its patch the shape covers, and
    where in the frame the shape is and how large (x, y, radius in fractions of the frame).
    """

    def __init__(self, tower: VisionTransformer, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(world.ATTRIBUTES[name])) for name in VISIBLE})
        self.cover, self.place = nn.Linear(width, 1), nn.Linear(width, 3)

    def forward(self, images_B3HW: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        x_BPD = self.tower(images_B3HW)[1].float()
        mean_BD = x_BPD.mean(1)
        return {name: head(mean_BD) for name, head in self.heads.items()}, self.cover(x_BPD)[..., 0], self.place(x_BPD)


VISIBLE = ("colour", "shape", "background")
"""The attributes a single frame shows."""


def preprocess(frames: Tensor, encoder: SemanticEncoder) -> Tensor:
    """B 3 H W in 0..1 to the tower's input, as the pipeline does it."""
    x = F.interpolate(frames, encoder.visual.image_size, mode="bicubic", align_corners=True, antialias=True)
    return (x - encoder.mean) / encoder.std


def train_semantic(context: Context, settings: SemanticSettings) -> dict[str, float]:
    """Trains and saves `image_encoder/` in open_clip's format, visual tower only (`visual.*`)."""
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

    def loss_fn(step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        frames, labels, cover, place = batch(rng, settings.batch, held_out=False)
        soft = round(settings.batch * settings.blurred_share)
        blurred = F.interpolate(frames[:soft], scale_factor=float(rng.uniform(0.3, 0.5)), mode="area")
        frames[:soft] = F.interpolate(blurred, frames.shape[-2:], mode="bilinear", align_corners=False)
        images = preprocess(frames, encoder)
        images = images + torch.rand(len(images), 1, 1, 1) * settings.max_noise / 0.27 * torch.randn_like(images)
        # Exact maths instead of the fused kernel: its backward pass on a CPU takes longer than all the rest of this
        # step.
        with sdpa_kernel(SDPBackend.MATH):
            logits, covers, places = reader(images.to(context.device))
        figures = {name: F.cross_entropy(logits[name], labels[name].to(context.device)) for name in VISIBLE}
        figures["cover"] = F.binary_cross_entropy_with_logits(covers, cover.to(context.device))
        figures["place"] = F.smooth_l1_loss(places, place[:, None].expand_as(places).to(context.device), beta=0.05)
        return sum(figures[name] for name in VISIBLE) + 2 * figures["cover"] + 10 * figures["place"], figures

    outcome = context.train("semantic", reader, loss_fn, settings.loop)
    figures = {"steps": outcome.step, "seconds": outcome.seconds}
    with torch.inference_mode():
        frames, labels, cover, place = batch(
            np.random.default_rng((settings.loop.seed, 1 << 40)), settings.judged, held_out=True
        )
        logits, covers, places = reader(preprocess(frames, encoder).to(context.device))
        for name in VISIBLE:
            figures[f"{name}_right"] = float((logits[name].argmax(-1).cpu() == labels[name]).float().mean())
        figures["cover_error"] = float((covers.sigmoid().cpu() - cover).abs().mean())
        figures["place_error"] = float((places.cpu() - place[:, None]).abs().mean())
    encoder.save_pretrained(context.out / "image_encoder")
    return context.record("semantic", figures)
