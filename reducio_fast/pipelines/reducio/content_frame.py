"""Stage one: the content frame, drawn by any diffusers text-to-image pipeline or taken from the user's own image.

Reducio (arXiv 2411.13552) takes its content frames from an off-the-shelf model: PixArt-alpha where the paper measures
speed, SDXL where it measures quality. Both roads end in a uint8 picture of the clip's size, so a drawn frame that is
saved and given back makes the same clip. It is the clip's centre frame, number (T - 1) // 2, not its first.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
from typing import Any

import numpy as np
import torch

from ...media.image_files import fit_image
from ...system.errors import ReducioError

logger = logging.getLogger(__name__)

# What a pipeline is told where it has the words: PixArt's defaults would draw at another size and resize by themselves,
# and would rewrite the prompt.
PIPELINE_WORDS: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
# And where it has no values of its own: PixArt-alpha's.
STEPS = 20
GUIDANCE = 4.5
DEFAULTS: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
OURS = ("prompt", "negative_prompt", "generator", "output_type", "return_dict", "num_images_per_prompt")
# A frame of up to a quarter more or less than the drawer's own number of pixels is drawn as it is. All of PixArt's
# buckets of one base lie within: their areas are 0.90 to 1.00 of the square's.
OWN_AREA = (0.8, 1.25)
BINNED = (256, 512, 1024)  # native sizes for which diffusers has PixArt's table of sizes per aspect ratio


def check_words(pipeline: Any, words: Any) -> dict[str, Any]:
    """`content_kwargs` of a call, before any work: ReducioError for a word that the text-to-image pipeline has not."""
    if words is None:
        return {}
    if not isinstance(words, dict):
        raise ReducioError(f"content_kwargs: must be a dict of words for the text-to-image pipeline, is {words!r}")
    accepted, takes_any = _words(pipeline)
    for word in words:
        if word in OURS:
            raise ReducioError(f"content_kwargs: {word!r} is set by the call itself; known are {_known(accepted)}")
        if pipeline is not None and word not in accepted and not takes_any:
            raise ReducioError(
                f"content_kwargs: {type(pipeline).__name__} has no word {word!r}; known are {_known(accepted)}"
            )
    return words


def draw_image(
    pipeline: Any,
    prompt: str,
    negative_prompt: str,
    height: int,
    width: int,
    generator: torch.Generator,
    progress: bool,
    words: dict[str, Any] | None = None,
) -> np.ndarray:
    """Draw the content frame of one prompt, uint8 [height, width, 3], with a diffusers text-to-image pipeline.

    It is drawn at `drawing_size` and scaled to the clip's; `words` (a call's `content_kwargs`) may say another size.
    """
    accepted, takes_any = _words(pipeline)
    drawn_height, drawn_width = drawing_size(pipeline, height, width)
    given = {"height": drawn_height, "width": drawn_width} | (words or {})
    fixed = {word: value for word, value in PIPELINE_WORDS.items() if word in accepted}
    own = {word: value for word, value in DEFAULTS.items() if accepted.get(word, True) is None}
    chosen = fixed | own | {w: v for w, v in given.items() if w in accepted or takes_any}
    if negative_prompt.strip() and "negative_prompt" in accepted:
        chosen["negative_prompt"] = negative_prompt  # else what the pipeline itself takes for none
    rows, columns = chosen.get("height", height), chosen.get("width", width)
    if rows < height or columns < width:
        _warn_once(
            f"content frame: {type(pipeline).__name__} draws {rows}x{columns}, which is scaled up to the clip's "
            f"{height}x{width}; a first stage made for that size gives a sharper clip"
        )
    pipeline.set_progress_bar_config(disable=not progress, desc="content.generate", leave=False)
    try:
        images = pipeline(prompt=prompt, generator=generator, output_type="np", **chosen).images
    except ValueError as error:  # a size or a word that this pipeline cannot take
        raise ReducioError(f"content frame: {type(pipeline).__name__}: {error}") from error
    image = np.asarray(images[0])
    if not np.isfinite(image).all():
        raise ReducioError(f"content frame of {prompt!r}: the text-to-image stage returned values that are not finite")
    return fit_image((image.clip(0, 1) * 255).round().astype(np.uint8), height, width)


def drawing_size(pipeline: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width at which a pipeline draws a frame of height x width: the frame's own where it is near the
    pipeline's native number of pixels or that is not known; else the native size of the nearest aspect ratio."""
    native = native_size(pipeline)
    if native is None or OWN_AREA[0] <= height * width / native**2 <= OWN_AREA[1]:
        return height, width
    if native in BINNED:
        from diffusers.image_processor import PixArtImageProcessor
        from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as tables

        table = getattr(tables, f"ASPECT_RATIO_{native}_BIN")
        return PixArtImageProcessor.classify_height_width_bin(height, width, ratios=table)
    step = max(native // 16, 2 * pipeline.vae_scale_factor)  # PixArt's tables have 16 steps a side too
    ratio = math.sqrt(height / width)
    return max(step, round(native * ratio / step) * step), max(step, round(native / ratio / step) * step)


def native_size(pipeline: Any) -> int | None:
    """Side in pixels of the square image a diffusers pipeline was made for; None where it does not tell."""
    network = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    latent = getattr(pipeline, "default_sample_size", None) or getattr(
        getattr(network, "config", None), "sample_size", None
    )
    factor = getattr(pipeline, "vae_scale_factor", None)
    return latent * factor if isinstance(latent, int) and isinstance(factor, int) else None


def _words(pipeline: Any) -> tuple[dict[str, Any], bool]:
    """The words of a pipeline's call with their defaults (None for none), and whether it takes any other.

    The `**kwargs` of a call that names its words do not count: diffusers has them for words it retired, and drops the
    rest in silence.
    """
    parameters = inspect.signature(pipeline.__call__).parameters if pipeline is not None else {}
    words = {
        name: None if p.default is p.empty else p.default for name, p in parameters.items() if p.kind != p.VAR_KEYWORD
    }
    return words, len(words) < len(parameters) and "num_inference_steps" not in words


def _known(words: dict[str, Any]) -> str:
    return ", ".join(word for word in words if word not in OURS) or "none"


@functools.lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    logger.warning(message)
