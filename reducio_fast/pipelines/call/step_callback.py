"""After each step: update the progress bar, run the user's callback, stop if it asks to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...reference.sampler import StopSampling
from ...system.errors import ReducioError, shown
from . import validation
from .state import CallState


class StepCallback:
    """The sampler's callback for one clip. `pipeline` is what the user's callback receives as its first argument;
    `embeds` are tensors that it may ask for beside the latents; `preview(step)` gives the frames."""

    def __init__(
        self,
        pipeline: Any,
        call: CallState,
        embeds: dict[str, Tensor | None],
        preview: Callable[[int], Any] | None = None,
    ) -> None:
        self.pipeline, self.call, self.embeds, self.preview = pipeline, call, embeds, preview
        self.replaced: Tensor | None = None  # the clip's latent where a callback asked to stop
        self.error: Exception | None = None  # raised by the user's own code, which passes on unchanged

    def __call__(self, step: int, timestep: Tensor, latent: Tensor) -> Tensor | None:
        ranks = self.pipeline.executor.ranks
        if ranks is None:
            return self.after_step(step, timestep, latent)
        try:
            return ranks.on_rank_0(lambda: self.after_step(step, timestep, latent), latent)
        except StopSampling:
            self.call.interrupted = True
            self.replaced = ranks.broadcast_tensor(latent.clone() if self.replaced is None else self.replaced)
            raise

    def after_step(self, step: int, timestep: Tensor, latent: Tensor) -> Tensor | None:
        self.call.progress.update()
        self.call.timestep = timestep
        self.call.tell(self.call.stage, step + 1)
        request = self.call.request
        if request.callback_on_step_end is None:
            self.stop_if_asked(latent)
            return None
        tensors = {"latents": latent, "frames": None if self.preview is None else self.preview(step)} | self.embeds
        asked = (*request.callback_tensor_inputs, *(["frames"] if self.preview is not None else []))
        handed = {name: tensors[name] for name in asked}
        scheduler = self.pipeline.scheduler
        if hasattr(scheduler, "_step_index"):  # a callback may read step_index, and the fast sampler does not step it
            scheduler._step_index = step + 1
        try:
            answer = request.callback_on_step_end(self.pipeline, step, timestep, dict(handed))
        except Exception as error:
            self.error = error
            raise
        new = self.check_answer(answer, latent, handed)
        self.stop_if_asked(new)
        return None if new is latent else new

    def check_answer(self, answer: Any, latent: Tensor, handed: dict[str, Any]) -> Tensor:
        """The latent to continue with."""
        if answer is None:
            return latent
        if not isinstance(answer, dict):
            raise ReducioError(f"callback_on_step_end: must return a dict or None, returned a {type(answer).__name__}")
        for name, value in answer.items():
            if name != "latents" and value is not handed.get(name, self):
                raise ReducioError(f"callback_on_step_end: returned {shown(name)}; only 'latents' can be replaced")
        new = answer.get("latents", latent)
        if new is latent:
            return latent
        shape = self.call.request.latent_shape
        return validation.check_latents(new, shape, 1, True, "callback_on_step_end: latents")[0].to(latent)

    def stop_if_asked(self, latent: Tensor) -> None:
        if self.call.interrupted:
            self.replaced = latent
            raise StopSampling
