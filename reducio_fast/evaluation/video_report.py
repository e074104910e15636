"""Scores of an autoencoder on real video and of generated clips: the columns of the paper's tables.

A score that needs a network is None if the network's file is not given.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.curation import scores
from ..data.curation.curate import find_sources
from ..data.curation.shots import ShotFinder
from ..media import ffmpeg
from ..media.image_files import cover_crop
from ..media.perceptual import Perceptual
from ..media.video_files import read_video
from ..pipelines.call import validation
from ..reference import ReducioVAE
from ..system.errors import ReducioError
from .networks import CLIP_FRAMES, ClipNetwork, FrechetDistance, InceptionScore, check_counts
from .reconstruction import clip_scores, mean_scores, reconstruct

RATE = 16.0  # frames a second at which clips are compared, the rate of the paper's model


def windows(path: str, size: int, length: int) -> Iterator[np.ndarray]:
    """Consecutive clips of `length` frames within the shots of a video, scaled and cropped to squares of `size`.

    The film is decoded twice, for its shots and for the clips, so that memory holds one clip, not the film.
    """
    firsts, number = first_frames(path, length), 0
    with contextlib.closing(ffmpeg.frames(Path(path))) as film:
        for first in firsts:
            taken = itertools.islice(film, first - number, first - number + length)
            yield np.concatenate([cover_crop(frame[None], size, size) for frame, _ in taken])
            number = first + length


def first_frames(path: str, length: int) -> list[int]:
    """Numbers of the first frames of consecutive clips of `length` frames within the shots of a video."""
    finder: ShotFinder | None = None
    for frame, fps in ffmpeg.frames(Path(path)):
        finder = finder or ShotFinder(fps)
        finder.add(cover_crop(frame[None], 144, 144)[0] if min(frame.shape[:2]) > 144 else frame)
    shots = finder.shots() if finder else []
    return [first for start, end in shots for first in range(start, end - length + 1, length)]


def evaluate_autoencoder(
    vae: ReducioVAE,
    videos: Sequence[str | os.PathLike[str]],
    sizes: Sequence[int] = (256,),
    lpips: str | os.PathLike[str] | None = None,
    fvd: str | os.PathLike[str] | None = None,
    progress: bool = True,
    refine: int = 0,
) -> dict[str, Any]:
    """Reconstruction of real video at each size: the columns of Table 1, and the gain over repeating the content frame.

    `refine` is as in `reconstruct`; the paper's figures are of the encoder's own latents. The networks of `lpips` and
    `fvd` run on the autoencoder's device. Returns for each size `videos`, the `reconstruction_scores` of each video by
    its path below the folder that holds them all, and `all`: means of `psnr`, `ssim`, `lpips` and `lpips_0_1` over all
    clips, `rfvd`, and the number of `clips`. Raises `ReducioError` for a size that the autoencoder does not take and if
    no shot is long enough.
    """
    for size in sizes:
        validation.check_multiple("size", size, vae.config.spatial_factor)
    sources = find_sources(videos)
    folder = os.path.commonpath([os.path.dirname(source.path) for source in sources])
    device = next(vae.parameters()).device
    perceptual = None if lpips is None else Perceptual(lpips, device=device)
    network = None if fvd is None else ClipNetwork(fvd, device)
    result: dict[str, Any] = {}
    for size in sizes:
        distance = None if network is None else FrechetDistance(network)
        by_video, rows = {}, []
        for source in tqdm(sources, desc=f"{size} pixels", disable=not progress):
            own = []
            for clip in windows(source.path, size, vae.config.num_frames):
                restored = reconstruct(vae, clip, refine)
                own.append(clip_scores(clip, restored, vae.config.content_frame))
                row = {name: own[-1][name] for name in ("psnr", "ssim")}
                rows.append(row | (perceptual(clip, restored) if perceptual else {}))
                if distance is not None:
                    distance.add(clip, real=True)
                    distance.add(restored, real=False)
            if own:
                by_video[os.path.relpath(source.path, folder)] = mean_scores(own)
        if not rows:
            raise ReducioError(f"no shot of these videos is {vae.config.num_frames} frames long")
        means: dict[str, float | None] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        means |= {"clips": len(rows), "rfvd": None if distance is None else distance.compute()}
        result[str(size)] = {"videos": by_video, "all": means}
    return result


def evaluate_clips(
    generated: Sequence[str | os.PathLike[str]],
    real: Sequence[str | os.PathLike[str]] | None = None,
    fvd: str | os.PathLike[str] | None = None,
    classifier: str | os.PathLike[str] | None = None,
    clip_model: str | os.PathLike[str] | None = None,
    captions: dict[str, str] | None = None,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Scores of generated clips, alone and compared with real ones; of each file the frames of `first_second`.

    Returns `clips` (their number), `fps` (mean frames per second of these frames) and `motion` (mean flow between them
    in percent of the short side; 0 for a still). With `real` also `real_clips`, `real_fps` and `real_motion`, with
    `fvd` and `real` also `fvd`, with `classifier` `inception_score`, with `clip_model` `clip_similarity` (mean over
    clips of the mean over frames; `captions` by file name or path). `device` runs the networks. Memory holds one clip.

    Raises `ReducioError` for `fvd` without `real` or with fewer than two clips of either, and for a clip without a
    caption.
    """
    if fvd is not None and real is None:
        raise ReducioError("fvd needs real clips to compare with")
    sources = find_sources(generated, captions)
    real_sources = [] if real is None else find_sources(real)
    if fvd is not None:
        check_counts(len(real_sources), len(sources))
    lacking = [source.path for source in sources if not source.caption]
    if clip_model is not None and lacking:
        raise ReducioError(f"captions: none given for {lacking[0]}")
    scorer = None if clip_model is None else scores.ClipScorer(Path(clip_model), device=device)
    distance = None if fvd is None else FrechetDistance(ClipNetwork(fvd, device))
    inception = None if classifier is None else InceptionScore(ClipNetwork(classifier, device))

    motions, rates, similarities = [], [], []
    for source in tqdm(sources, "generated", disable=not progress):
        clip, fps = first_second(source.path, 1 if distance is None and inception is None else CLIP_FRAMES)
        motions.append(motion_of(clip))
        rates.append(fps)
        if distance is not None:
            distance.add(clip, real=False)
        if inception is not None:
            inception.add(clip)
        if scorer is not None:
            similarities.append(clip_similarity(scorer, clip, source.caption))
    result: dict[str, Any] = {"clips": len(sources), "fps": float(np.mean(rates)), "motion": float(np.mean(motions))}

    motions, rates = [], []
    for source in tqdm(real_sources, "real", disable=not (progress and real_sources)):
        clip, fps = first_second(source.path, 1 if distance is None else CLIP_FRAMES)
        motions.append(motion_of(clip))
        rates.append(fps)
        if distance is not None:
            distance.add(clip, real=True)
    if real_sources:
        result |= {"real_clips": len(real_sources), "real_fps": float(np.mean(rates))}
        result["real_motion"] = float(np.mean(motions))
    if distance is not None:
        result["fvd"] = distance.compute()
    if inception is not None:
        result["inception_score"] = inception.compute()
    if scorer is not None:
        result["clip_similarity"] = float(np.mean(similarities))
    return result


def first_second(path: str, least: int = 1) -> tuple[np.ndarray, float]:
    """The first 16 frames of a video at about 16 a second, uint8 [T, H, W, 3], and their frames per second.

    The step is the video's rate divided by 16, rounded, and smaller in a video that is too short for it. A video of
    fewer than 16 frames is returned whole. Raises `ReducioError` if it has fewer than `least` frames.
    """
    fps = read_video(path, count=1)[1] or RATE
    step = max(1, round(fps / RATE))
    frames = read_video(path, count=(CLIP_FRAMES - 1) * step + 1)[0]
    if len(frames) < least:
        raise ReducioError(f"{path} has {len(frames)} frames: {least} are needed")
    step = min(step, max(1, (len(frames) - 1) // (CLIP_FRAMES - 1)))
    return frames[::step][:CLIP_FRAMES], fps / step


def motion_of(clip: np.ndarray) -> float:
    """Motion between consecutive frames; curation's rate of two frames a second leaves two of a one-second clip."""
    return scores.motion([scores.small_gray(frame) for frame in clip]) or 0.0


def clip_similarity(scorer: scores.ClipScorer, clip: np.ndarray, caption: str | None) -> float:
    """Mean cosine similarity between the frames and the caption."""
    similarities = [scorer(frame, caption)["clip_similarity"] for frame in clip]
    return float(np.mean([value for value in similarities if value is not None]))
