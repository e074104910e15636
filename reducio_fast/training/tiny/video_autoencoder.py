"""The video autoencoder of the tiny model.

The encoder alone learns to sketch (what a small head can draw from its latent), then everything learns together, both
on 64-pixel crops. From there on the latent space stays as it is, and the decoder learns whole clips, colours, clips as
they are generated, and outlines. Letters in shapes: B batch, T frames, H W rows and columns, C channels.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.networks import save_model
from ...checkpoints.strict_files import WEIGHTS, load_tensors, save_tensors
from ...data import photos, toy_world
from ...media.pixels import to_unit
from ...media.similarity import psnr_of_error
from ...reference import ReducioVAE, VAEConfig
from ...reference.reducio.vae import ResBlock, SelfAttention
from ..loop import LoopConfig
from ..recipe import Context

TINY_VAE = VAEConfig(
    base_channels=16,  # 16 wide at full resolution: narrower is slower, vector units of a CPU hold 16 floats
    channel_multipliers=(1, 1, 2, 4, 4, 4),
    content_base_channels=16,
    content_channel_multipliers=(1, 1, 2, 4),
    # Adding aligns content and video in space from the first step; attention alone has to learn that. Fusing at half
    # resolution too is what keeps still backgrounds sharp at this width.
    fusion=("attn", "add", "add", "add+attn", "attn", "attn"),
    fusion_levels=(None, 1, 2, 3, None, None),
    # None at full resolution: six convolutions there are 40% of the work and hardly help a latent this small.
    num_res_blocks=(0, 1, 1, 1, 1, 1),
    # Large groups: a norm removes the mean of each group, and with two channels in one the brightness goes with it.
    norm_groups=2,
    num_heads=4,
    fusion_head_dim=16,
)
START_LOGVAR = -6.0
FULL_SIZE = 128  # pixels a side at which clips are drawn, whatever is cropped from them


@dataclass(frozen=True, slots=True, kw_only=True)
class VAESettings:
    """One phase of VAE training; a phase starts from the averaged weights of the one named `after`."""

    loop: LoopConfig
    # "encoder" (and the sketch), "all", "decoder" (the transformer may already be learning the latents), or "carriage":
    # the decoder up to the level that `Carriage` reads, a quarter of its work.
    trains: str
    size: int  # pixels a side of the crops
    batch: int
    after: str | None = None
    photo_share: float = 0.3
    portrait_share: float = 0.0  # of the scenes: clips as they are generated, around a content frame that is a portrait
    sketch_weight: float = 1.0
    # On the error of two colour differences. Clips vary mostly in brightness, and a decoder that has learnt only that
    # (and blue against orange) scores well while green and magenta come out gray.
    chroma_weight: float = 0.0
    # Added to the weight of pixels that change: they are few, and without it their outlines stay blurred longest.
    moving_weight: float = 0.0
    # Weights average 1 in every clip. Else a photograph under a camera move, which is all motion, weighs as much more
    # than a scene as `moving_weight` says, and its error is the larger one already: the decoder learns little else.
    level_weights: bool = False
    carriage_weight: float = 0.0
    # Standard deviation, at most, of noise on the normalised latent: a generated one is never exact, and what it
    # leaves unclear (a silhouette) the content frame knows.
    latent_noise: float = 0.0
    kl_weight: float = 1e-6  # on the KL summed over a latent, as in the release
    config: VAEConfig = field(default_factory=lambda: TINY_VAE)


class Sketch(nn.Module):
    """A small head that draws the clip at a quarter of its resolution from the latent alone; not kept after training.

    With the content image at hand, copying it is so good a start that the decoder ignores the latent for hundreds of
    steps, and an encoder whose output is not read learns nothing. The head reads it from the first step.
    """

    def __init__(self, config: VAEConfig, width: int = 128) -> None:
        super().__init__()
        self.frames, self.cells = config.temporal_factor, config.spatial_factor // 4
        self.hidden = nn.Conv3d(config.latent_channels, width, 3, padding=1)
        self.out = nn.Conv3d(width, 3 * self.frames * self.cells**2, 1)

    def forward(self, z_BCTHW: Tensor) -> Tensor:
        x = self.out(F.silu(self.hidden(z_BCTHW)))
        x = x.unflatten(1, (3, self.frames, self.cells, self.cells))  # [B, 3, f, c, c, t, h, w]
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def loss(self, z_BCTHW: Tensor, video_BCTHW: Tensor) -> Tensor:
        return F.mse_loss(self(z_BCTHW).float(), F.avg_pool3d(video_BCTHW, (1, 4, 4)))


class Carriage(nn.Module):
    """A head that draws the clip from the deepest decoder level that fuses content; not kept after training.

    Drawing a moved shape needs its silhouette, which only the content frame has, at a place that only the latent has.
    Where the two meet, the picture is still an eighth of its size, and the gradient that comes through the narrow
    levels above taught the decoder to paint a blob at the right place long before it learnt whose outline to give it.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.level = max(i for i, source in enumerate(config.fusion_levels) if source is not None)
        width = config.base_channels * config.channel_multipliers[self.level]
        self.cells = 2**self.level
        self.norm = nn.GroupNorm(config.norm_groups, width)
        self.hidden = nn.Conv3d(width, 2 * width, 1)
        self.out = nn.Conv3d(2 * width, 3 * self.cells**2, 1)
        nn.init.zeros_(self.out.weight)  # from gray on: its first gradients must not drown the decoder's

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x = self.out(F.silu(self.hidden(self.norm(x_BCTHW))))
        x = x.unflatten(1, (3, self.cells, self.cells))  # [B, 3, c, c, T, h, w]
        return x.permute(0, 1, 4, 5, 2, 6, 3).flatten(5, 6).flatten(3, 4)


class Trained(nn.Module):
    """The autoencoder and the two heads: what a checkpoint of this stage holds."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.vae, self.sketch, self.carriage = ReducioVAE(config), Sketch(config), Carriage(config)
        initialize(self.vae)


def initialize(vae: ReducioVAE) -> None:
    """Start as a chain of variance-preserving convolutions with silent residual branches.

    PyTorch's default shrinks the signal by 1.7 at every convolution, so that after six levels the branches' noise is
    all there is. A posterior as wide as the prior would hide what is left: it starts narrow.
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
    nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], START_LOGVAR)


def as_video(frames_BTHWC: np.ndarray) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [-1, 1]."""
    return to_unit(frames_BTHWC).transpose(1, 2)


def draw_clip(rng: np.random.Generator, size: int, photo_share: float, portrait_share: float = 0.0) -> np.ndarray:
    """One training clip, uint8 [T, size, size, 3]: a crop of a scene, or of a photograph under a camera move.

    Drawn at the model's own size and cropped, never drawn smaller: a latent cell spans 32 pixels, and a shape larger
    than a cell changes the mean colour of cells as it moves, which a network learns at once. Within one cell it would
    have to encode positions before anything improves, and encoders trained so stayed at the mean colour of the clip.
    """
    if rng.random() < photo_share:
        frames = photos.render(rng, FULL_SIZE)
    else:
        scene = toy_world.sample_scene(rng)
        # No number is drawn where the share is 0, so that the phases without portraits see the clips they always saw.
        portrait = portrait_share > 0 and rng.random() < portrait_share
        frames = toy_world.render(scene, rng, FULL_SIZE, portrait=portrait)
    top, left = rng.integers(FULL_SIZE - size + 1, size=2)
    return frames[:, top : top + size, left : left + size]


def train_vae(context: Context, settings: VAESettings, stage: str) -> dict[str, float]:
    """Trains one phase and saves `vae/`. Loss: absolute plus squared error, the sketch's error, weighted KL."""
    torch.manual_seed(settings.loop.seed)
    model = Trained(settings.config)
    if settings.after is not None:
        model.load_state_dict(load_tensors(context.run_folder(settings.after) / WEIGHTS))
    if context.device == "cpu":
        _channels_last(model)
    vae, frame = model.vae, settings.config.content_frame
    encoder = [vae.encoder_3d, vae.quant_conv, model.sketch]
    decoder = [vae.encoder_2d, vae.decoder, vae.post_quant_conv]
    frozen = {"encoder": decoder, "all": [], "decoder": encoder, "carriage": encoder}[settings.trains]
    encoder_learns, draws = settings.trains in ("encoder", "all"), settings.trains != "encoder"
    # The last two never run; without gradient, weight decay leaves them alone as well.
    for module in (*frozen, vae.encoder_2d.mid.block_2, vae.encoder_2d.norm_out):
        module.requires_grad_(False)

    def loss_fn(step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        shares = settings.photo_share, settings.portrait_share
        clips = [draw_clip(rng, settings.size, *shares) for _ in range(settings.batch)]
        video = as_video(np.stack(clips)).to(context.device)
        content = video[:, :, frame]
        figures = {"still_psnr": psnr_of_error(F.mse_loss(content[:, :, None].expand_as(video), video), 2.0)}
        loss = torch.zeros((), device=context.device)
        with torch.set_grad_enabled(encoder_learns):
            posterior = vae.encode(video)
            z = vae.normalize_latent(posterior.sample())
        if settings.latent_noise:
            spread = settings.latent_noise * torch.rand(len(z), 1, 1, 1, 1, device=z.device)
            z = vae.normalize_latent(z + spread * torch.randn_like(z))
        if encoder_learns:
            sketch, kl = model.sketch.loss(z, video), posterior.kl().float().mean()
            loss = loss + settings.sketch_weight * sketch + settings.kl_weight * kl
            figures |= {"sketch_psnr": psnr_of_error(sketch.detach(), 2.0), "kl": kl.detach()}
        if draws:
            output, deep = _decode(vae, z, content, model.carriage.level, whole=settings.trains != "carriage")
            weight = 1 + settings.moving_weight * _moving(video)
            if settings.level_weights:
                weight = weight / weight.mean((1, 2, 3, 4), keepdim=True)
            if settings.carriage_weight:
                carried, figures["carried_psnr"] = _drawing_error(model.carriage(deep).float(), video, weight)
                loss = loss + settings.carriage_weight * carried
            if output is not None:
                drawn, figures["psnr"] = _drawing_error(output.float(), video, weight)
                loss = loss + drawn + settings.chroma_weight * _chroma_error(output.float() - video)
        return loss, figures

    outcome = context.train(stage, model, loss_fn, settings.loop)
    save_tensors(model.state_dict(), context.run_folder(stage) / WEIGHTS)
    save_model(vae, context.out / "vae")
    return context.record(stage, {"steps": outcome.step, "seconds": outcome.seconds} | outcome.last)


def _drawing_error(output: Tensor, video: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted absolute plus plain squared error, and the PSNR in dB."""
    squared = F.mse_loss(output, video)
    return (weight * (output - video).abs()).mean() + squared, psnr_of_error(squared.detach(), 2.0)


class _Reached(Exception):
    """Ends a forward pass from within."""


def _decode(vae: ReducioVAE, z: Tensor, content: Tensor, level: int, whole: bool) -> tuple[Tensor | None, Tensor]:
    """The decoded clip (None unless `whole`) and what decoder level `level` makes of it before it is up-sampled."""
    caught = []

    def catch(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        if not whole:
            raise _Reached

    handle = vae.decoder.up[level].upsample.register_forward_pre_hook(catch)
    output = None
    try:
        with contextlib.suppress(_Reached):
            output = vae.decode(z, vae.encode_content(content))
    finally:
        handle.remove()
    return output, caught[0]


def _channels_last(model: nn.Module) -> None:
    """Convolutions with their channels last, which a CPU runs up to twice as fast backward as well as forward."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def _moving(video_BCTHW: Tensor) -> Tensor:
    """1 where a pixel differs visibly from its own median over time, else 0: [B, 1, T, H, W]."""
    away = (video_BCTHW - video_BCTHW.median(2, keepdim=True).values).abs().amax(1, keepdim=True)
    return (away > 0.1).to(video_BCTHW.dtype)


def _chroma_error(error_BCTHW: Tensor) -> Tensor:
    """Mean absolute error of red minus green and of blue minus yellow."""
    red, green, blue = error_BCTHW.unbind(1)
    return (red - green).abs().mean() + (blue - (red + green) / 2).abs().mean()
