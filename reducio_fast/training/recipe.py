"""The context of a recipe's stages: the output folder, the training loop, and the record of final figures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..system.atomic_files import written_whole
from .loop import LoopConfig, LossFunction, Outcome, run
from .processes import Processes


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

    def train(self, stage: str, model: nn.Module, loss_fn: LossFunction, config: LoopConfig) -> Outcome:
        """Run `loop.run` in this stage's folder; then load the averaged weights into the model, in evaluation mode."""
        folder = self.run_folder(stage)
        outcome = run(
            stage, model, loss_fn, config, folder, self.processes, self.resume, self.accept_changes, self.progress
        )
        model.load_state_dict(outcome.averaged)
        return outcome

    def record(self, stage: str, figures: dict[str, float]) -> dict[str, float]:
        """Write a stage's final figures into `figures.json` beside its log."""
        text = json.dumps({k: round(v, 5) for k, v in figures.items()}, indent=2) + "\n"
        with written_whole(self.run_folder(stage) / "figures.json") as path:
            path.write_text(text, encoding="utf-8")
        return figures
