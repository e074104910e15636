"""The autoencoder's recipe: the release's losses and schedule, on clips of a curated manifest.

Generator and discriminator take their step at once, on the same clips: the release steps one after the other, the
second with the first one's new weights. Letters in shapes: B batch, C channels, T frames, H W rows and columns.
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
from ...media.similarity import psnr_of_error
from ...reference import ReducioVAE, VAEConfig
from ...reference.reducio.config import VAE_PRESETS
from ...system.errors import ReducioError
from ..loop import LoopConfig, run
from ..processes import joined
from ..recipe_file import configured
from .discriminator import PatchDiscriminator, adaptive_weight, hinge_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class VAERecipe:
    """How an autoencoder is trained. Weights of losses are the release's where they have a default."""

    loop: LoopConfig
    batch: int  # clips a step; `loop.micro_batches` share it
    size: int = 256  # pixels a side of the crops
    least_area: float = 0.5  # of the frame, that a crop shows
    rate: float = 16.0  # frames a second: every round(fps / rate)-th frame
    model: str | None = None  # a preset of `VAE_PRESETS`; None: the configuration of `start`
    config: dict[str, Any] = field(default_factory=dict)  # fields of `VAEConfig` over the preset's
    start: str | None = None  # a folder with the weights to begin with
    lpips_weight: float = 0.1
    kl_weight: float = 1e-6
    outlier_weight: float = 1.0  # on pixels further than three deviations above their frame's mean
    discriminator_start: int = 5000  # step from which the discriminator counts
    discriminator_weight: float = 0.05  # of the adaptive one
    discriminator_rate: float = 0.1  # of the generator's learning rate
    discriminator_norm: str = "batch"
    discriminator_width: int = 64
    threads: int | None = None
    held_out: int = 0  # clips at the manifest's end kept from training, whose PSNR is reported at the end

    def __post_init__(self) -> None:
        if self.batch < 1 or self.batch % self.loop.micro_batches:
            raise ReducioError(f"batch={self.batch} must be a multiple of loop.micro_batches={self.loop.micro_batches}")
        if self.model is not None and self.model not in VAE_PRESETS:
            raise ReducioError(f"model={self.model!r}: must be one of {', '.join(VAE_PRESETS)}")
        if self.model is None and self.start is None:
            raise ReducioError("a recipe needs `model` (a preset) or `start` (a folder)")
        if self.loop.parallel != "ddp":
            raise ReducioError(
                "loop.parallel: the adaptive weight needs the whole last layer, which ddp alone leaves in place"
            )
        if self.discriminator_norm not in ("batch", "group"):
            raise ReducioError(f"discriminator_norm={self.discriminator_norm!r}: must be batch or group")


class Trained(nn.Module):
    """What a checkpoint of this recipe holds."""

    def __init__(self, vae: ReducioVAE, recipe: VAERecipe) -> None:
        super().__init__()
        self.vae = vae
        self.discriminator = PatchDiscriminator(recipe.discriminator_width, recipe.discriminator_norm)


class Losses:
    """Loss of a batch; `perceptual` is LPIPS with the trunk that the user names, None where none was named."""

    def __init__(self, model: Trained, recipe: VAERecipe, clips: ClipFiles, perceptual: nn.Module | None) -> None:
        self.model, self.recipe, self.clips, self.perceptual = model, recipe, clips, perceptual

    def __call__(self, step: int, micro: int, _rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        recipe, vae = self.recipe, self.model.vae
        device = next(vae.parameters()).device
        video = self.draw(step, micro).to(device)
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
            judge = self.model.discriminator
            # The generator's loss must not move the judge: it is judged by a copy of its weights.
            fixed = {name: p.detach() for name, p in judge.named_parameters()} | dict(judge.named_buffers())
            adversarial = -functional_call(judge, fixed, (restored,)).mean()
            weight = adaptive_weight(reconstruction, adversarial, vae.decoder.conv_out.weight)
            judged = hinge_loss(judge(video), judge(restored.detach()))
            loss = loss + recipe.discriminator_weight * weight * adversarial + judged
            figures |= {"adversarial": adversarial.detach(), "discriminator": judged.detach(), "adaptive": weight}
        return loss, figures

    def draw(self, step: int, micro: int) -> Tensor:
        """Part `micro` of the global batch: float32 [B, 3, T, H, W] in [-1, 1]."""
        recipe = self.recipe
        share = recipe.batch // recipe.loop.micro_batches
        rngs = [np.random.default_rng((recipe.loop.seed, 1 << 21, step, micro * share + i)) for i in range(share)]
        frames = self.model.vae.config.num_frames
        return torch.stack([self.clips.draw(rng, frames, recipe.rate, recipe.size, recipe.least_area) for rng in rngs])


def outlier_loss(clip_BCTHW: Tensor, deviations: float = 3.0) -> Tensor:
    """Mean excess of pixels over their frame's mean plus so many deviations: single bright dots."""
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
    """Trains an autoencoder and writes `out/vae`. Returns the last logged figures, with `steps` and `seconds`.

    Args:
        clips: a manifest of `reducio-fast curate`.
        recipe: with `held_out`, the figures have the PSNR of those clips, and how much it is above that of repeating
            the content frame: `held_out_psnr`, `held_out_gain`.
        lpips: torchvision's AlexNet weights; None trains without the perceptual loss.
    """
    files = ClipFiles(clips)
    held_out = files.take_last(recipe.held_out)
    with joined(device, recipe.threads) as processes:
        torch.manual_seed(recipe.loop.seed)
        model = Trained(build_vae(recipe), recipe)
        # They never run; without gradient, weight decay leaves them alone as well.
        for module in (model.vae.encoder_2d.mid.block_2, model.vae.encoder_2d.norm_out):
            module.requires_grad_(False)
        perceptual = None
        if lpips is not None:
            perceptual = Perceptual(lpips, device=str(processes.device)).model.requires_grad_(False)
        outcome = run(
            "vae",
            model,
            Losses(model, recipe, files, perceptual),
            recipe.loop,
            Path(out) / "runs" / "vae",
            processes,
            resume,
            accept_changes,
            progress,
            rate_of=lambda name: recipe.discriminator_rate if "discriminator." in name else 1.0,
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
    """Mean PSNR of as many crops as there are clips, the same for every training, and its gain over a still."""
    vae.eval()
    scores, config = [], vae.config
    for i in range(recipe.held_out):
        rng = np.random.default_rng((1 << 22, i))
        video = clips.draw(rng, config.num_frames, recipe.rate, recipe.size, recipe.least_area)[None]
        content = video[:, :, config.content_frame]
        restored = vae.decode(vae.normalize_latent(vae.encode(video).mode()), vae.encode_content(content)).clamp(-1, 1)
        still = content[:, :, None].expand_as(video)
        scores.append([float(psnr_of_error(F.mse_loss(x, video), 2.0)) for x in (restored, still)])
    psnr, repeated = np.mean(scores, axis=0)
    return {"held_out_psnr": float(psnr), "held_out_gain": float(psnr - repeated)}


def build_vae(recipe: VAERecipe) -> ReducioVAE:
    """The network before its first step."""
    folder = None if recipe.start is None else Path(recipe.start)
    if folder is not None and (folder / "vae").is_dir():
        folder = folder / "vae"
    first = None if folder is None else load_model(ReducioVAE, VAEConfig, folder, torch.float32)
    base = VAE_PRESETS[recipe.model] if recipe.model is not None else first.config
    vae = ReducioVAE(configured(base, recipe.config))
    if first is not None:
        if {k: v.shape for k, v in first.state_dict().items()} != {k: v.shape for k, v in vae.state_dict().items()}:
            raise ReducioError(f"start: the network of {folder} has other weights than the recipe's")
        vae.load_state_dict(first.state_dict())
    return vae
