"""How often the default model shows what the prompt says, and how well its autoencoder keeps a clip: one report.

Prompts are scenes whose (colour, shape, motion) was kept from training; clips are such scenes, and photographs that
were kept from it too. The answers come from `detector.detect`, which knows nothing of the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from math import sqrt
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import ReducioError
from ..reference import ReducioVAE
from ..training import photos, world
from .detector import Detection, detect
from .metrics import pooled_psnr, psnr, psnr_per_frame, ssim

ATTRIBUTES = ("colour", "motion", "shape")
# Separate streams of random numbers for one seed, so that asking for fewer prompts leaves the clips as they are.
_PROMPTS, _SCENES, _PHOTOS = 1, 2, 3


def evaluate(
    model: str | os.PathLike[str] | Any = None,
    num_prompts: int = 64,
    seed: int = 0,
    progress: bool = True,
    num_clips: int = 32,
) -> dict[str, Any]:
    """Score a model on held-out prompts and clips of the toy world; prompt i is generated with seed + i.

    model: None for the embedded one, a folder or hub id, or a loaded `ReducioPipeline`. Returns plain data:

    - `prompts`, `seed`, and for each of `colour`, `motion`, `shape` and for `all` three together: `right` (a count),
      `share` and `interval`, its 95% Wilson score interval;
    - `failures`: one line a clip that shows something else than its prompt;
    - `vae`: `scenes` and `photos`, each as `reconstruction_scores` returns it. `photos` is {"skipped": reason} where
      the packages that carry the pictures are not installed.

    Raises `ReducioError` for counts below 1 and a model that cannot be loaded.
    """
    for name, count in (("num_prompts", num_prompts), ("num_clips", num_clips)):
        if count < 1:
            raise ReducioError(f"{name}={count}: at least 1 is needed")
    pipe = _pipeline(model)
    scenes = held_out_scenes(num_prompts, seed)
    seen = []
    for i, scene in enumerate(tqdm(scenes, desc="prompts", disable=not progress)):
        seen.append(detect(pipe(scene.caption(), seed=seed + i, progress=False).frames))

    size = min(pipe.sample_height, pipe.sample_width)
    length = pipe.vae.config.num_frames
    rng = np.random.default_rng([seed, _SCENES])
    drawn = (world.render(world.sample_scene(rng, held_out=True), rng, size, length) for _ in range(num_clips))
    vae = {"scenes": reconstruction_scores(pipe.vae, tqdm(drawn, "scenes", num_clips, disable=not progress))}
    if reason := _photos_missing():
        vae["photos"] = {"skipped": reason}
    else:
        clips = _photo_clips(num_clips, seed, size, length)
        vae["photos"] = reconstruction_scores(pipe.vae, tqdm(clips, "photos", num_clips, disable=not progress))
    return {"prompts": num_prompts, "seed": seed, **tally(scenes, seen, seed), "vae": vae}


def held_out_scenes(count: int, seed: int = 0) -> list[world.Scene]:
    """The scenes whose captions `evaluate` prompts with."""
    rng = np.random.default_rng([seed, _PROMPTS])
    return [world.sample_scene(rng, held_out=True) for _ in range(count)]


def tally(scenes: list[world.Scene], seen: list[Detection], seed: int = 0) -> dict[str, Any]:
    """Shares with intervals, and the list of failures, of what was seen against what was asked for."""
    right = dict.fromkeys((*ATTRIBUTES, "all"), 0)
    failures = []
    for i, (scene, found) in enumerate(zip(scenes, seen, strict=True)):
        matches = found.matches(scene)
        for name in ATTRIBUTES:
            right[name] += matches[name]
        right["all"] += all(matches.values())
        wrong = [f"{name} {getattr(found, name) or 'unclear'}" for name in ATTRIBUTES if not matches[name]]
        if wrong:
            shown = ", ".join(wrong) if found.found else "no object"
            failures.append(f"{scene.caption()} (seed {seed + i}): {shown}")
    scores = {
        name: {"right": count, "share": count / len(scenes), "interval": wilson_interval(count, len(scenes))}
        for name, count in right.items()
    }
    return {**scores, "failures": failures}


def wilson_interval(right: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a binomial share (Wilson 1927), 95% by default; it stays inside 0..1 and is never empty."""
    share = right / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.no_grad()
def reconstruct(vae: ReducioVAE, frames: np.ndarray) -> np.ndarray:
    """A clip through the autoencoder, uint8 [T, H, W, 3] in and out: posterior mode, own content frame."""
    weight = next(vae.parameters())
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(weight.device).float() / 127.5 - 1.0
    video = video.to(weight.dtype)
    tiled = vae.config.needs_tiling(*frames.shape[1:3])
    latent = vae.normalize_latent(vae.encode(video, tiled=tiled).mode())
    features = vae.encode_content(video[:, :, vae.config.content_frame], tiled=tiled)
    output = vae.decode(latent, features, tiled=tiled)[0].float()
    return ((output + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def reconstruction_scores(vae: ReducioVAE, clips: Iterable[np.ndarray]) -> dict[str, Any]:
    """Reconstruction of clips, uint8 [T, H, W, 3] with T the model's, against repeating their content frame.

    All figures are means over clips. `psnr` and `ssim` are per frame, then the mean over frames, as the Reducio-VAE
    release has them. Repeating the content frame is exact in that one frame, so `psnr_moving`, `repeat_psnr_moving` and
    their difference `gain_db` leave it out of both. `pooled_psnr`, `repeat_pooled_psnr` and `pooled_gain_db` are of the
    squared error over all frames; `worst_gain_db` is the least pooled gain of a clip.
    """
    rows = []
    for clip in clips:
        restored = reconstruct(vae, clip)
        content = vae.config.content_frame
        repeated = np.repeat(clip[content : content + 1], len(clip), axis=0)
        moving = np.arange(len(clip)) != content
        rows.append(
            {
                "psnr": psnr(clip, restored),
                "ssim": ssim(clip, restored),
                "repeat_ssim": ssim(clip, repeated),
                "psnr_moving": float(psnr_per_frame(clip, restored)[moving].mean()),
                "repeat_psnr_moving": float(psnr_per_frame(clip, repeated)[moving].mean()),
                "pooled_psnr": pooled_psnr(clip, restored),
                "repeat_pooled_psnr": pooled_psnr(clip, repeated),
            }
        )
    if not rows:
        raise ReducioError("clips: none given to score")
    scores: dict[str, Any] = {"clips": len(rows)}
    scores |= {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    scores["gain_db"] = scores["psnr_moving"] - scores["repeat_psnr_moving"]
    scores["pooled_gain_db"] = scores["pooled_psnr"] - scores["repeat_pooled_psnr"]
    scores["worst_gain_db"] = min(row["pooled_psnr"] - row["repeat_pooled_psnr"] for row in rows)
    return scores


def _photos_missing() -> str | None:
    """Why the held-out pictures cannot be had, if they cannot."""
    try:
        for name in photos.HELD_OUT_PHOTOS:
            photos.load_photo(name)
    except ReducioError as error:
        return str(error)
    return None


def _photo_clips(count: int, seed: int, size: int, num_frames: int) -> Iterator[np.ndarray]:
    """Held-out pictures in turn, so that each counts alike, under random camera moves."""
    rng = np.random.default_rng([seed, _PHOTOS])
    for i in range(count):
        name = photos.HELD_OUT_PHOTOS[i % len(photos.HELD_OUT_PHOTOS)]
        yield photos.render(rng, size, num_frames, held_out=True, name=name)


def _pipeline(model: str | os.PathLike[str] | Any) -> Any:
    if hasattr(model, "vae"):
        return model
    from ..checkpoints import embedded_model
    from ..pipeline import ReducioPipeline

    return ReducioPipeline.from_pretrained(embedded_model() if model is None else model)
