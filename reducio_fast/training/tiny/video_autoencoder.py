"""The video autoencoder of the tiny model. One loop first trains the encoder on motion, then encoder and decoder; a
second loop trains the encoder alone against the finished decoder.

Frames grow from 64 to 256 pixels per side. Clips are real video, photographs under camera moves, and scenes of the toy
world. Letters in shapes: B batch, T frames, H W rows and columns, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.networks import save_model
from ...data import optical_flow, photos, real_video, toy_world
from ...data.latent_shards import files_checksum
from ...media.pixels import to_unit
from ...media.similarity import psnr_of_error
from ...reference import ReducioVAE, VAEConfig
from ...reference.reducio.fusion import CrossAttention
from ...reference.reducio.vae import ResBlock, SelfAttention
from ..loop import LoopConfig
from ..recipe import Context

TINY_VAE = VAEConfig(
    base_channels=16,  # fewer channels are slower: the vector registers of a CPU hold 16 floats
    channel_multipliers=(1, 1, 2, 4, 4, 4),
    content_base_channels=16,
    content_channel_multipliers=(1, 1, 2, 4),
    # Addition aligns content and video in space from the first step. Attention, at H/4 and H/8 as in the release,
    # handles what a flow cannot represent: a surface that turns or is uncovered.
    fusion=("attn", "add", "add+attn", "add+attn", "attn", "attn"),
    fusion_levels=(None, 1, 2, 3, None, None),
    fusion_position="sincos",
    output="warp",
    # No residual blocks at full resolution: six convolutions there are 40% of the computation and hardly help.
    num_res_blocks=(0, 1, 1, 1, 1, 1),
    # Large groups, because a group norm removes the mean of each group: groups of two channels lose the brightness.
    norm_groups=2,
    num_heads=4,
    fusion_head_dim=16,
)
START_LOGVAR = -6.0
FULL_SIZE = 128  # least pixels per side at which clips are drawn; smaller clips are crops of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the run, which ends at the share `until` of the steps: contents of a batch and active losses.

    `video_share` and `photo_share` are shares of the clips; the remaining clips are scenes of the toy world.
    """

    until: float
    size: int  # pixels per side
    batch: int
    video_share: float = 0.3
    photo_share: float = 0.35
    decodes: bool = True  # False trains the encoder alone, on optical flow
    flow_weight: float = 0.3  # weight of the flow losses


# The encoder trains first. A wrong flow is no better for the decoder than a repeated content frame, so encoder and
# decoder trained together did not learn motion in 700 steps. An encoder with only the flow of the latent's cells as its
# target did not in 400. With the motion between frames at H/4 as a second target (256 positions per frame instead of
# 4), the encoder starts to learn motion after 350 steps.
PHASES = (
    Phase(until=0.366, size=64, batch=8, video_share=0.15, photo_share=0.65, decodes=False, flow_weight=1.0),
    Phase(until=0.615, size=64, batch=4),
    Phase(until=0.988, size=128, batch=2),
    Phase(until=1.0, size=256, batch=1, flow_weight=0.0),
)
# Batches of the encoder's own loop. A clip of 256 pixels takes eight times as long as one of 128, one of 192 three.
ENCODER_BATCHES = (
    *[Phase(until=1.0, size=128, batch=4, video_share=0.45, photo_share=0.2, flow_weight=0.0)] * 4,
    Phase(until=1.0, size=192, batch=2, video_share=0.45, photo_share=0.2, flow_weight=0.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """The encoder's own loop; the data are those of `VAESettings`."""

    loop: LoopConfig
    batches: tuple[Phase, ...] = ENCODER_BATCHES  # in turn
    floor: float = 0.02  # error (root mean square) below which a clip gains little: 40 dB


@dataclass(frozen=True, slots=True, kw_only=True)
class VAESettings:
    """Data and losses of the autoencoder's training."""

    loop: LoopConfig
    phases: tuple[Phase, ...] = PHASES
    encoder: EncoderSettings | None = None  # None: the encoder is not trained alone afterwards
    parallax_share: float = 0.2  # share of the photographs with a second picture in front
    portrait_share: float = 0.5  # share of the scenes whose content frame is a portrait, as in generated clips
    # Added to the loss weight of moving pixels; the mean weight of a clip stays 1. In a scene few pixels move, and
    # without it their outlines stay blurred longest. Under a camera move all pixels move and the weights are equal.
    moving_weight: float = 4.0
    # Pixel errors are divided by the error of the clip's repeated content frame (root mean square, plus this): a real
    # clip that moves little counts as much as a scene. With absolute errors such clips came out up to 1.9 dB worse than
    # a still.
    still_floor: float = 0.03
    # Greatest standard deviation of noise added to the normalised latent, because a generated latent is never exact.
    latent_noise: float = 0.1
    kl_weight: float = 1e-6  # weight of the KL divergence summed over a latent, as in the release
    config: VAEConfig = field(default_factory=lambda: TINY_VAE)

    def phase(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.until * self.loop.steps)


@torch.no_grad()
def initialize(vae: ReducioVAE) -> None:
    """Initialise variance-preserving convolutions and zero residual branches; the decoder returns the content frame.

    PyTorch's default shrinks the signal by 1.7 at every convolution, so that after six levels only the noise of the
    branches remains. The posterior starts narrow, because one as wide as the prior would hide the signal.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, SelfAttention):
            nn.init.zeros_(module.proj_out.weight)
        elif isinstance(module, CrossAttention):
            nn.init.zeros_(module.to_out[0].weight)
    if vae.warp is not None:
        nn.init.zeros_(vae.decoder.conv_out.weight)
        nn.init.normal_(vae.warp.flow.weight, std=0.02)
    # 95% of a random filter's output comes from the mean of the picture, which hides motion. So three quarters of the
    # first filters respond only to differences of brightness in space and time, and the next layer passes these on.
    # With this the encoder starts to learn motion after 100 steps instead of 400.
    first, down = vae.encoder_3d.conv_in.weight, vae.encoder_3d.down[0].downsample.conv.weight
    band = first[: 3 * len(first) // 4]
    band.copy_(band.mean(1, keepdim=True))
    band.sub_(band.mean((2, 3, 4), keepdim=True)).mul_(6)
    noise = 0.3 * down
    nn.init.dirac_(down).add_(noise)
    for module in vae.encoder_3d.modules():  # motion is not a linear function of the frames: branches must be active
        if isinstance(module, ResBlock):
            nn.init.normal_(module.conv2.weight, std=0.5 / math.sqrt(module.conv2.weight[0].numel()))
    nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], START_LOGVAR)


def as_video(frames_BTHWC: np.ndarray) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [-1, 1]."""
    return to_unit(frames_BTHWC).transpose(1, 2)


def draw_clip(rng: np.random.Generator, settings: VAESettings, phase: Phase, data: str) -> np.ndarray:
    """One training clip, uint8 [T, size, size, 3], at the phase's size or at `FULL_SIZE`, whichever is larger."""
    size, kind = max(phase.size, FULL_SIZE), rng.random()
    if kind < phase.video_share:
        return real_video.render(rng, data, size)
    if kind < phase.video_share + phase.photo_share:
        return photos.render(rng, size, wallpapers=data, parallax_share=settings.parallax_share)
    scene = toy_world.sample_scene(rng)
    return toy_world.render(scene, rng, size, portrait=rng.random() < settings.portrait_share)


@dataclass(frozen=True, slots=True)
class Batch:
    """Clips [B, 3, T, H, W] in [-1, 1]; flows [B, 2, T, H, W] in pixels to the content frame and to the next frame."""

    video: Tensor
    to_content: Tensor
    to_next: Tensor


def draw_batch(
    rng: np.random.Generator, settings: VAESettings, phase: Phase, data: str, device: str | torch.device = "cpu"
) -> Batch:
    """Draw a batch of `phase`.

    Frames below `FULL_SIZE` are crops, and the flow is computed before the crop, so it is also known for pixels that
    leave the crop. A latent cell spans 32 pixels: a shape drawn at full size is larger than a cell and changes the mean
    colour of several cells when it moves; drawn smaller, it would move within one cell.
    """
    videos, flows = [], ([], [])
    for _ in range(phase.batch):
        clip = draw_clip(rng, settings, phase, data)
        top, left = rng.integers(clip.shape[1] - phase.size + 1, size=2)
        rows, columns = slice(top, top + phase.size), slice(left, left + phase.size)
        videos.append(clip[:, rows, columns])
        if phase.flow_weight:
            for kept, flow in zip(flows, optical_flow.flows(clip, settings.config.content_frame), strict=True):
                kept.append(torch.from_numpy(flow[:, rows, columns]).permute(3, 0, 1, 2))
    empty = torch.empty(0)
    to_content, to_next = (torch.stack(kept).to(device) if kept else empty for kept in flows)
    return Batch(as_video(np.stack(videos)).to(device), to_content, to_next)


class Trained(nn.Module):
    """The autoencoder, and a head that predicts the motion to the next frame from the encoder's features at H/4.

    Checkpoints of this stage contain both; the saved model does not contain the head.
    """

    LEVEL = 2

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.vae = ReducioVAE(config)
        self.motion = nn.Conv3d(config.base_channels * config.channel_multipliers[self.LEVEL], 2, 1)
        initialize(self.vae)
        self._features: Tensor | None = None
        self.vae.encoder_3d.down[self.LEVEL].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._features = output

    def flow_loss(self, z: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted squared errors of the coarse flow in `z` and of the motion to the next frame.

        The figures also hold the mean squares of both targets (`flow_wanted`, `motion_wanted`).
        """
        config, warp = self.vae.config, self.vae.warp
        cell, fine = config.spatial_factor, 2**self.LEVEL
        coarse_target = F.avg_pool3d(batch.to_content, (1, cell, cell)) / cell
        coarse = (warp.coarse_flow(z).float() - coarse_target).square().mean()
        motion_target = F.avg_pool3d(batch.to_next, (1, fine, fine))
        assert self._features is not None, "encode a clip first"
        motion = (self.motion(self._features).float() - motion_target).square().mean()
        figures = {
            "flow": coarse,
            "flow_wanted": coarse_target.square().mean(),
            "motion": motion,
            "motion_wanted": motion_target.square().mean(),
        }
        return COARSE_WEIGHT * coarse + MOTION_WEIGHT * motion, {k: v.detach() for k, v in figures.items()}


# The errors are in squared cells and squared pixels; with these weights both start near 0.5 on photographs.
COARSE_WEIGHT, MOTION_WEIGHT = 30.0, 1.0
PIXEL_WEIGHT = 0.2  # relative errors are about five times the pixel errors: keeps the balance with the flow losses


def train_vae(context: Context, settings: VAESettings) -> dict[str, float]:
    """Train and save `vae/`. Loss: absolute plus squared error of pixels, squared error of flows, weighted KL."""
    data = str(context.data)
    photos.require_wallpapers(data)
    real_video.footage(data)
    torch.manual_seed(settings.loop.seed)
    model = Trained(settings.config)
    vae, frame = model.vae, settings.config.content_frame
    if context.device.type == "cpu":
        _channels_last(model)
    # These layers never run. Without a gradient, weight decay does not change them either.
    for module in (vae.encoder_2d.mid.block_2, vae.encoder_2d.norm_out):
        module.requires_grad_(False)

    def loss_fn(step: int, _micro: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        phase = settings.phase(step)
        batch = draw_batch(rng, settings, phase, data, context.device)
        posterior = vae.encode(batch.video)
        z = vae.normalize_latent(posterior.sample())
        kl = posterior.kl().float().mean()
        loss, figures = settings.kl_weight * kl, {"kl": kl.detach()}
        if phase.flow_weight:
            flow_loss, errors = model.flow_loss(z, batch)
            loss, figures = loss + phase.flow_weight * flow_loss, figures | errors
        if phase.decodes:
            if settings.latent_noise:
                spread = settings.latent_noise * torch.rand(len(z), 1, 1, 1, 1, device=z.device)
                z = vae.normalize_latent(z + spread * torch.randn_like(z))
            content = batch.video[:, :, frame]
            error = vae.decode(z, vae.encode_content(content)).float() - batch.video
            weight = 1 + settings.moving_weight * _moving(batch.video)
            weight = weight / weight.mean((1, 2, 3, 4), keepdim=True)
            still = (content[:, :, None] - batch.video).square().mean((1, 2, 3, 4), keepdim=True)
            relative = error / (still.sqrt() + settings.still_floor)
            loss = loss + PIXEL_WEIGHT * (weight * (relative.abs() + 0.5 * relative.square())).mean()
            figures["still_psnr"] = psnr_of_error(still.mean(), 2.0)
            figures["psnr"] = psnr_of_error(error.detach().square().mean(), 2.0)
        return loss, figures

    outcome = context.train("vae", model, loss_fn, replace(settings, encoder=None))
    save_model(vae, context.out / "vae")
    figures = {"steps": outcome.step, "seconds": outcome.seconds} | outcome.last
    if settings.encoder is not None:
        alone = train_encoder(context, vae, settings, settings.encoder)
        figures |= {f"encoder_{name}": value for name, value in alone.items()}
    return context.record("vae", figures)


def train_encoder(
    context: Context, vae: ReducioVAE, settings: VAESettings, encoder: EncoderSettings
) -> dict[str, float]:
    """Train the encoder of the autoencoder in `out/vae` alone, and save the autoencoder there again.

    While both are trained, the encoder follows a decoder that changes. Latents that are found by descent instead
    (`pipelines.reducio.refinement`) are decoded with 3 dB less error on real video. Generated clips stay as they are,
    since the decoder does not change. The loss is the mean over clips of log(squared error / squared error of the
    repeated content frame): each clip counts by the dB it gains, and one that is worse than its still counts twice.
    """
    data, frame = str(context.data), settings.config.content_frame
    vae.requires_grad_(False)
    vae.encoder_3d.requires_grad_(True)
    vae.quant_conv.requires_grad_(True)

    def loss_fn(step: int, _micro: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        phase = encoder.batches[step % len(encoder.batches)]
        video = draw_batch(rng, settings, phase, data, context.device).video
        posterior = vae.encode(video)
        kl = posterior.kl().float().mean()
        content = video[:, :, frame]
        restored = vae.decode(vae.normalize_latent(posterior.sample()), vae.encode_content(content)).float()
        error = (restored - video).square().mean((1, 2, 3, 4))
        still = (content[:, :, None] - video).square().mean((1, 2, 3, 4))
        nats = ((error + encoder.floor**2) / (still + encoder.floor**2)).log()
        loss = (nats + nats.relu()).mean() + settings.kl_weight * kl
        gain = psnr_of_error(error.detach(), 2.0) - psnr_of_error(still, 2.0)
        return loss, {"kl": kl.detach(), "gain": gain.mean(), "worst": gain.min()}

    start = files_checksum(context.out / "vae")
    outcome = context.train("encoder", vae, loss_fn, encoder, decoder=start)
    vae.requires_grad_(True)
    save_model(vae, context.out / "vae")
    return {"steps": outcome.step, "seconds": outcome.seconds} | outcome.last


def _channels_last(model: nn.Module) -> None:
    """Convert convolutions to channels-last, which a CPU runs up to twice as fast, forward and backward."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def _moving(video_BCTHW: Tensor) -> Tensor:
    """1 if a pixel differs visibly from its median over time, else 0: [B, 1, T, H, W]."""
    away = (video_BCTHW - video_BCTHW.median(2, keepdim=True).values).abs().amax(1, keepdim=True)
    return (away > 0.1).to(video_BCTHW.dtype)
