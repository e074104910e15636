"""A recipe of stages: the loop that runs them in order, and their context (output folder, training loop, figures)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..data.latent_shards import files_checksum
from ..system.atomic_files import written_whole
from ..system.errors import ReducioError
from .loop import LoopConfig, LossFunction, Outcome, recorded_fields, run
from .processes import Processes, joined

MOST_SCALE = 1000  # times the steps of a recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Settings of a stage's run: `out` holds the components, `out/runs/<stage>` the checkpoints, log and figures."""

    out: Path
    data: Path  # folder of the downloaded training data
    resume: bool = True
    accept_changes: bool = False
    progress: bool = True
    processes: Processes = field(default_factory=lambda: Processes(0, 1, torch.device("cpu")))

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def run_folder(self, stage: str) -> Path:
        return self.out / "runs" / stage

    def pool_key(self, components: Iterable[str], **settings: Any) -> str:
        """What the encoded samples of a stage depend on: checksums of components in `out`, and settings."""
        return json.dumps({name: files_checksum(self.out / name)[:16] for name in components} | settings)

    def has_pool(self, path: Path, key: str) -> bool:
        """Whether this run may use the encoded samples in a safetensors file: it resumes, and they have this key."""
        if not (self.resume and path.is_file()):
            return False
        try:
            with safe_open(path, "pt") as file:
                return (file.metadata() or {}).get("key") == key
        except SafetensorError:
            return False

    def train(self, stage: str, model: nn.Module, loss_fn: LossFunction, settings: Any, **made_of: str) -> Outcome:
        """Run `loop.run` in this stage's folder; then load the averaged weights into the model, in evaluation mode.

        `made_of` names what else the weights depend on, such as the key of the encoded samples; a resumed run must have
        the same.
        """
        outcome = run(
            stage,
            model,
            loss_fn,
            settings.loop,
            self.run_folder(stage),
            self.processes,
            self.resume,
            self.accept_changes,
            self.progress,
            recorded=recorded_fields(settings) | made_of,
        )
        model.load_state_dict(outcome.averaged)
        return outcome

    def record(self, stage: str, figures: dict[str, float]) -> dict[str, float]:
        """Write a stage's final figures into `figures.json` beside its log."""
        text = json.dumps({k: round(v, 5) for k, v in figures.items()}, indent=2) + "\n"
        with written_whole(self.run_folder(stage) / "figures.json") as path:
            path.write_text(text, encoding="utf-8")
        return figures


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a recipe: `run(context, settings)` trains and saves; `makes` are the folders it leaves behind."""

    run: Callable[[Context, Any], dict[str, float]]
    settings: Any
    makes: tuple[str, ...]
    needs: tuple[str, ...] = ()


def run_stages(
    stages: Mapping[str, Stage],
    out: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    scale: float = 1.0,
    resume: bool = True,
    progress: bool = True,
    device: str = "cpu",
    data: str | os.PathLike[str] | None = None,
    accept_changes: bool = False,
) -> dict[str, dict[str, float]]:
    """Run the stages, or only the named ones, in the recipe's order; return the final figures of each.

    Raises ReducioError for an unknown stage, a stage whose needed folders are missing, and a scale that is not above 0
    or too large.
    """
    chosen = list(stages) if names is None else list(names)
    for name in chosen:
        if name not in stages:
            raise ReducioError(f"stages={name!r} is not in the recipe; known: {', '.join(stages)}")
    if not 0 < scale <= MOST_SCALE:
        raise ReducioError(f"scale={scale} must be above 0 and at most {MOST_SCALE}")
    out, figures = Path(out), {}
    with joined(device) as processes:
        if processes.world_size > 1:
            raise ReducioError(f"WORLD_SIZE={processes.world_size}: the embedded model is trained by one process")
        context = Context(
            out=out,
            data=out / "data" if data is None else Path(data),
            resume=resume,
            accept_changes=accept_changes,
            progress=progress,
            processes=processes,
        )
        for name, stage in stages.items():
            if name not in chosen:
                continue
            for folder in stage.needs:
                if not (out / folder).is_dir():
                    maker = next((other for other, entry in stages.items() if folder in entry.makes), "another")
                    raise ReducioError(
                        f"stage {name!r} needs {out / folder}, which stage {maker!r} makes; run that first"
                    )
            figures[name] = stage.run(context, _scaled(stage.settings, scale))
    return figures


def _scaled(settings: Any, scale: float) -> Any:
    """The settings with the lengths of their loops times `scale`, and with smaller pools if `scale` is below 1."""
    if scale == 1.0:
        return settings
    changed: dict[str, Any] = {}
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if isinstance(value, LoopConfig):
            steps = max(1, round(value.steps * scale))
            warmup = max(1, round(value.warmup_steps * min(1.0, scale)))
            changed[entry.name] = replace(value, steps=steps, warmup_steps=warmup)
        elif entry.name in ("pool", "held_out_pool", "prompts", "evaluated"):
            changed[entry.name] = max(4, round(value * min(1.0, scale)))
        elif hasattr(value, "loop"):
            changed[entry.name] = _scaled(value, scale)
    return replace(settings, **changed)
