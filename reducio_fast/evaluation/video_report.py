"""How good an autoencoder, or a folder of generated clips, is on real video: the columns of the paper's tables.

What needs a network is measured where its file is given, and is None where not.
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
from ..reference import ReducioVAE
from ..system.errors import ReducioError, first_line
from .networks import ClipNetwork, FrechetDistance, inception_score
from .reconstruction import reconstruct, reconstruction_scores


def windows(path: str, size: int, length: int) -> Iterator[np.ndarray]:
    """Neighbouring clips of `length` frames within the shots of a video, scaled and cropped to squares of `size`."""
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

    Returns, by size and video, what `reconstruction_scores` returns with `content_psnr`; by size also means over all
    clips, `lpips` and `lpips_0_1`, `rfvd` and the number of `clips` it is of.
    """
    perceptual = None if lpips is None else Perceptual(lpips)
    result: dict[str, Any] = {}
    for size in sizes:
        distance = None if fvd is None else FrechetDistance(ClipNetwork(fvd))
        by_video, rows = {}, []
        for source in tqdm(find_sources(videos), desc=f"{size} pixels", disable=not progress):
            clips = list(windows(source.path, size, vae.config.num_frames))
            if not clips:
                continue
            by_video[Path(source.path).name] = reconstruction_scores(vae, clips)
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
    """Generated clips, by themselves and beside real ones.

    Returns `clips`, `motion` (mean flow from frame to frame, in percent of the short side; a still has none), and,
    where what they need is given, `real_motion`, `fvd` with `real_clips`, `inception_score`, `clip_similarity` (mean
    over clips of the mean over frames, with the captions by file name).
    """
    made = [read_video(source.path)[0] for source in tqdm(find_sources(generated), "read", disable=not progress)]
    names = [Path(source.path).name for source in find_sources(generated)]
    others = [] if real is None else [read_video(source.path)[0] for source in find_sources(real)]
    result: dict[str, Any] = {"clips": len(made), "motion": float(np.mean([motion_of(clip) for clip in made]))}
    if others:
        result |= {"real_clips": len(others), "real_motion": float(np.mean([motion_of(clip) for clip in others]))}
    if fvd is not None:
        if not others:
            raise ReducioError("fvd needs real clips to compare with")
        distance = FrechetDistance(ClipNetwork(fvd))
        for clips, is_real in ((others, True), (made, False)):
            for clip in clips:
                distance.add(clip, is_real)
        result["fvd"] = distance.compute()
    if classifier is not None:
        result["inception_score"], result["inception_score_deviation"] = inception_score(ClipNetwork(classifier), made)
    if clip_model is not None:
        result["clip_similarity"] = clip_similarity(clip_model, made, names, captions or {})
    return result


def motion_of(clip: np.ndarray) -> float:
    """From frame to frame over the whole clip: of one second, curation's two frames a second would see two."""
    return scores.motion([scores.small_gray(frame) for frame in clip]) or 0.0


def clip_similarity(
    model: str | os.PathLike[str], clips: Sequence[np.ndarray], names: Sequence[str], captions: dict[str, str]
) -> float:
    """Mean cosine between frames and captions."""
    scorer = scores.ClipScorer(Path(model))
    lacking = [name for name in names if name not in captions]
    if lacking:
        raise ReducioError(f"captions: none for {lacking[0]}")
    of_clips = []
    for clip, name in zip(clips, names, strict=True):
        of_frames = [scorer(frame, captions[name])["clip_similarity"] for frame in clip]
        of_clips.append(float(np.mean([value for value in of_frames if value is not None])))
    return float(np.mean(of_clips))


def run_vbench(
    pipe: Any,
    prompts: Sequence[str],
    out: str | os.PathLike[str],
    python: str,
    dimensions: Sequence[str],
    count: int = 5,
) -> dict[str, Any]:
    """Draws `count` clips a prompt under VBench's names, `{prompt}-{index}.mp4`, and runs VBench on them.

    python: interpreter of another environment, where vbench is installed: it needs versions of transformers and
    numpy that this project cannot share. The seed of a clip is its index.
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
        raise ReducioError(f"vbench left no *eval_results.json in {folder / 'vbench'}")
    return json.loads(results[-1].read_text(encoding="utf-8"))
