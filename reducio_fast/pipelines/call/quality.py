"""How much work a clip is worth: presets, and the single settings that they are made of.

Each setting comes from the argument of the call, else from the call's preset, else from the model folder's `sampling`,
else from "exact". What the presets cost and lose is measured by `benchmarks/quality_presets.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ...reference.reducio.config import NUM_INFERENCE_STEPS
from ...reference.sampler import Shortcuts
from ...system.errors import ReducioError, check_word, shown
from ...system.real_numbers import to_float
from .validation import is_integer

SCHEDULES = ("own", "quadratic", "lu", "exponential")
# Guidance above this makes the equation stiff. At 4.5, 8 quadratic steps are nearer to the solution than 20 equal ones;
# at 7.5 they are twice as far, and 12 are nearer again (24 prompts of the default model).
STRONG_GUIDANCE, STRONG_STEPS = 5.5, 12


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """num_inference_steps: of the second stage. content_steps: of the first stage; None: its own number. schedule: one
    of SCHEDULES, where the steps lie. The other fields are as in `reference.sampler.Shortcuts`."""

    num_inference_steps: int = NUM_INFERENCE_STEPS
    schedule: str = "own"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_reuse: int = 1
    cache_threshold: float = 0.0
    content_steps: int | None = None

    @property
    def shortcuts(self) -> Shortcuts:
        return Shortcuts(self.guidance_interval, self.guidance_reuse, self.cache_threshold)


PRESETS = {
    "exact": Quality(),
    "balanced": Quality(num_inference_steps=10, schedule="quadratic", content_steps=10),
    "draft": Quality(num_inference_steps=6, schedule="quadratic", content_steps=6),
}
SETTINGS = tuple(f.name for f in dataclasses.fields(Quality))


def resolve(sampling: Any, quality: Any, arguments: Mapping[str, Any], guidance_scale: float | None = None) -> Quality:
    """The quality of a call. `sampling`: the model's own setting, a dict of `quality` and of SETTINGS, or None.
    `arguments`: those of the call by name, None where left out. Raises ReducioError for invalid values."""
    own = _checked_setting(sampling)
    name = own.get("quality", "exact") if quality is None else quality
    chosen = dataclasses.asdict(PRESETS[check_word("quality", name, tuple(PRESETS))])
    if quality is None:
        chosen |= {key: value for key, value in own.items() if key != "quality"}
    steps_from_preset = quality is not None or "num_inference_steps" not in own
    chosen |= {key: value for key, value in arguments.items() if value is not None}
    resolved = Quality(**(chosen | {"guidance_interval": _interval(chosen["guidance_interval"])}))
    _check(resolved)
    strong = guidance_scale is not None and guidance_scale > STRONG_GUIDANCE
    if strong and steps_from_preset and arguments.get("num_inference_steps") is None:
        resolved = dataclasses.replace(resolved, num_inference_steps=max(resolved.num_inference_steps, STRONG_STEPS))
    return resolved


def _checked_setting(sampling: Any) -> dict[str, Any]:
    if sampling is None:
        return {}
    known = ("quality", *SETTINGS)
    if not isinstance(sampling, Mapping):
        raise ReducioError(f"sampling: must be a dict of {', '.join(known)}, is {shown(sampling)}")
    if unknown := [name for name in sampling if name not in known]:
        raise ReducioError(f"sampling: unknown {unknown[0]}; known are {', '.join(known)}")
    return dict(sampling)


def _interval(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(quality: Quality) -> None:
    check_word("schedule", quality.schedule, SCHEDULES)
    interval = quality.guidance_interval
    if not (
        isinstance(interval, tuple)
        and len(interval) == 2
        and all(_is_number(x) for x in interval)
        and 0 <= interval[0] <= interval[1] <= 1
    ):
        raise ReducioError(
            f"guidance_interval: must be two shares of the steps from 0 to 1, the smaller first, is {shown(interval)}"
        )
    if not is_integer(quality.guidance_reuse) or quality.guidance_reuse < 1:
        raise ReducioError(f"guidance_reuse: must be a whole number of at least 1, is {shown(quality.guidance_reuse)}")
    if not _is_number(quality.cache_threshold) or not 0 <= quality.cache_threshold < math.inf:
        raise ReducioError(f"cache_threshold: must be a number of at least 0, is {shown(quality.cache_threshold)}")
    if quality.content_steps is not None and (not is_integer(quality.content_steps) or quality.content_steps < 2):
        raise ReducioError(f"content_steps: must be a whole number of at least 2, is {shown(quality.content_steps)}")


def _is_number(value: Any) -> bool:
    return math.isfinite(to_float(value))
