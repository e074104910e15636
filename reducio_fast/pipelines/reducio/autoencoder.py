"""The video autoencoder without the rest of a model: clips to motion latents and back, on either backend."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checkpoints.layouts import VIDEO_AUTOENCODER
from ...checkpoints.vae_alone import load_vae
from ...reference import ReducioVAE, VAEConfig
from ...system import devices, torch_state
from ...system.errors import ReducioError, check_switch, check_word, shown
from ..call import steering, validation
from ..call.output import to_output
from ..execution.components import Components
from ..execution.decoding import TiledDecoder
from ..execution.executor import Executor
from .component_table import check_clip_settings
from .motion import Motion, read_motion
from .request import latents_with_images


class VideoAutoencoder:
    """A `ReducioVAE` that runs as in a pipeline: with its fast twin, in tiles, and with retries if memory runs out.

    `settings`: the frame rate and size that the model states. Raises ReducioError for invalid ones.
    """

    def __init__(self, vae: ReducioVAE, settings: dict[str, Any], backend: str = "auto") -> None:
        self.settings = settings
        self.components = Components(VIDEO_AUTOENCODER, {"vae": vae} | settings)
        check_clip_settings(self.components)
        self.executor = Executor(self.components, backend)
        self.decoder = TiledDecoder(self.components, self.executor)
        self.motion = Motion(self.components, self.executor, self.decoder)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        backend: str = "auto",
    ) -> VideoAutoencoder:
        """Load any source of `checkpoints.vae_alone.load_vae`; dtype and device as in `ReducioPipeline`."""
        target_device = devices.resolve_device(device)
        vae, settings = load_vae(source, devices.resolve_dtype(dtype, None, target_device), target_device)
        autoencoder = cls(vae, settings, backend)
        autoencoder.executor.choose_dtype(dtype is None)
        return autoencoder

    @property
    def config(self) -> VAEConfig:
        return self.components["vae"].config

    @property
    def network(self) -> Any:
        """The network that computes: the `ReducioVAE` itself or its fast twin, which has the same methods."""
        self.executor.check()
        return self.executor.network("vae")

    @torch_state.inference()
    def encode(self, clip: np.ndarray, refine: int = 0, progress: bool = False) -> Tensor:
        """uint8 [T, H, W, 3], with the model's T -> motion latent, float32 [1, 16, T/f, H/32, W/32]: the posterior's
        mode, normalised as the denoiser's latents are. `refine` is as in `ReducioPipeline.encode_motion`."""
        if not isinstance(clip, np.ndarray):
            raise ReducioError(f"clip: must be an array, is {shown(clip)}")
        clip = read_motion(clip, self.config.num_frames)
        validation.check_size(self.config, *clip.shape[1:3])
        with self.executor.exclusive():
            return self.motion.encode(clip, refine, progress)

    @torch_state.inference()
    def decode(
        self,
        latent: Tensor,
        content: np.ndarray,
        output_type: str = "np",
        motion_strength: float = 1.0,
        keep_content: bool = False,
    ) -> Any:
        """One latent [1, 16, T/f, H/32, W/32] and its content frame, uint8 [H, W, 3] -> frames, in the form of
        `ReducioOutput.frames`; `motion_strength` and `keep_content` are as in `ReducioPipeline`."""
        check_word("output_type", output_type, validation.OUTPUT_TYPES[:-1])
        strength = steering.check_strength(motion_strength)
        check_switch("keep_content", keep_content)
        pairs = latents_with_images(self.config, latent, content)
        if len(pairs) > 1:
            raise ReducioError(f"latent: one is decoded at a time, {len(pairs)} given")
        with self.executor.exclusive():
            video = self.motion.decode(*pairs[0], output_type, None, strength, keep_content)
            return to_output(video, output_type)
