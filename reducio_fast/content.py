"""Stage one: the content frame, drawn by any diffusers text-to-image pipeline or taken from the user's own image.

Reducio (arXiv 2411.13552) takes its content frames from an off-the-shelf model, PixArt-alpha in the paper. Both roads
end in a uint8 picture of the clip's size, so a drawn frame that is saved and given back makes the same clip.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .checkpoints import INDEX, load_foreign, read_json, write_json
from .errors import ReducioError
from .video import cover_crop, read_image

STEPS = 20  # DPM-Solver++ and guidance as PixArt-alpha's own inference
GUIDANCE = 4.5
# PixArt's defaults would draw at another size and resize, and would rewrite the prompt. A pipeline without these words
# does neither.
PIPELINE_WORDS: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}


def read_images(image: Any, count: int) -> list[np.ndarray | None]:
    """Content frames, uint8 [h, w, 3], one a clip: None for those to be drawn."""
    if image is None:
        return [None] * count
    if isinstance(image, np.ndarray) and image.ndim == 4:
        image = list(image)  # `out.content` of a list, given back
    if not isinstance(image, list | tuple):
        return [read_image(image)] * count
    if len(image) != count:
        raise ReducioError(f"image: {len(image)} given for {count} prompts; give one for all or one a prompt")
    return [read_image(each) for each in image]


def fit_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] scaled, anti-aliased, until it covers height x width, and its centre cut out."""
    return cover_crop(image[None], height, width)[0]


def draw_image(
    pipeline: Any,
    prompt: str,
    negative_prompt: str,
    height: int,
    width: int,
    generator: torch.Generator,
    progress: bool,
) -> np.ndarray:
    """Draw the content frame of one prompt, uint8 [height, width, 3], with a diffusers text-to-image pipeline."""
    accepted = inspect.signature(pipeline.__call__).parameters
    words = {word: value for word, value in PIPELINE_WORDS.items() if word in accepted}
    if negative_prompt.strip():
        words["negative_prompt"] = negative_prompt  # else what the pipeline itself takes for none
    pipeline.set_progress_bar_config(disable=not progress, desc="content.generate", leave=False)
    try:
        images = pipeline(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generator,
            output_type="np",
            **words,
        ).images
    except ValueError as error:  # a size or a word that this pipeline cannot take
        raise ReducioError(f"content frame: {type(pipeline).__name__}: {error}") from error
    image = np.asarray(images[0])
    if not np.isfinite(image).all():
        raise ReducioError(f"content frame of {prompt!r}: the text-to-image stage returned values that are not finite")
    return fit_image((image.clip(0, 1) * 255).round().astype(np.uint8), height, width)


def load_text_to_image(folder: Path, shared: dict[str, Any], dtype: torch.dtype, device: str | torch.device) -> Any:
    """Load a diffusers pipeline folder. A component without a sub-folder of its own is taken from `shared`.

    Components are loaded one by one rather than by the pipeline's `from_pretrained`: strictly, and without importing
    what they do not need.
    """
    index = read_json(folder / INDEX)
    class_name = index.get("_class_name")
    cls = getattr(importlib.import_module("diffusers"), str(class_name), None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise ReducioError(f"{folder / INDEX}: names the pipeline {class_name!r}, which diffusers does not have")
    components: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not _is_component(value):
            components[name] = value  # a plain setting of the pipeline
        elif value[0] is None:
            components[name] = None
        elif (folder / name).is_dir():
            components[name] = load_foreign(value[0], value[1], folder / name, dtype, device)
        elif shared.get(name) is not None:
            components[name] = shared[name]
        else:
            raise ReducioError(f"{folder}: {name} has no folder here and the model shares no component of that name")
    try:
        return cls(**components)
    except (TypeError, ValueError) as error:
        raise ReducioError(f"{folder / INDEX}: {class_name} cannot be built: {error}") from error


def save_text_to_image(pipeline: Any, folder: Path, shared: dict[str, Any]) -> None:
    """Write a diffusers pipeline, except the components that are the very objects in `shared`; the index names all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, component in pipeline.components.items():
        if component is not None and component is not shared.get(name):
            component.save_pretrained(folder / name)
    settings = {n: list(v) if isinstance(v, tuple) else v for n, v in pipeline.config.items() if n != "_name_or_path"}
    write_json(folder / INDEX, {"_class_name": type(pipeline).__name__} | settings)


def networks(pipeline: Any) -> list[nn.Module]:
    """The torch modules of a diffusers pipeline."""
    return [c for c in pipeline.components.values() if isinstance(c, nn.Module)]


def _is_component(value: Any) -> bool:
    """In a diffusers index a component is a pair [library, class], [null, null] where it is left out."""
    return isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value)
