"""An image of an object -> the views of a camera that circles it: SV3D (arXiv 2403.12008), built from SVD's parts.

Two models are published. SV3D_u orbits at the height of the picture. SV3D_p follows the caller's path: the polar angle
and azimuth of each frame are inputs of its U-Net. Stable Diffusion's image autoencoder decodes the frames one by one.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...checkpoints.layouts import SV3D
from ...checkpoints.model_folder import Loaders
from ...reference.svd import config as published
from ...reference.svd.config import time_id_widths
from ...reference.svd.vae import FrameVAE
from ...system import torch_state
from ...system.errors import ReducioError, shown
from ...system.real_numbers import LARGEST
from ..call.output import ReducioOutput
from .component_table import ORBIT_LOADERS
from .decoder import ClipDecoder, OrbitDecoder
from .pipeline import SVDPipeline
from .request import SVDArguments, SVDRequest

LOG = logging.getLogger("reducio_fast")

SIDE, STEPS, MAX_GUIDANCE_SCALE, NOISE_AUG_STRENGTH, ELEVATION = 576, 50, 2.5, 1e-5, 10.0


def triangle(frames: int, least: float, most: float) -> Tensor:
    """Guidance scale per frame [T]: `least` at both ends, where the picture is seen, and `most` from behind."""
    place = torch.linspace(0, 1, frames)
    return least + 2 * (place - (place + 0.5).floor()).abs() * (most - least)


def camera_path(frames: int, elevations: Any, azimuths: Any) -> Tensor:
    """Polar angle and azimuth in radians, [T, 2]; azimuths are relative to that of the last frame, the picture.

    elevations: degrees above the horizon, one or one per frame. azimuths: degrees, one per frame; None is one turn.
    """
    single = isinstance(elevations, numbers.Real) and not isinstance(elevations, bool)
    elevations = _angles("elevations", [elevations] * frames if single else elevations, frames)
    turn = np.linspace(0, 360, frames + 1)[1:] % 360
    azimuths = turn if azimuths is None else _angles("azimuths", azimuths, frames)
    path = np.stack([np.deg2rad(90 - elevations), np.deg2rad((azimuths - azimuths[-1]) % 360)], axis=1)
    return torch.from_numpy(path)


def _angles(name: str, values: Any, frames: int) -> np.ndarray:
    try:
        angles = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ReducioError(f"{name}: must be degrees, are {shown(values)}") from None
    if angles.shape != (frames,) or not (np.abs(angles) <= LARGEST).all():
        raise ReducioError(f"{name}: must be {frames} finite numbers, one a frame, are {shown(values)}")
    return angles


class SV3DPipeline(SVDPipeline):
    """A loaded SV3D. Its components are those of an `SVDPipeline`, with an autoencoder of images as `vae`."""

    layout = SV3D
    loaders: ClassVar[Loaders] = ORBIT_LOADERS
    decoder_class: ClassVar[type[ClipDecoder]] = OrbitDecoder

    def __init__(
        self,
        vae: FrameVAE,
        unet: Any,
        scheduler: Any,
        image_encoder: Any,
        feature_extractor: Any,
        text_to_image: Any = None,
        sample_height: int = SIDE,
        sample_width: int = SIDE,
        *,
        backend: str = "auto",
        compile: bool | None = None,
    ) -> None:
        super().__init__(
            vae,
            unet,
            scheduler,
            image_encoder,
            feature_extractor,
            text_to_image,
            sample_height,
            sample_width,
            backend=backend,
            compile=compile,
        )

    @torch_state.inference()
    def __call__(  # type: ignore[override]
        self,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = STEPS,
        sigmas: Sequence[float] | str | None = None,
        min_guidance_scale: float = published.MIN_GUIDANCE_SCALE,
        max_guidance_scale: float = MAX_GUIDANCE_SCALE,
        elevations: float | Sequence[float] | None = None,
        azimuths: Sequence[float] | None = None,
        noise_aug_strength: float = NOISE_AUG_STRENGTH,
        decode_chunk_size: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        *,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float | None = None,
        seed: int | None = 0,
        progress: bool = True,
        image_fit: str = "stretch",
        content_kwargs: dict[str, Any] | None = None,
        fps: int = published.FPS,
    ) -> ReducioOutput | tuple[Any]:
        """Make the views of a camera that circles an object; the last one is the picture itself.

        image: the object in the middle, on white or with a transparent background, which becomes white.
        height, width: pixels; the weights were made for 576x576. num_frames: by default the weights' own, 21.
        min_guidance_scale, max_guidance_scale: at the picture and from behind; between them it rises and falls evenly.
        elevations: of the camera, degrees above the horizon, one or one per frame (SV3D_p only, 10 by default).
        azimuths: degrees, one per frame; by default one turn in equal steps (SV3D_p only).
        fps: of the saved clip; it is no input of the network. All others are as in `SVDPipeline`.

        Raises ReducioError before any work for an argument that does not fit.
        """
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        out = self.run(self.check_inputs(**arguments))
        return out if return_dict else (out.frames,)

    def check_inputs(self, **arguments: Any) -> SVDRequest:
        call = inspect.signature(self.__call__).bind(**arguments)
        call.apply_defaults()
        values = dict(call.arguments)
        elevations, azimuths = values.pop("elevations"), values.pop("azimuths")
        usual: dict[str, Any] = {"motion_bucket_id": published.MOTION_BUCKET_ID, "last_image": None, "overlap": None}
        usual |= {"match_colours": False, "loop": False, "preview_every": None}
        request = self._request(SVDArguments(**usual, **values))
        path = self._path(request.num_frames, elevations, azimuths)
        augmentation = torch.full((request.num_frames, 1), request.noise_aug_strength, dtype=torch.float64)
        scales = (float(values["min_guidance_scale"]), request.guidance_scale)
        frames = request.num_frames
        return dataclasses.replace(
            request,
            time_ids=augmentation[0] if path is None else torch.cat([augmentation, path], dim=1),
            guidance_per_frame=triangle(frames, *scales) if scales[1] > 1 else torch.ones(frames),
        )

    def _path(self, frames: int, elevations: Any, azimuths: Any) -> Tensor | None:
        """The camera path that conditions the network; None for SV3D_u, which has none."""
        if len(time_id_widths(self.unet.config)) == 1:
            if elevations is not None or azimuths is not None:
                name = "elevations" if elevations is not None else "azimuths"
                raise ReducioError(f"{name}: these weights (SV3D_u) stay at the picture's height; SV3D_p takes a path")
            return None
        return camera_path(frames, ELEVATION if elevations is None else elevations, azimuths)

    def _warn(self, inputs: SVDArguments, frames: int, trained: int) -> None:  # type: ignore[override]
        """Warn of values that run but that the weights were not trained on."""
        if frames != trained:
            LOG.warning("num_frames: %d, these weights were made for %d", frames, trained)
