"""The engine of the reference: networks run as they are. Same methods as `fast.engine.Engine`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...reference import sample
from ...reference.data_prediction import DataHook
from ...reference.sampler import NO_SHORTCUTS, Callback, Denoiser, Shortcuts


class PlainEngine:
    name = "reference"
    compiles = False
    attention = "auto"
    free_dtype = False
    quantisation = None

    def twin(self, network: nn.Module, device: torch.device | None = None) -> nn.Module:
        return network

    def forget(self, kept: Collection[type[nn.Module]], device: torch.device) -> None:
        pass

    def sample(
        self,
        denoise: Denoiser,
        scheduler: Any,
        latent: Tensor,
        num_inference_steps: int,
        callback: Callback | None,
        generator: torch.Generator,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[int] | None = None,
        shortcuts: Shortcuts = NO_SHORTCUTS,
        data_hook: DataHook | None = None,
    ) -> Tensor:
        if not hasattr(scheduler, "step"):  # a `MultistepSchedule`, which is data for the fast sampler
            import diffusers

            scheduler = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
        given = (denoise, scheduler, latent, num_inference_steps, callback, generator)
        return sample(*given, sigmas, timesteps, shortcuts, data_hook)

    def chosen_dtype(self, device: torch.device, network: nn.Module) -> tuple[torch.dtype, str]:
        return next(network.parameters()).dtype, "that of the weights"

    def set_attention(self, word: str, device: torch.device, dtype: torch.dtype) -> None:
        if not isinstance(word, str) or word not in ("auto", "native"):
            raise ValueError(f"{word!r} given; the reference knows auto and native, its own")

    @contextmanager
    def warming(self) -> Iterator[None]:
        yield

    @contextmanager
    def one_look(self) -> Iterator[None]:
        yield

    def uncompiled(self) -> PlainEngine:
        return self

    def without_weights(
        self, opaque: Callable[[Callable[..., Any]], Callable[..., Any]], device: torch.device
    ) -> PlainEngine:
        return self

    def packed(self) -> list[nn.Module]:
        return []

    def adopt(self, name: str, network: nn.Module) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {}
