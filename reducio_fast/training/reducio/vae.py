"""The autoencoder's recipe: the release's losses and schedule, on clips of a curated manifest.

Autoencoder and discriminator update at the same time on the same clips. The release updates them in turn, so there the
second update uses the new weights of the first. Letters in shapes: B batch, C channels, T frames, H W rows and columns.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...checkpoints.networks import load_model, save_model
from ...data.clip_files import ClipFiles
from ...media.perceptual import Perceptual
from ...media.similarity import MOST_DB, psnr_of_error
from ...pipelines.call.validation import check_multiple
from ...reference import ReducioVAE, VAEConfig
from ...reference.reducio.config import VAE_PRESETS
from ...system.checksum import file_sha256
from ...system.errors import ReducioError
from ..draw_ahead import DrawAhead
from ..loop import LoopConfig, recorded_fields, run, unchanged
from ..processes import joined
from ..recipe_file import check_least, check_positive, check_share, check_threads, configured, start_folder
from .discriminator import PatchDiscriminator, adaptive_weight, hinge_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class VAERecipe:
    """Settings of an autoencoder's training. The default weights of the losses are the release's."""

    loop: LoopConfig
    batch: int  # clips per step, split into `loop.micro_batches` parts
    size: int = 256  # side of the square crops, in pixels
    least_area: float = 0.5  # least area of a crop, as a share of the frame's largest square
    rate: float = 16.0  # frames a second: every round(fps / rate)-th frame
    model: str | None = None  # a preset of `VAE_PRESETS`; None: the configuration of `start`
    config: dict[str, Any] = field(default_factory=dict)  # fields of `VAEConfig` that replace the preset's
    start: str | None = None  # folder with the initial weights
    lpips_weight: float = 0.1
    kl_weight: float = 1e-6
    outlier_weight: float = 1.0  # on pixels more than three standard deviations above their frame's mean
    discriminator_start: int = 5000  # first step with the adversarial losses
    discriminator_weight: float = 0.05  # factor on the adaptive weight
    discriminator_rate: float = 0.1  # factor on the autoencoder's learning rate
    discriminator_warmup: int = 1000  # steps from its start in which its rate grows from a tenth to the whole
    discriminator_norm: str = "batch"
    discriminator_width: int = 64
    threads: int | None = None
    held_out: int = 0  # last clips of the manifest, excluded from training; their PSNR is reported at the end

    def __post_init__(self) -> None:
        if self.batch < 1 or self.batch % self.loop.micro_batches:
            raise ReducioError(f"batch={self.batch} must be a multiple of loop.micro_batches={self.loop.micro_batches}")
        if self.model is not None and self.model not in VAE_PRESETS:
            raise ReducioError(f"model={self.model!r}: must be one of {', '.join(VAE_PRESETS)}")
        if self.model is None and self.start is None:
            raise ReducioError("a recipe needs `model` (a preset) or `start` (a folder)")
        if self.loop.parallel != "ddp":
            raise ReducioError(
                "loop.parallel: the adaptive weight needs the whole last layer, which only ddp does not shard"
            )
        check_least(self, 1, "discriminator_width")
        check_threads(self.threads)
        check_least(self, 0, "held_out", "discriminator_start", "discriminator_rate", "discriminator_warmup")
        check_least(self, 0, "lpips_weight", "kl_weight", "outlier_weight", "discriminator_weight")
        check_positive(self, "rate")
        check_share(self, "least_area")
        if self.discriminator_norm not in ("batch", "group"):
            raise ReducioError(f"discriminator_norm={self.discriminator_norm!r}: must be batch or group")

    def discriminator_factor(self, step: int) -> float:
        """The discriminator's learning rate at a 0-based step, as a share of the autoencoder's."""
        done = (step - self.discriminator_start) / self.discriminator_warmup if self.discriminator_warmup else 1.0
        return self.discriminator_rate * (0.1 + 0.9 * min(1.0, max(0.0, done)))


class Trained(nn.Module):
    """The autoencoder and the discriminator: all weights of a checkpoint."""

    def __init__(self, vae: ReducioVAE, recipe: VAERecipe) -> None:
        super().__init__()
        self.vae = vae
        self.discriminator = PatchDiscriminator(recipe.discriminator_width, recipe.discriminator_norm)


class Losses:
    """Loss of a batch. `perceptual` is LPIPS with the weights that the user names; None means no perceptual loss."""

    def __init__(
        self, model: Trained, recipe: VAERecipe, clips: ClipFiles, perceptual: nn.Module | None, world_size: int = 1
    ) -> None:
        self.model, self.recipe, self.clips, self.perceptual = model, recipe, clips, perceptual
        self.drawn = DrawAhead(self.draw, recipe.batch, recipe.loop, world_size)

    def __call__(self, step: int, micro: int, _rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        recipe, vae = self.recipe, self.model.vae
        device = next(vae.parameters()).device
        video = torch.stack(self.drawn(step, micro)).to(device)  # [B, 3, T, H, W]
        posterior = vae.encode(video)
        z = vae.normalize_latent(posterior.sample())
        content = video[:, :, vae.config.content_frame]
        restored = vae.decode(z, vae.encode_content(content)).float()
        reconstruction = (restored - video).abs().mean()
        figures = {"l1": reconstruction.detach(), "psnr": psnr_of_error(F.mse_loss(restored.detach(), video), 2.0)}
        if self.perceptual is not None:
            frames = [x.transpose(1, 2).flatten(0, 1) for x in (restored, video)]
            lpips = self.perceptual(*frames).mean()
            reconstruction = reconstruction + recipe.lpips_weight * lpips
            figures["lpips"] = lpips.detach()
        kl, outliers = posterior.kl().float().mean(), outlier_loss(restored)
        figures |= {"kl": kl.detach(), "outliers": outliers.detach()}
        loss = reconstruction + recipe.kl_weight * kl + recipe.outlier_weight * outliers
        if step >= recipe.discriminator_start:
            discriminator = self.model.discriminator
            # The adversarial loss must not train the discriminator, so it is computed with detached weights.
            fixed = {k: p.detach() for k, p in discriminator.named_parameters()} | dict(discriminator.named_buffers())
            adversarial = -functional_call(discriminator, fixed, (restored,)).mean()
            weight = adaptive_weight(reconstruction, adversarial, vae.decoder.conv_out.weight)
            hinge = hinge_loss(discriminator(video), discriminator(restored.detach()))
            loss = loss + recipe.discriminator_weight * weight * adversarial + hinge
            figures |= {"adversarial": adversarial.detach(), "discriminator": hinge.detach(), "adaptive": weight}
        return loss, figures

    def draw(self, step: int, row: int) -> Tensor:
        """Row `row` of the global batch: float32 [3, T, H, W] in [-1, 1]."""
        recipe = self.recipe
        rng = np.random.default_rng((recipe.loop.seed, 1 << 21, step, row))
        return self.clips.draw(rng, recipe.size, recipe.least_area).clip


def outlier_loss(clip_BCTHW: Tensor, deviations: float = 3.0) -> Tensor:
    """Mean excess of pixels over their frame's mean plus `deviations` standard deviations; penalises bright dots."""
    mean = clip_BCTHW.mean((-2, -1), keepdim=True)
    deviation = clip_BCTHW.std((-2, -1), keepdim=True)
    return F.relu(clip_BCTHW - mean - deviations * deviation).mean()


def train_vae(
    clips: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: VAERecipe,
    lpips: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    resume: bool = True,
    accept_changes: bool = False,
    progress: bool = True,
) -> dict[str, float]:
    """Train an autoencoder and write `out/vae`. Returns the last logged figures, with `steps` and `seconds`.

    Args:
        clips: a manifest of `reducio-fast curate`.
        recipe: with `held_out`, the figures include `held_out_psnr`, the PSNR of those clips in dB, and
            `held_out_gain`, its difference to the PSNR of a clip that repeats the content frame.
        lpips: file with torchvision's AlexNet weights; None trains without the perceptual loss.
    """
    with joined(device, recipe.threads) as processes:
        torch.manual_seed(recipe.loop.seed)
        model = Trained(build_vae(recipe), recipe)
        check_multiple("size", recipe.size, model.vae.config.spatial_factor)
        files = ClipFiles(clips, model.vae.config.num_frames, recipe.rate)
        held_out = files.take_last(recipe.held_out)
        # These layers never run. Without a gradient, weight decay does not change them either.
        for module in (model.vae.encoder_2d.mid.block_2, model.vae.encoder_2d.norm_out):
            module.requires_grad_(False)
        perceptual = None
        if lpips is not None:
            perceptual = Perceptual(lpips, device=str(processes.device)).model.requires_grad_(False)
        rate = recipe.discriminator_factor
        outcome = run(
            "vae",
            model,
            Losses(model, recipe, files, perceptual, processes.world_size),
            recipe.loop,
            Path(out) / "runs" / "vae",
            processes,
            resume,
            accept_changes,
            progress,
            rate_of=lambda name: rate if "discriminator." in name else unchanged,
            recorded=recorded_fields(
                recipe, clips=files.checksum(), lpips=None if lpips is None else file_sha256(Path(lpips))
            ),
        )
        figures = outcome.figures(processes.world_size)
        if processes.first:
            model.load_state_dict(outcome.averaged)
            save_model(model.vae.cpu(), Path(out) / "vae")
            if held_out is not None:
                figures |= held_out_scores(model.vae, held_out, recipe)
        processes.barrier()
    return figures


@torch.no_grad()
def held_out_scores(vae: ReducioVAE, clips: ClipFiles, recipe: VAERecipe) -> dict[str, float]:
    """Mean PSNR in dB of `recipe.held_out` crops, equal for all runs, and its gain over repeating the content frame."""
    vae.eval()
    scores, config = [], vae.config
    for i in range(recipe.held_out):
        rng = np.random.default_rng((1 << 22, i))
        video = clips.draw(rng, recipe.size, recipe.least_area).clip[None]
        content = video[:, :, config.content_frame]
        restored = vae.decode(vae.normalize_latent(vae.encode(video).mode()), vae.encode_content(content)).clamp(-1, 1)
        still = content[:, :, None].expand_as(video)
        scores.append([min(MOST_DB, float(psnr_of_error(F.mse_loss(x, video), 2.0))) for x in (restored, still)])
    psnr, repeated = np.mean(scores, axis=0)
    return {"held_out_psnr": float(psnr), "held_out_gain": float(psnr - repeated)}


def build_vae(recipe: VAERecipe) -> ReducioVAE:
    """The network before its first step."""
    folder = None if recipe.start is None else start_folder(recipe.start, "vae")
    first = None if folder is None else load_model(ReducioVAE, VAEConfig, folder, torch.float32)
    base = VAE_PRESETS[recipe.model] if recipe.model is not None else first.config
    vae = ReducioVAE(configured(base, recipe.config))
    if first is not None:
        if {k: v.shape for k, v in first.state_dict().items()} != {k: v.shape for k, v in vae.state_dict().items()}:
            raise ReducioError(f"start: the network of {folder} has other weights than the recipe's")
        vae.load_state_dict(first.state_dict())
    return vae
