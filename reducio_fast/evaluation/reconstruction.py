"""Reconstruction quality of a video autoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..media.pixels import to_bytes, to_unit
from ..media.similarity import MOST_DB, pooled_psnr, psnr_per_frame, ssim
from ..pipelines.reducio import refinement
from ..reference import ReducioVAE
from ..system.errors import ReducioError


@torch.no_grad()
def reconstruct(vae: ReducioVAE, frames: np.ndarray, refine: int = 0) -> np.ndarray:
    """Encode and decode a clip, uint8 [T, H, W, 3] in and out, with the posterior's mode and the clip's content frame.

    `refine`: steps of `pipelines.reducio.refinement.refine` on the latent. Raises `ReducioError` if the output is not
    finite.
    """
    weight = next(vae.parameters())
    video = to_unit(frames, weight.device, weight.dtype).transpose(0, 1)[None]
    tiled = vae.config.needs_tiling(*frames.shape[1:3])
    latent = vae.normalize_latent(vae.encode(video, tiled=tiled).mode())
    if refine:
        latent = refinement.refine(vae, latent, frames, refine, tiled).to(weight.dtype)
    features = vae.encode_content(video[:, :, vae.config.content_frame], tiled=tiled)
    output = vae.decode(latent, features, tiled=tiled)[0].float()
    if not torch.isfinite(output).all():
        raise ReducioError(f"the autoencoder's output is not finite in {weight.dtype}; use float32 or bfloat16")
    return to_bytes(output.transpose(0, 1)).cpu().numpy()


def reconstruction_scores(vae: ReducioVAE, clips: Iterable[np.ndarray], refine: int = 0) -> dict[str, Any]:
    """Reconstruction of clips, uint8 [T, H, W, 3] with the model's T, compared with repeating their content frame.

    `refine` is as in `reconstruct`.

    All figures are means over clips. `psnr` and `ssim` are computed per frame and averaged over frames, as in the
    Reducio-VAE release. A repeated content frame is exact in that one frame, so `psnr_moving`, `repeat_psnr_moving` and
    their difference `gain_db` exclude it. `pooled_psnr`, `repeat_pooled_psnr` and `pooled_gain_db` use the squared
    error over all frames; `worst_gain_db` is the smallest pooled gain of a clip. `content_psnr` is the PSNR of the
    content frame, which is an input of the decoder. No PSNR is above 60 dB (`MOST_DB`): that of an exact copy, such as
    the repeated frame of a clip that stands still, would be infinite.
    """
    content = vae.config.content_frame
    return mean_scores([clip_scores(clip, reconstruct(vae, clip, refine), content) for clip in clips])


def clip_scores(clip: np.ndarray, restored: np.ndarray, content: int) -> dict[str, float]:
    """Scores of one reconstructed clip; `content` is the number of its content frame."""
    repeated = np.repeat(clip[content : content + 1], len(clip), axis=0)
    moving = np.arange(len(clip)) != content
    frames, still = (np.minimum(psnr_per_frame(clip, other), MOST_DB) for other in (restored, repeated))
    return {
        "psnr": float(frames.mean()),
        "ssim": ssim(clip, restored),
        "repeat_ssim": ssim(clip, repeated),
        "psnr_moving": float(frames[moving].mean()),
        "repeat_psnr_moving": float(still[moving].mean()),
        "content_psnr": float(frames[content]),
        "pooled_psnr": min(MOST_DB, pooled_psnr(clip, restored)),
        "repeat_pooled_psnr": min(MOST_DB, pooled_psnr(clip, repeated)),
    }


def mean_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means of `clip_scores` over clips, and the gains that follow from them, as `reconstruction_scores` returns."""
    if not rows:
        raise ReducioError("clips: none given to score")
    scores: dict[str, Any] = {"clips": len(rows)}
    scores |= {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    scores["gain_db"] = scores["psnr_moving"] - scores["repeat_psnr_moving"]
    scores["pooled_gain_db"] = scores["pooled_psnr"] - scores["repeat_pooled_psnr"]
    scores["worst_gain_db"] = min(row["pooled_psnr"] - row["repeat_pooled_psnr"] for row in rows)
    return scores
