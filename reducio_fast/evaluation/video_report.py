"""Scores of an autoencoder on real video and of generated clips: the columns of the paper's tables.

A score that needs a network is None if the network's file is not given.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.curation import scores
from ..data.curation.curate import find_sources
from ..data.curation.shots import ShotFinder
from ..media.image_files import cover_crop
from ..media.perceptual import Perceptual
from ..media.similarity import psnr, ssim
from ..media.video_files import read_video, write_video
from ..pipelines.call import validation
from ..reference import ReducioVAE
from ..system.errors import ReducioError, first_line
from .networks import ClipNetwork, FrechetDistance, inception_score
from .reconstruction import reconstruct, reconstruction_scores


def windows(path: str, size: int, length: int) -> Iterator[np.ndarray]:
    """Consecutive clips of `length` frames within the shots of a video, scaled and cropped to squares of `size`."""
    frames, fps = read_video(path)
    finder = ShotFinder(fps or 24.0)
    for frame in frames:
        finder.add(cover_crop(frame[None], 144, 144)[0] if min(frame.shape[:2]) > 144 else frame)
    for start, end in finder.shots():
        for first in range(start, end - length + 1, length):
            yield cover_crop(frames[first : first + length], size, size)


def evaluate_autoencoder(
    vae: ReducioVAE,
    videos: Sequence[str | os.PathLike[str]],
    sizes: Sequence[int] = (256,),
    lpips: str | os.PathLike[str] | None = None,
    fvd: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Reconstruction of real video at each size: the columns of Table 1, and the gain over repeating the content frame.

    Returns for each size `videos`, the `reconstruction_scores` of each video by its path below the folder that holds
    them all, and `all`: means of `psnr`, `ssim`, `lpips` and `lpips_0_1` over all clips, `rfvd`, and the number of
    `clips`. Raises `ReducioError` for a size that the autoencoder does not take and if no shot is long enough.
    """
    for size in sizes:
        validation.check_multiple("size", size, vae.config.spatial_factor)
    sources = find_sources(videos)
    folder = os.path.commonpath([os.path.dirname(source.path) for source in sources])
    perceptual = None if lpips is None else Perceptual(lpips)
    result: dict[str, Any] = {}
    for size in sizes:
        distance = None if fvd is None else FrechetDistance(ClipNetwork(fvd))
        by_video, rows = {}, []
        for source in tqdm(sources, desc=f"{size} pixels", disable=not progress):
            clips = list(windows(source.path, size, vae.config.num_frames))
            if not clips:
                continue
            by_video[os.path.relpath(source.path, folder)] = reconstruction_scores(vae, clips)
            for clip in clips:
                restored = reconstruct(vae, clip)
                row = {"psnr": psnr(clip, restored), "ssim": ssim(clip, restored)}
                rows.append(row | (perceptual(clip, restored) if perceptual else {}))
                if distance is not None:
                    distance.add(clip, real=True)
                    distance.add(restored, real=False)
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
) -> dict[str, Any]:
    """Scores of generated clips, alone and compared with real ones.

    Returns `clips` (their number) and `motion` (mean flow between consecutive frames in percent of the short side; 0
    for a still). With `real` also `real_clips` and `real_motion`, with `fvd` and `real` also `fvd`, with `classifier`
    `inception_score`, with `clip_model` `clip_similarity` (mean over clips of the mean over frames; `captions` by file
    name or path). Raises `ReducioError` for `fvd` without `real` and for a clip without a caption.
    """
    if fvd is not None and real is None:
        raise ReducioError("fvd needs real clips to compare with")
    sources = find_sources(generated, captions)
    texts = [source.caption for source in sources if source.caption is not None]
    if clip_model is not None and len(texts) < len(sources):
        lacking = next(source.path for source in sources if source.caption is None)
        raise ReducioError(f"captions: none given for {lacking}")
    scorer = None if clip_model is None else scores.ClipScorer(Path(clip_model))
    generated_clips = [read_video(source.path)[0] for source in tqdm(sources, "read", disable=not progress)]
    real_clips = [] if real is None else [read_video(source.path)[0] for source in find_sources(real)]
    result: dict[str, Any] = {
        "clips": len(generated_clips),
        "motion": float(np.mean([motion_of(clip) for clip in generated_clips])),
    }
    if real_clips:
        result |= {
            "real_clips": len(real_clips),
            "real_motion": float(np.mean([motion_of(clip) for clip in real_clips])),
        }
    if fvd is not None:
        distance = FrechetDistance(ClipNetwork(fvd))
        for clips, is_real in ((real_clips, True), (generated_clips, False)):
            for clip in clips:
                distance.add(clip, is_real)
        result["fvd"] = distance.compute()
    if classifier is not None:
        result["inception_score"], result["inception_score_deviation"] = inception_score(
            ClipNetwork(classifier), generated_clips
        )
    if scorer is not None:
        result["clip_similarity"] = clip_similarity(scorer, generated_clips, texts)
    return result


def motion_of(clip: np.ndarray) -> float:
    """Motion between consecutive frames; curation's rate of two frames a second leaves two of a one-second clip."""
    return scores.motion([scores.small_gray(frame) for frame in clip]) or 0.0


def clip_similarity(scorer: scores.ClipScorer, clips: Sequence[np.ndarray], captions: Sequence[str]) -> float:
    """Mean cosine similarity between frames and captions."""
    clip_means = []
    for clip, caption in zip(clips, captions, strict=True):
        similarities = [scorer(frame, caption)["clip_similarity"] for frame in clip]
        clip_means.append(float(np.mean([value for value in similarities if value is not None])))
    return float(np.mean(clip_means))


def run_vbench(
    pipe: Any,
    prompts: Sequence[str],
    out: str | os.PathLike[str],
    python: str,
    dimensions: Sequence[str],
    count: int = 5,
) -> dict[str, Any]:
    """Generate `count` clips per prompt under VBench's names, `{prompt}-{index}.mp4`, and run VBench on them.

    `python` is the interpreter of another environment in which vbench is installed, because vbench needs versions of
    transformers and numpy that conflict with this project's. The seed of a clip is its index. Raises `ReducioError` if
    vbench cannot run or fails.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for prompt in prompts:
        for index in range(count):
            path = folder / f"{prompt}-{index}.mp4"
            if not path.is_file():
                clip = pipe(prompt, seed=index, progress=False)
                write_video(clip.frames, path, clip.fps)
    command = [python, "-m", "vbench", "evaluate", "--videos_path", str(folder), "--dimension", *dimensions]
    try:
        done = subprocess.run([*command, "--output_path", str(folder / "vbench")], capture_output=True, text=True)
    except OSError as error:
        raise ReducioError(f"{python} cannot be run: {error.strerror}") from error
    if done.returncode:
        raise ReducioError(f"vbench ended with {done.returncode}: {first_line(done.stderr.strip().splitlines()[-1:])}")
    results = sorted((folder / "vbench").glob("*eval_results.json"))
    if not results:
        raise ReducioError(f"vbench wrote no *eval_results.json in {folder / 'vbench'}")
    return json.loads(results[-1].read_text(encoding="utf-8"))
