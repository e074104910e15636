"""The oracle: Reducio as the paper states it, in plain PyTorch. Everything fast is measured and checked against it."""

from .reducio.condition import Condition, denoiser
from .reducio.config import DIT_PRESETS, VAE_PRESETS, DiTConfig, VAEConfig
from .reducio.dit import ReducioDiT
from .reducio.vae import DiagonalGaussian, ReducioVAE
from .sampler import guided, initial_latent, sample

__all__ = [
    "DIT_PRESETS",
    "VAE_PRESETS",
    "Condition",
    "DiTConfig",
    "DiagonalGaussian",
    "ReducioDiT",
    "ReducioVAE",
    "VAEConfig",
    "denoiser",
    "guided",
    "initial_latent",
    "sample",
]
