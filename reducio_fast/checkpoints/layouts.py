"""The components and settings of each model family, for loading, saving, offloading and help texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One entry of a model folder.

    `stage` is the stage that runs it, during which its weights are on the device; `also` is a second such stage.
    `source` describes what a user may name instead of passing an object, "" if nothing can be named. `shared_as` is its
    name within the text-to-image pipeline, which may use the same object. `beside` is the component whose source also
    holds this one.
    """

    name: str
    stage: str = ""
    also: str = ""
    optional: bool = False
    source: str = ""
    shared_as: str = ""
    beside: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A model family on disk: `components` in the order in which they are loaded, and plain `settings`.

    `denoiser` and `decoder` name the networks that have fast versions; both may name the same network.
    """

    pipeline: str  # the `_class_name` of model_index.json
    components: tuple[Component, ...]
    settings: tuple[str, ...]
    denoiser: str = "transformer"
    decoder: str = "vae"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.components)

    @property
    def optional(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.components if c.optional)

    @property
    def unloadable(self) -> tuple[str, ...]:
        """Components that can be removed from a loaded pipeline."""
        return tuple(c.name for c in self.components if c.optional and c.stage)

    def shared(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """The components that the text-to-image pipeline may share, by their names within it."""
        return {c.shared_as: parts[c.name] for c in self.components if c.shared_as}

    def of_stage(self, stage: str) -> tuple[str, ...]:
        return tuple(c.name for c in self.components if stage in (c.stage, c.also))


VIDEO_AUTOENCODER = Layout(
    pipeline="",  # no folder of its own: see `vae_alone`
    components=(Component(name="vae", stage="vae.decode"),),
    settings=("fps", "sample_height", "sample_width"),
    denoiser="vae",
)

REDUCIO = Layout(
    pipeline="ReducioPipeline",
    components=(
        Component(name="vae", stage="vae.decode"),
        Component(name="transformer", stage="dit.step"),
        Component(name="scheduler"),
        Component(
            name="text_encoder",
            stage="text.encode",
            optional=True,
            source="a T5's folder or hub id",
            shared_as="text_encoder",
        ),
        Component(name="tokenizer", optional=True, shared_as="tokenizer", beside="text_encoder"),
        Component(
            name="image_encoder",
            stage="image.encode",
            optional=True,
            source="an open_clip folder, hub id or MODEL/TAG",
        ),
        Component(
            name="content_encoder",
            stage="image.encode",
            optional=True,
            source="an AutoencoderKL's folder or hub id",
            shared_as="vae",
        ),
        # It runs between the steps, so its weights are on the device during this stage.
        Component(name="preview_decoder", stage="dit.step", optional=True, source="a preview decoder's folder"),
        # Last, because it may share the others.
        Component(
            name="text_to_image",
            stage="content.generate",
            optional=True,
            source="a diffusers pipeline's folder or hub id",
        ),
    ),
    settings=("fps", "sample_height", "sample_width", "clean_caption", "content_scaling_factor", "sampling"),
)

SVD = Layout(
    pipeline="StableVideoDiffusionPipeline",
    components=(
        Component(name="vae", stage="vae.decode", also="image.encode"),
        Component(name="unet", stage="dit.step", source="a .safetensors file or folder of other U-Net weights"),
        Component(name="scheduler", source="euler, dpm-solver++ or consistency"),
        Component(name="image_encoder", stage="image.encode"),
        Component(name="feature_extractor"),
        Component(
            name="text_to_image",
            stage="content.generate",
            optional=True,
            source="a diffusers pipeline's folder or hub id",
        ),
    ),
    settings=("sample_height", "sample_width"),
    denoiser="unet",
)

# SV3D has the same components, but an autoencoder of images. Published conversions to diffusers use this pipeline name.
SV3D = dataclasses.replace(SVD, pipeline="StableVideo3DDiffusionPipeline")
