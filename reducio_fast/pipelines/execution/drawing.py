"""A picture of a prompt by any diffusers text-to-image pipeline, at the size of a clip."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ...media.image_files import fit_image
from ...system.errors import ReducioError, first_line, shown
from ...system.real_numbers import to_float
from ..call.validation import check_count

logger = logging.getLogger(__name__)

# Passed to a pipeline that has these arguments: PixArt's defaults would draw at another size and resize, and would
# rewrite the prompt.
PIPELINE_KWARGS: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
# PixArt-alpha's, for a pipeline whose own default is None.
DEFAULTS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.5}
# What a pipeline raises for an argument that it takes and cannot follow.
WRONG_ARGUMENT = (ValueError, TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError)
OURS = ("prompt", "negative_prompt", "generator", "output_type", "return_dict", "num_images_per_prompt")
# A frame whose number of pixels is within these factors of the pipeline's native one is drawn at its own size. All of
# PixArt's buckets of one base are: their areas are 0.90 to 1.00 of the square's.
OWN_AREA = (0.8, 1.25)
BINNED = (256, 512, 1024)  # native sizes for which diffusers has PixArt's table of sizes per aspect ratio


def check_content_kwargs(pipeline: Any, kwargs: Any) -> dict[str, Any]:
    """`content_kwargs` of a call, before any work: ReducioError where the text-to-image pipeline does not take one, and
    for steps, a size or a length of the caption below 1 and guidance that is not finite."""
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict):
        raise ReducioError(
            f"content_kwargs: must be a dict of words for the text-to-image pipeline, is {shown(kwargs)}"
        )
    for name in ("num_inference_steps", "height", "width", "max_sequence_length"):
        if name in kwargs:
            check_count(f"content_kwargs: {name}", kwargs[name])
    scale = kwargs.get("guidance_scale", 0.0)
    if not math.isfinite(to_float(scale)):
        raise ReducioError(f"content_kwargs: guidance_scale: must be a finite number, is {shown(scale)}")
    accepted, takes_any = call_defaults(pipeline)
    steps, most = kwargs.get("num_inference_steps", 0), _training_steps(pipeline)
    if most is not None and steps > most:  # its times would be shared by steps, between which a solver divides
        raise ReducioError(f"content_kwargs: num_inference_steps: must be from 1 to {most}, is {shown(steps)}")
    if "PixArt" in type(pipeline).__name__ and kwargs.get("num_inference_steps") == 1:
        raise ReducioError("content_kwargs: num_inference_steps is 1; diffusers' PixArt pipelines need at least 2")
    for name in kwargs:
        if name in OURS:
            raise ReducioError(f"content_kwargs: {name!r} is set by the call itself; known are {_known(accepted)}")
        if pipeline is not None and name not in accepted and not takes_any:
            raise ReducioError(
                f"content_kwargs: {type(pipeline).__name__} has no word {name!r}; known are {_known(accepted)}"
            )
        _check_kind(name, kwargs[name], accepted.get(name))
    return kwargs


def _check_kind(name: str, value: Any, default: Any) -> None:
    """Raise ReducioError for a value that is of another kind than the argument's default."""
    if value is None:
        return
    if isinstance(default, bool):
        right, kind = isinstance(value, bool | int) and value in (0, 1), "true or false"
    elif isinstance(default, int | float):
        right, kind = math.isfinite(to_float(value)), "a finite number"
    else:
        return
    if not right:
        raise ReducioError(f"content_kwargs: {name}: must be {kind}, is {shown(value)}")


def draw_image(
    pipeline: Any,
    prompt: str,
    negative_prompt: str,
    height: int,
    width: int,
    generator: torch.Generator,
    progress: bool,
    kwargs: dict[str, Any] | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> np.ndarray:
    """Draw the content frame of one prompt, uint8 [height, width, 3], with a diffusers text-to-image pipeline.

    It is drawn at `drawing_size` and scaled to the clip's; `kwargs` (a call's `content_kwargs`) may name another size.
    """
    accepted, takes_any = call_defaults(pipeline)
    drawn_height, drawn_width = drawing_size(pipeline, height, width)
    asked = {"height": drawn_height, "width": drawn_width} | own_defaults(pipeline) | (kwargs or {})
    fixed = {name: value for name, value in PIPELINE_KWARGS.items() if name in accepted}
    defaults = {name: value for name, value in DEFAULTS.items() if accepted.get(name, True) is None}
    chosen = fixed | defaults | _callback(accepted, on_step)
    chosen |= {name: value for name, value in asked.items() if name in accepted or takes_any}
    if negative_prompt.strip() and "negative_prompt" in accepted:
        chosen["negative_prompt"] = negative_prompt  # else the pipeline's own default
    rows, columns = chosen.get("height", height), chosen.get("width", width)
    warn_of_scaling(pipeline, rows, columns, height, width)
    pipeline.set_progress_bar_config(disable=not progress, desc="content.generate", leave=False)
    try:
        images = pipeline(prompt=prompt, generator=generator, output_type="np", **chosen).images
    except WRONG_ARGUMENT as error:  # a size or an argument that this pipeline cannot take
        raise ReducioError(f"content frame: {type(pipeline).__name__}: {first_line(error)}") from error
    image = np.asarray(images[0])
    if not np.isfinite(image).all():
        raise ReducioError(
            f"content frame of {prompt[:60]!r}: the text-to-image stage returned values that are not finite"
        )
    return fit_image((image.clip(0, 1) * 255).round().astype(np.uint8), height, width)


def warn_of_scaling(pipeline: Any, rows: int, columns: int, height: int, width: int) -> None:
    """Warn once if a picture of rows x columns has to be scaled up to the clip's size."""
    if rows < height or columns < width:
        warn_once(
            f"content frame: {type(pipeline).__name__} draws {rows}x{columns}, which is scaled up to the clip's "
            f"{height}x{width}; a first stage made for that size gives a sharper clip"
        )


def _callback(accepted: Mapping[str, Any], on_step: Callable[[int], None]) -> dict[str, Any]:
    """The argument, new or old, by which a diffusers pipeline calls back after each step."""

    def step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step)
        return tensors

    if "callback_on_step_end" in accepted:
        return {"callback_on_step_end": step_end}
    if "callback" in accepted:  # PixArt's
        return {"callback": lambda step, timestep, latents: on_step(step), "callback_steps": 1}
    return {}


def drawing_size(pipeline: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width at which a pipeline draws a frame of height x width: the frame's own if its number of pixels is
    near the pipeline's native one, or that is not known; else the native size of the nearest aspect ratio."""
    native = native_size(pipeline)
    if native is None or OWN_AREA[0] <= height * width / native**2 <= OWN_AREA[1]:
        return height, width
    if native in BINNED:
        from diffusers.image_processor import PixArtImageProcessor
        from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as tables

        table = getattr(tables, f"ASPECT_RATIO_{native}_BIN")
        return PixArtImageProcessor.classify_height_width_bin(height, width, ratios=table)
    step = max(native // 16, 2 * pipeline.vae_scale_factor)  # PixArt's tables have 16 steps per side too
    ratio = math.sqrt(height / width)
    return max(step, round(native * ratio / step) * step), max(step, round(native / ratio / step) * step)


def native_size(pipeline: Any) -> int | None:
    """Side in pixels of the square image a diffusers pipeline was made for; None if that is not known."""
    # `is not None`, since a network under torch.compile has no truth value (its `__len__` raises).
    network = next((x for name in ("transformer", "unet") if (x := getattr(pipeline, name, None)) is not None), None)
    latent = getattr(pipeline, "default_sample_size", None) or getattr(
        getattr(network, "config", None), "sample_size", None
    )
    factor = getattr(pipeline, "vae_scale_factor", None)
    return latent * factor if isinstance(latent, int) and isinstance(factor, int) else None


def call_defaults(pipeline: Any) -> tuple[dict[str, Any], bool]:
    """The arguments of a pipeline's call with their defaults (None for none; its folder's before the class's), and
    whether it takes any other.

    The `**kwargs` of a call that names its arguments do not count: diffusers has them for retired arguments, and drops
    all others silently.
    """
    parameters = inspect.signature(pipeline.__call__).parameters if pipeline is not None else {}
    defaults = {
        name: None if p.default is p.empty else p.default for name, p in parameters.items() if p.kind != p.VAR_KEYWORD
    }
    takes_any = len(defaults) < len(parameters) and "num_inference_steps" not in defaults
    own = own_defaults(pipeline)
    return {name: own.get(name, default) for name, default in defaults.items()}, takes_any


def drawing_steps(pipeline: Any, kwargs: dict[str, Any]) -> int:
    """The number of steps in which the pipeline draws a picture, called with `kwargs`."""
    asked = call_defaults(pipeline)[0] | kwargs
    placed: Any = next((x for name in ("timesteps", "sigmas") if (x := asked.get(name)) is not None), None)
    return len(placed) if hasattr(placed, "__len__") else asked.get("num_inference_steps") or 1


def _training_steps(pipeline: Any) -> int | None:
    """The number of noise levels of a pipeline's scheduler, if it has such a number."""
    config = getattr(getattr(pipeline, "scheduler", None), "config", None)
    most = getattr(config, "num_train_timesteps", None)
    return most if isinstance(most, int) else None


def own_defaults(pipeline: Any) -> dict[str, Any]:
    """The defaults that the pipeline's folder sets for a call: `_call_defaults` of its model_index.json."""
    return getattr(pipeline, "call_defaults", None) or {}


def _known(names: Iterable[str]) -> str:
    return ", ".join(name for name in names if name not in OURS) or "none"


@functools.lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    logger.warning(message)
