"""What happens at the end of each step: the bar moves, the caller's callback is heard, and may stop the clip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import tqdm

from ...reference import Condition
from ...reference.sampler import StopSampling
from ...system.errors import ReducioError
from . import validation
from .request import Request

if TYPE_CHECKING:
    from ..reducio.pipeline import ReducioPipeline


class StepEnd:
    """The sampler's callback: moves the progress bar, runs the user's, and ends the loop where that asks for it."""

    def __init__(
        self, pipe: ReducioPipeline, request: Request, cond: Condition, uncond: Condition | None, bar: tqdm
    ) -> None:
        self.pipe, self.request, self.bar = pipe, request, bar
        self.embeds = {"prompt_embeds": cond.text, "negative_prompt_embeds": None if uncond is None else uncond.text}
        self.replaced: Tensor | None = None  # a replacement that came together with the request to stop
        self.error: Exception | None = None  # of the user's own code: not ours to reword

    def __call__(self, step: int, timestep: Tensor, latent: Tensor) -> Tensor | None:
        self.bar.update()
        self.pipe._current_timestep = timestep
        if self.request.callback_on_step_end is None:
            self.stop_if_asked(latent)
            return None
        tensors = {"latents": latent} | self.embeds
        given = {name: tensors[name] for name in self.request.callback_tensor_inputs}
        try:
            answer = self.request.callback_on_step_end(self.pipe, step, timestep, dict(given))
        except Exception as error:
            self.error = error
            raise
        new = self.check_answer(answer, latent, given)
        self.stop_if_asked(new)
        return None if new is latent else new

    def check_answer(self, answer: Any, latent: Tensor, given: dict[str, Tensor | None]) -> Tensor:
        """The latent to go on with."""
        if answer is None:
            return latent
        if not isinstance(answer, dict):
            raise ReducioError(f"callback_on_step_end: must return a dict or None, returned a {type(answer).__name__}")
        for name, value in answer.items():
            if name != "latents" and value is not given.get(name, self):
                raise ReducioError(f"callback_on_step_end: returned {name!r}; only 'latents' can be replaced")
        new = answer.get("latents", latent)
        if new is latent:
            return latent
        shape = self.request.latent_shape
        return validation.check_latents(new, shape, 1, True, "callback_on_step_end: latents")[0].to(latent)

    def stop_if_asked(self, latent: Tensor) -> None:
        if self.pipe.interrupt:
            self.replaced = latent
            raise StopSampling
