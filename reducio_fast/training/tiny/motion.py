"""The motion diffusion transformer of the tiny model, trained on latents and conditions that are encoded once.

The pipeline's encoder classes compute the conditions. Letters in shapes: B batch, C channels, T frames, H W rows and
columns, L text positions, S semantic tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ByT5Tokenizer, T5EncoderModel

from ...checkpoints.networks import load_model, save_model
from ...checkpoints.strict_files import load_tensors, save_tensors
from ...data import toy_world
from ...pipelines.reducio.encoders import ContentEncoder, SemanticEncoder, TextEncoder
from ...reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from ...system.atomic_files import written_whole
from ..loop import LoopConfig
from ..mixed_precision import autocast
from ..recipe import Context
from ..reducio.objective import BETAS
from .video_autoencoder import as_video

TINY_DIT = DiTConfig(
    hidden_size=192,
    depth=6,
    num_heads=6,
    caption_channels=128,
    semantic_channels=128,
    learn_sigma=False,
    position_base_size=4,  # 128 pixels are 4 x 4 latent cells
)
ENCODERS = ("vae", "content_encoder", "image_encoder", "text_encoder", "tokenizer")
# Velocity instead of noise: the first sampling steps multiply the error of a noise prediction by 150.
NOISE_SCHEDULE = {**BETAS, "prediction_type": "v_prediction"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MotionSettings:
    """Settings of the transformer's training."""

    loop: LoopConfig
    pool: int = 4096  # encoded clips
    held_out_pool: int = 128  # encoded clips of held-out scenes, for the figures
    shard: int = 128  # samples in one file of the pool
    batch: int = 32
    text_drop: float = 0.1  # share of prompts replaced by the null text, for classifier-free guidance
    # Share of content frames that pass through the content autoencoder, since at inference stage one decodes them.
    decoded_share: float = 0.5
    portrait_share: float = 0.0  # share of clips whose content frame is a portrait, as stage one draws it
    size: int = 128
    config: DiTConfig = field(default_factory=lambda: TINY_DIT)

    def shards(self, held_out: bool) -> range:
        """Numbers of the pool's files."""
        count = self.held_out_pool if held_out else self.pool
        return range(-(-count // self.shard))


class Encoders:
    """The trained VAE and the three trained condition encoders, which encode a sample."""

    def __init__(self, out: Path) -> None:
        self.vae = load_model(ReducioVAE, VAEConfig, out / "vae").eval()
        self.content_vae = AutoencoderKL.from_pretrained(out / "content_encoder").eval()
        self.content = ContentEncoder(self.content_vae)
        self.semantic = SemanticEncoder.from_pretrained(out / "image_encoder").eval()
        text_model = T5EncoderModel.from_pretrained(out / "text_encoder").eval()
        self.text = TextEncoder(text_model, ByT5Tokenizer.from_pretrained(out / "tokenizer"), TINY_DIT.caption_length)

    @torch.no_grad()
    def encode(self, frames_BTHWC: np.ndarray, decoded: np.ndarray) -> dict[str, Tensor]:
        """Encode clips, uint8 [B, T, H, W, 3], into the transformer's latents and image conditions.

        `decoded` [B] marks the clips whose content frame passes through the content autoencoder first.
        """
        video = as_video(frames_BTHWC)
        with autocast(torch.device("cpu")):
            posterior = self.vae.encode(video)
        frame = self.content_frame(video, decoded)
        return {
            "mean": posterior.mean.float(),
            "logvar": posterior.logvar.float(),
            "semantic": self.semantic(frame).half(),
            "content": self.content(frame).half(),
        }

    @torch.no_grad()
    def content_frame(self, video_BCTHW: Tensor, decoded: np.ndarray) -> Tensor:
        """The centre frames [B, 3, H, W]; those marked in `decoded` [B] pass through the content autoencoder."""
        frame = video_BCTHW[:, :, self.vae.config.content_frame].clone()
        if decoded.any():
            chosen = torch.from_numpy(decoded)
            frame[chosen] = self.content_vae.decode(self.content(frame[chosen])).sample.clamp(-1, 1)
        return frame


def pool_clip(settings: MotionSettings, held_out: bool, index: int) -> tuple[str, np.ndarray, bool]:
    """Sample `index` of a pool: its caption, its clip, and whether its content frame is to be decoded."""
    rng = np.random.default_rng((settings.loop.seed, int(held_out), index))
    scene = toy_world.sample_scene(rng, held_out)
    portrait = settings.portrait_share > 0 and rng.random() < settings.portrait_share
    clip = toy_world.render(scene, rng, settings.size, portrait=portrait)
    return scene.caption(), clip, bool(rng.random() < settings.decoded_share)


def shard_path(folder: Path, held_out: bool, shard: int) -> Path:
    return folder / f"{'held_out' if held_out else 'training'}-{shard:04d}.safetensors"


def encode_shard(
    encoders: Encoders, settings: MotionSettings, held_out: bool, shard: int, folder: Path, key: str
) -> None:
    """Draw and encode one file of the pool. Sample i depends only on (seed, held_out, i), not on the order of files."""
    parts, captions = [], []
    for start in range(shard * settings.shard, (shard + 1) * settings.shard, 8):
        texts, clips, decoded = zip(*(pool_clip(settings, held_out, i) for i in range(start, start + 8)), strict=True)
        captions += texts
        parts.append(encoders.encode(np.stack(clips), np.array(decoded)))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tensors["caption"] = _as_bytes(captions)
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(shard_path(folder, held_out, shard)) as temporary:
        save_tensors(tensors, temporary, key=key)


def encode_pools(context: Context, settings: MotionSettings, encoders: Encoders, folder: Path) -> str:
    """Encode the files of both pools that this run cannot use, and return the pools' key."""
    chosen = {name: getattr(settings, name) for name in ("shard", "decoded_share", "portrait_share", "size")}
    key = context.pool_key(ENCODERS, seed=settings.loop.seed, **chosen)
    for held_out in (True, False):
        for shard in settings.shards(held_out):
            if not context.has_pool(shard_path(folder, held_out, shard), key):
                encode_shard(encoders, settings, held_out, shard, folder, key)
    return key


def _as_bytes(texts: list[str], width: int = 128) -> Tensor:
    """Strings as uint8 [B, width], padded with zeros, because safetensors files hold only tensors."""
    return torch.stack([torch.tensor(list(text.encode().ljust(width, b"\0")), dtype=torch.uint8) for text in texts])


class Pool:
    """Encoded samples in memory. Each distinct caption is encoded once; `batch` returns the model's inputs."""

    def __init__(self, folder: Path, settings: MotionSettings, held_out: bool, encoders: Encoders) -> None:
        files = [load_tensors(shard_path(folder, held_out, shard)) for shard in settings.shards(held_out)]
        self.tensors = {key: torch.cat([file[key] for file in files]) for key in files[0]}
        captions = [bytes(row.tolist()).rstrip(b"\0").decode() for row in self.tensors.pop("caption")]
        unique = sorted(set(captions))
        place = {caption: i for i, caption in enumerate(unique)}
        self.caption = torch.tensor([place[caption] for caption in captions])
        encoded = [encoders.text(unique[i : i + 64]) for i in range(0, len(unique), 64)]
        self.text = torch.cat([text.half() for text, _ in encoded])
        self.mask = torch.cat([mask for _, mask in encoded])

    def __len__(self) -> int:
        return len(self.caption)

    def batch(self, index: Tensor, device: str) -> dict[str, Tensor]:
        rows = {key: value[index].to(device).float() for key, value in self.tensors.items()}
        mask = self.mask[self.caption[index]]
        length = int(mask.sum(1).max())  # longest caption of the batch: text beyond it is masked padding
        rows["text"] = self.text[self.caption[index], :length].to(device).float()
        rows["text_mask"] = mask[:, :length].to(device)
        return rows


def train_motion(context: Context, settings: MotionSettings) -> dict[str, float]:
    """Train and save `transformer/` and `scheduler/`. Figures: velocity error on held-out scenes by noise level."""
    torch.manual_seed(settings.loop.seed)
    encoders, folder = Encoders(context.out), context.run_folder("motion") / "pool"
    key = encode_pools(context, settings, encoders, folder)
    pool, held_out_pool = (Pool(folder, settings, held_out, encoders) for held_out in (False, True))
    model, noiser = ReducioDiT(settings.config), DDPMScheduler(**NOISE_SCHEDULE)

    def velocity_error(rows: dict[str, Tensor], timestep: Tensor, drop: Tensor) -> Tensor:
        """Mean squared error of the velocity for each clip [B]."""
        latent = rows["mean"] + (0.5 * rows["logvar"]).exp() * torch.randn_like(rows["mean"])
        latent = encoders.vae.normalize_latent(latent)
        noise = torch.randn_like(latent)
        null = model.null_text[: rows["text"].shape[1]]
        text = torch.where(drop[:, None, None], null, rows["text"])
        noisy = noiser.add_noise(latent, noise, timestep)
        with sdpa_kernel(SDPBackend.MATH):  # on a CPU the fused kernel's backward pass makes a step a third longer
            prediction = model(noisy, timestep, text, rows["text_mask"], rows["semantic"], rows["content"])
        target = noiser.get_velocity(latent, noise, timestep)
        return F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)

    def loss_fn(step: int, _micro: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = pool.batch(torch.from_numpy(rng.integers(len(pool), size=settings.batch)), context.device)
        # One timestep in each of B equal intervals: uniform like independent draws, but the loss varies less.
        place = (torch.arange(settings.batch) + torch.rand(settings.batch)) / settings.batch
        steps = noiser.config.num_train_timesteps
        timestep = (place * steps).long().clamp(max=steps - 1).to(context.device)  # float32 rounds a place up to 1
        drop = (torch.rand(settings.batch) < settings.text_drop).to(context.device)
        error = velocity_error(rows, timestep, drop)
        half = settings.batch // 2
        return error.mean(), {"low_noise": error[:half].mean().detach(), "high_noise": error[half:].mean().detach()}

    outcome = context.train("motion", model, loss_fn, settings, encoded=key)
    figures = {"steps": outcome.step, "seconds": outcome.seconds} | outcome.last
    rows = held_out_pool.batch(torch.arange(len(held_out_pool)), context.device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.loop.seed)
        keep = torch.zeros(len(held_out_pool), dtype=torch.bool, device=context.device)
        for level in (100, 300, 500, 700, 900):
            timestep = torch.full((len(held_out_pool),), level, device=context.device)
            figures[f"held_out_{level}"] = float(velocity_error(rows, timestep, keep).mean())
    save_model(model, context.out / "transformer")
    DPMSolverMultistepScheduler(**NOISE_SCHEDULE, algorithm_type="dpmsolver++", solver_order=2).save_pretrained(
        context.out / "scheduler"
    )
    return context.record("motion", figures)
