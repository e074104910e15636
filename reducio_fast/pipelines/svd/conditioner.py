"""image.encode: the conditioning inputs of Stable Video Diffusion's U-Net, exactly as in diffusers' pipeline."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...media.antialias import blur_and_resize
from ...media.image_files import fit_image
from ...media.pixels import to_unit
from ...reference.svd.sampler import ImageCondition
from ..execution.components import Components
from ..execution.executor import Executor
from .request import SVDRequest

CLIP_SIZE = (224, 224)


class ImageConditioner:
    """Encodes the picture for cross-attention, and as the latent that is concatenated to every frame's latent."""

    def __init__(self, components: Components, executor: Executor) -> None:
        self.components, self.executor = components, executor

    def __call__(self, picture: np.ndarray, noise: Tensor, request: SVDRequest) -> ImageCondition:
        """picture: uint8 [h, w, 3] of any size; noise: [1, 3, H, W], added to it times `request.noise_aug_strength`."""
        fitted = self.fit(picture, request)
        unstretched = fitted if request.crops else picture  # the image encoder's input is not stretched
        embeds = self.embed(unstretched)
        image = to_unit(fitted, noise.device, torch.float32)[None] + request.noise_aug_strength * noise
        latents = self.encode(image).to(embeds.dtype)
        return ImageCondition(embeds, latents, request.time_ids[None].to(embeds.device, embeds.dtype))

    @staticmethod
    def fit(picture: np.ndarray, request: SVDRequest) -> np.ndarray:
        """The picture at the clip's size: stretched, as diffusers does, or cut to its shape."""
        if request.crops:
            return fit_image(picture, request.height, request.width)
        size = (request.width, request.height)
        return np.array(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))

    def embed(self, picture: np.ndarray) -> Tensor:
        """The image encoder's embedding, [1, 1, E] in its dtype."""
        encoder: Any = self.components["image_encoder"]
        pixels = to_unit(picture, torch.device("cpu"), torch.float32)[None]
        small = (blur_and_resize(pixels, CLIP_SIZE) + 1) / 2
        only_normalise = {"do_center_crop": False, "do_resize": False, "do_rescale": False}
        inputs = self.components["feature_extractor"](images=small, **only_normalise, return_tensors="pt").pixel_values
        weight = next(encoder.parameters())
        return encoder(inputs.to(self.executor.device, weight.dtype)).image_embeds[:, None]

    def encode(self, image: Tensor) -> Tensor:
        """[1, 3, H, W] in [-1, 1] -> the posterior's mode, without the scaling factor, in the dtype it is computed in.

        With float16 weights it computes in float32 if the config says `force_upcast`: at full size the encoder's values
        exceed float16.
        """
        vae: Any = self.components["vae"]
        dtype = vae.dtype
        if dtype == torch.float16 and vae.config.force_upcast:
            vae = copy.copy(vae)
            vae._modules = dict(vae._modules)
            vae.encoder = copy.deepcopy(vae.encoder).float()  # 34 M weights
            vae.quant_conv = copy.deepcopy(vae.quant_conv).float()
            dtype = torch.float32
        return vae.encode(image.to(self.executor.device, dtype))
