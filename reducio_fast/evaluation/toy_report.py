"""Report on the default model: how often a clip shows what its prompt says, and the autoencoder's reconstruction.

Prompts are captions of held-out scenes, i.e. (colour, shape, motion) that training excludes; clips to reconstruct are
held-out scenes and held-out photographs. `toy_detector.detect`, which is independent of the model, reads the clips.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import sqrt
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data import photos, toy_world
from ..data.toy_detector import Detection, detect
from ..system.errors import ReducioError
from .reconstruction import reconstruction_scores

ATTRIBUTES = ("colour", "motion", "shape")
# Separate random streams of one seed, so that the number of prompts does not change the clips.
_PROMPTS, _SCENES, _PHOTOS = 1, 2, 3


def evaluate(
    model: str | os.PathLike[str] | Any = None,
    num_prompts: int = 64,
    seed: int = 0,
    progress: bool = True,
    num_clips: int = 32,
    refine: int = 0,
) -> dict[str, Any]:
    """Score a model on held-out prompts and clips of the toy world; prompt i is generated with seed + i.

    `model` is None for the embedded model, a folder, a hub id, or a loaded `ReducioPipeline`. Returns plain data:

    - `prompts`, `seed`, and for each of `colour`, `motion`, `shape` and for `all` three together: `right` (a count),
      `share` and `interval`, its 95% Wilson score interval;
    - `failures`: one line per clip that does not match its prompt;
    - `vae`: `scenes` and `photos`, each as `reconstruction_scores` with `refine` returns it. `photos` is
      {"skipped": reason} if the packages that contain the pictures are not installed.

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
    drawn = (toy_world.render(toy_world.sample_scene(rng, held_out=True), rng, size, length) for _ in range(num_clips))
    vae = {"scenes": reconstruction_scores(pipe.vae, tqdm(drawn, "scenes", num_clips, disable=not progress), refine)}
    if reason := _photos_missing():
        vae["photos"] = {"skipped": reason}
    else:
        clips = _photo_clips(num_clips, seed, size, length)
        vae["photos"] = reconstruction_scores(pipe.vae, tqdm(clips, "photos", num_clips, disable=not progress), refine)
    return {"prompts": num_prompts, "seed": seed, **tally(scenes, seen, seed), "vae": vae}


def held_out_scenes(count: int, seed: int = 0) -> list[toy_world.Scene]:
    """The scenes whose captions are the prompts of `evaluate`."""
    rng = np.random.default_rng([seed, _PROMPTS])
    return [toy_world.sample_scene(rng, held_out=True) for _ in range(count)]


def tally(scenes: list[toy_world.Scene], seen: list[Detection], seed: int = 0) -> dict[str, Any]:
    """Compare the detections with the scenes: shares of matches with intervals, and the list of failures."""
    right = dict.fromkeys((*ATTRIBUTES, "all"), 0)
    failures = []
    for i, (scene, detection) in enumerate(zip(scenes, seen, strict=True)):
        matches = detection.matches(scene)
        for name in ATTRIBUTES:
            right[name] += matches[name]
        right["all"] += all(matches.values())
        wrong = [f"{name} {getattr(detection, name) or 'unclear'}" for name in ATTRIBUTES if not matches[name]]
        if wrong:
            shown = ", ".join(wrong) if detection.found else "no object"
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


def _photos_missing() -> str | None:
    """The reason why the held-out photographs cannot be loaded; None if they can."""
    try:
        for name in photos.HELD_OUT_PHOTOS:
            photos.load_photo(name)
    except ReducioError as error:
        return str(error)
    return None


def _photo_clips(count: int, seed: int, size: int, num_frames: int) -> Iterator[np.ndarray]:
    """Clips of the held-out pictures in turn, for equal weights, under random camera moves."""
    rng = np.random.default_rng([seed, _PHOTOS])
    for i in range(count):
        name = photos.HELD_OUT_PHOTOS[i % len(photos.HELD_OUT_PHOTOS)]
        yield photos.render(rng, size, num_frames, held_out=True, name=name)


def _pipeline(model: str | os.PathLike[str] | Any) -> Any:
    if hasattr(model, "vae"):
        return model
    from ..checkpoints.strict_files import embedded_model
    from ..pipelines.reducio.pipeline import ReducioPipeline

    return ReducioPipeline.from_pretrained(embedded_model() if model is None else model)
