"""The steps of DPM-Solver++ along a discrete noise schedule, as data: which timesteps, which sigmas.

Source: arXiv 2211.01095 and diffusers' `DPMSolverMultistepScheduler`, whose configuration it reads and whose numbers it
reproduces to the bit. It takes no steps: `fast.solver_tables` makes coefficients of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Fields of diffusers' configuration that would place the steps in another way, and the value that each must have.
PLAIN = {
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "rescale_betas_zero_snr": False,
    "use_dynamic_shifting": False,
    "trained_betas": None,
    "timestep_spacing": "linspace",
    "final_sigmas_type": "zero",
}


class Config(dict[str, Any]):
    """A dictionary whose entries are attributes too, as in diffusers' configurations."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class MultistepSchedule:
    """Raises ValueError for a configuration of another class, and for steps that are placed in another way."""

    init_noise_sigma = 1.0

    def __init__(self, config: dict[str, Any]) -> None:
        if config.get("_class_name") != "DPMSolverMultistepScheduler":
            raise ValueError(f"_class_name={config.get('_class_name')!r}: must be DPMSolverMultistepScheduler")
        for name, value in PLAIN.items():
            if config.get(name, value) != value:
                raise ValueError(f"{name}={config[name]!r}: must be {value!r}")
        if config.get("lambda_min_clipped", -float("inf")) != -float("inf"):
            raise ValueError(f"lambda_min_clipped={config['lambda_min_clipped']}: must be -inf")
        self.config = Config(config)
        start, end, count = (config[n] for n in ("beta_start", "beta_end", "num_train_timesteps"))
        if config["beta_schedule"] == "linear":
            betas = torch.linspace(start, end, count, dtype=torch.float32)
        elif config["beta_schedule"] == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
        else:
            raise ValueError(f"beta_schedule={config['beta_schedule']!r}: must be linear or scaled_linear")
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self._trained_sigmas = np.array(((1 - alphas_cumprod) / alphas_cumprod) ** 0.5)
        self.sigmas, self.timesteps = torch.empty(0), torch.empty(0, dtype=torch.int64)
        self.num_inference_steps: int | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any], **changes: Any) -> MultistepSchedule:
        return cls({**config, **changes})

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """`num_inference_steps` steps at equal distances, or steps at these falling `timesteps`."""
        trained = len(self._trained_sigmas)
        if timesteps is None:
            assert num_inference_steps is not None
            equal = np.linspace(0, trained - 1, num_inference_steps + 1)
            places = equal.round()[::-1][:-1].copy().astype(np.int64)
        else:
            places = np.array(timesteps).astype(np.int64)
        sigmas = np.interp(places, np.arange(0, trained), self._trained_sigmas)
        self.sigmas = torch.from_numpy(np.concatenate([sigmas, [0.0]]).astype(np.float32))
        self.timesteps = torch.from_numpy(places).to(device=device)
        self.num_inference_steps = len(places)
