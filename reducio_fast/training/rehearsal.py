"""Latents as the sampler leaves them, and the clips they ought to decode to: what the decoder learns from last.

A generated latent is never the encoder's: guidance exaggerates it, and what the transformer is unsure of comes out
averaged. A decoder that has only seen encoded latents draws rounder shapes from it than it could. A latent sampled from
nothing has no true clip to learn from, so samples here start half-way: a clip's own latent is noised to a middle step,
which leaves where things are and blurs the rest, and the pipeline's scheduler and guidance take it from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from reducio_fast.checkpoints import load_model, load_tensors, save_tensors
from reducio_fast.reference import DiTConfig, ReducioDiT

from .loop import atomic_write
from .motion import NOISE_SCHEDULE, Encoders, MotionSettings, Pool, pool_clip
from .stage import Context
from .video_autoencoder import VAESettings, as_video, train_vae

FOLDER, FILE = "rehearsal", "samples.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsalSettings:
    """Which samples of the motion stage's pool are rehearsed, and how."""

    motion: MotionSettings
    samples: int = 3072
    batch: int = 32  # samples that start at one step
    steps: int = 20
    first_steps: tuple[int, int] = (8, 15)  # the step a batch starts at is drawn from this range, of `steps`
    guidance_scale: float = 4.5
    seed: int = 16


def rehearse(context: Context, settings: RehearsalSettings) -> dict[str, float]:
    """Writes `runs/rehearsal/`. Figure: how far the latents have moved from the encoder's, as a share of their norm."""
    encoders, pool_folder = Encoders(context.out), context.run_folder("motion") / "pool"
    pool = Pool(pool_folder, settings.motion, False, encoders)
    model = load_model(ReducioDiT, DiTConfig, context.out / "transformer").eval()
    count = min(settings.samples, len(pool))
    latents, frames, moved = [], [], []
    for start in range(0, count, settings.batch):
        index = torch.arange(start, min(start + settings.batch, count))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed + start)
            first = int(torch.randint(*settings.first_steps, ()))
            rows = pool.batch(index, "cpu")
            encoded = encoders.vae.normalize_latent(rows["mean"])
            latent = _resample(model, rows, encoded, first, settings)
        clips, decoded = zip(*(pool_clip(settings.motion, False, int(i))[1:] for i in index), strict=True)
        frame = encoders.content_frame(as_video(np.stack(clips)), np.array(decoded))
        latents.append(latent.half())
        frames.append(((frame + 1) * 127.5).round().to(torch.uint8))
        moved.append(float((latent - encoded).norm() / encoded.norm()))
    tensors = {"latent": torch.cat(latents), "frame": torch.cat(frames)}
    atomic_write(context.run_folder(FOLDER) / FILE, lambda path: save_tensors(tensors, path))
    return context.record(FOLDER, {"samples": count, "moved": float(np.mean(moved))})


@torch.no_grad()
def _resample(
    model: ReducioDiT, rows: dict[str, Tensor], encoded: Tensor, first: int, settings: RehearsalSettings
) -> Tensor:
    """`encoded` [B, 16, T, H, W] with the noise of step `first`, denoised from there on as the pipeline does."""
    scheduler = DPMSolverMultistepScheduler(**NOISE_SCHEDULE, algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(settings.steps)
    scheduler.set_begin_index(first)
    timesteps = scheduler.timesteps[first:]
    noise = torch.randn_like(encoded)
    latent = DDPMScheduler(**NOISE_SCHEDULE).add_noise(encoded, noise, timesteps[:1].expand(len(encoded)))
    null = model.null_text[: rows["text"].shape[1]].expand_as(rows["text"])
    twice = {key: torch.cat([rows[key]] * 2) for key in ("text_mask", "semantic", "content")}
    text = torch.cat([null, rows["text"]])
    for timestep in timesteps:
        both = torch.cat([latent, latent])
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(both, timestep.expand(len(both)), text, **twice).float()
        without, with_text = velocity.chunk(2)
        guided = without + settings.guidance_scale * (with_text - without)
        latent = scheduler.step(guided, timestep, latent, return_dict=False)[0]
    return latent


class Rehearsed:
    """The samples in memory: `draw` gives clips [B, 3, T, H, W], latents and content frames [B, 3, H, W]."""

    def __init__(self, folder: Path, settings: MotionSettings) -> None:
        self.tensors, self.settings = load_tensors(folder / FILE), settings

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
        index = rng.integers(len(self.tensors["latent"]), size=count)
        video = as_video(np.stack([pool_clip(self.settings, False, int(i))[1] for i in index]))
        return video, self.tensors["latent"][index].float(), self.tensors["frame"][index].float() / 127.5 - 1


def train_rehearsed(context: Context, settings: VAESettings, stage: str, motion: MotionSettings) -> dict[str, float]:
    """`train_vae` with the rehearsed samples beside encoded ones; `motion` is what their pool was made with."""
    return train_vae(context, settings, stage, Rehearsed(context.run_folder(FOLDER), motion).draw)
