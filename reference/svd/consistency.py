"""Few steps with weights that were distilled for it: multistep consistency sampling on SVD's EDM schedule.

A consistency model (arXiv 2303.01469) predicts the clean latent from any noise level in one step; several steps each
add fresh noise of the next, lower level. AnimateLCM-SVD (arXiv 2402.00769) is such a model of SVD's U-Net: its
published scheduler keeps SVD's preconditioning and takes every (40 / steps)-th of 40 Karras sigmas.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DictMixin
from ..data_prediction import edm_weights

CONFIG_FILE = "scheduler_config.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConsistencyConfig(DictMixin):
    """Defaults are AnimateLCM-SVD's. num_train_timesteps: sigmas of the whole schedule, and the most steps."""

    num_train_timesteps: int = 40
    sigma_min: float = 0.002
    sigma_max: float = 700.0
    sigma_data: float = 1.0
    s_noise: float = 1.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        self.check_numbers()
        for name in ("sigma_data", "rho"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be greater than 0")
        if self.num_train_timesteps < 2 or not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"num_train_timesteps={self.num_train_timesteps} must be above 1, and 0 < sigma_min={self.sigma_min} < "
                f"sigma_max={self.sigma_max}"
            )


class ConsistencyScheduler:
    """Steps like diffusers' schedulers. If a schedule has more than one step, each draws noise from `generator`."""

    order = 1

    def __init__(self, config: ConsistencyConfig | None = None) -> None:
        self.config = config or ConsistencyConfig()
        self.num_inference_steps: int | None = None
        self.sigmas = torch.empty(0)  # float64, one more than there are steps, the last one 0
        self.timesteps = torch.empty(0)
        self._step = 0

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first latent: data of unit variance plus noise of `sigma_max`."""
        return math.sqrt(self.config.sigma_max**2 + 1)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str = "cpu") -> None:
        """Raises ValueError for more steps than the schedule has sigmas."""
        config = self.config
        if not 1 <= num_inference_steps <= config.num_train_timesteps:
            raise ValueError(f"num_inference_steps={num_inference_steps}: must be 1 to {config.num_train_timesteps}")
        places = torch.arange(num_inference_steps, dtype=torch.float64)
        ramp = places * (config.num_train_timesteps // num_inference_steps) / (config.num_train_timesteps - 1)
        high, low = (sigma ** (1 / config.rho) for sigma in (config.sigma_max, config.sigma_min))
        sigmas = (high + ramp * (low - high)) ** config.rho
        self.num_inference_steps, self._step = num_inference_steps, 0
        self.timesteps = (0.25 * sigmas.log()).float().to(device)
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Scales `sample` for the next step of the schedule; `timestep` is not read."""
        sigma = float(self.sigmas[self._step])
        return sample / math.sqrt(sigma**2 + self.config.sigma_data**2)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The latent at the next noise level: the clean latent that `model_output`, v, predicts, plus fresh noise."""
        sigma, following = (float(s) for s in self.sigmas[self._step : self._step + 2])
        skip, out = edm_weights(sigma, self.config.sigma_data)
        clean = skip * sample + out * model_output
        if len(self.timesteps) > 1:
            clean = clean + following * self.config.s_noise * fresh_noise(clean, generator)
        self._step += 1
        return (clean,)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `scheduler_config.json`, in the form of diffusers' schedulers."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {"_class_name": type(self).__name__, **self.config.to_dict()}
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def fresh_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of the shape of `like`, drawn on the device of `generator` (None: of `like`)."""
    place = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=place).to(like.device, like.dtype)
