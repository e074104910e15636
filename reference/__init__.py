"""The oracle: Reducio as the paper states it, in plain PyTorch. Everything fast is measured and checked against it."""

from .config import DIT_PRESETS, VAE_PRESETS, DiTConfig, VAEConfig
from .dit import ReducioDiT
from .sampler import Condition, initial_latent, sample
from .vae import DiagonalGaussian, ReducioVAE

__all__ = [
    "DIT_PRESETS",
    "VAE_PRESETS",
    "Condition",
    "DiTConfig",
    "DiagonalGaussian",
    "ReducioDiT",
    "ReducioVAE",
    "VAEConfig",
    "initial_latent",
    "sample",
]
