"""One small training loop for every stage of the recipe: deterministic by step, resumable bit for bit, logged to CSV.

A stage hands over a model and a function `loss_fn(step, rng) -> (loss, figures)` that draws its own batch. Whatever is
random in a step comes from `(seed, step)` alone, so a run that was stopped and resumed equals a run that was not.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..system.atomic_files import written_whole
from ..system.errors import ReducioError

LOG = "log.csv"

Figures = Mapping[str, "float | Tensor"]
LossFunction = Callable[[int, np.random.Generator], "tuple[Tensor, Figures]"]

CHECKPOINT = "checkpoint.pt"
# These change when a run stops or what it prints, never a weight: a resumed run may differ in them.
_HARMLESS = frozenset({"max_seconds", "log_every", "checkpoint_every"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """How one stage is trained, in optimizer steps; with `ema_decay=0` the averaged weights are the weights."""

    steps: int
    learning_rate: float
    warmup_steps: int = 50
    final_rate: float = 0.02  # the cosine ends at this fraction of learning_rate
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    autocast: bool = True  # bfloat16 autocast around the loss function
    seed: int = 0
    max_bad_steps: int = 10  # consecutive non-finite steps before the run gives up
    log_every: int = 20
    checkpoint_every: int = 500
    max_seconds: float | None = None  # stop (resumable) after this much wall clock in one call

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ReducioError(f"LoopConfig: {name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ReducioError(f"LoopConfig: learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise ReducioError(f"LoopConfig: ema_decay must be in [0, 1), got {self.ema_decay}")

    def rate(self, step: int) -> float:
        """Learning rate of `step` (0-based): linear warm-up, then a cosine down to `final_rate` of the peak."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `run` left behind; `averaged` is the model's state dict with the averaged weights, on its device."""

    step: int
    finished: bool
    seconds: float  # training time over all calls, without set-up
    averaged: dict[str, Tensor]
    last: dict[str, float]  # the last logged figures


def run(
    name: str,
    model: nn.Module,
    loss_fn: LossFunction,
    config: LoopConfig,
    folder: str | os.PathLike[str],
    parameters: Iterable[nn.Parameter] | None = None,
    device: str | torch.device = "cpu",
    resume: bool = True,
    accept_changes: bool = False,
    progress: bool = True,
) -> Outcome:
    """Trains `model` in place until `config.steps`, and writes `checkpoint.pt` and `log.csv` into `folder`.

    Args:
        loss_fn: called as `loss_fn(step, rng)` with the 0-based step and a numpy generator that depends on
            `(config.seed, step)` alone; torch's global generator is seeded the same way. Returns a scalar loss and
            figures to log (scalars or 0-d tensors).
        parameters: what is optimized; every parameter of `model` that requires a gradient when None.
        resume: continue from the checkpoint in `folder` if there is one; False starts anew and replaces it.
        accept_changes: resume although the configuration changed (the run is then no longer reproducible in one go).

    Raises:
        ReducioError: the loss or the gradient stayed non-finite for `max_bad_steps` steps; or the checkpoint belongs to
            another configuration or another model.
    """
    folder, device = Path(folder), torch.device(device)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(device).train()
    chosen = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    optimizer = torch.optim.AdamW(_groups(chosen, config.weight_decay), lr=config.learning_rate, betas=config.betas)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    state = _State()
    if resume and (folder / CHECKPOINT).is_file():
        state = _restore(name, folder / CHECKPOINT, config, model, optimizer, average, device, accept_changes)
    log = _Log(folder / LOG, keep_until=state.step)
    began, before = time.monotonic(), state.seconds

    def save() -> None:
        payload = {"config": _plain(config), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        payload |= {"average": average, "state": asdict(state)}
        with written_whole(folder / CHECKPOINT) as path:
            torch.save(payload, path)

    bad = 0
    with (
        torch.random.fork_rng(devices=[]),
        tqdm(total=config.steps, initial=state.step, desc=name, disable=not progress, mininterval=2.0) as bar,
    ):
        while state.step < config.steps:
            rng = np.random.default_rng((config.seed, state.step))
            torch.manual_seed(int(rng.integers(2**62)))
            with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
                loss, figures = loss_fn(state.step, rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(chosen, config.clip_norm)
            rate = config.rate(state.step)
            if math.isfinite(float(loss.detach())) and math.isfinite(float(norm)):
                bad = 0
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                _average(average, model, config.ema_decay, state.step)
                state.add({"loss": loss, **figures, "gradient": norm})
            else:
                # The weights are still good: one freak batch is skipped, a run that diverged is not prolonged.
                bad += 1
                if bad >= config.max_bad_steps:
                    raise ReducioError(
                        f"train {name}: loss {float(loss.detach()):g} and gradient norm {float(norm):g} "
                        f"at step {state.step}, {bad} non-finite steps in a row; the last checkpoint is in {folder}"
                    )
            state.step += 1
            state.seconds = before + time.monotonic() - began
            bar.update()
            if state.step % config.log_every == 0 or state.step == config.steps:
                row = state.flush()
                if row:  # empty when every step so far was skipped
                    log.write({"step": state.step, **row, "rate": rate, "seconds": round(state.seconds, 2)})
                    bar.set_postfix({k: f"{v:.4g}" for k, v in row.items()}, refresh=False)
            timed_out = config.max_seconds is not None and time.monotonic() - began >= config.max_seconds
            if state.step % config.checkpoint_every == 0 or state.step == config.steps or timed_out:
                save()
            if timed_out:
                break
    model.eval()
    return Outcome(state.step, state.step >= config.steps, state.seconds, average, dict(state.last))


@dataclass(slots=True)
class _State:
    """Everything beside tensors that a resumed run needs, including the sums of the log row that is under way."""

    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] | None = None
    count: int = 0
    last: dict[str, float] | None = None

    def __post_init__(self) -> None:
        self.sums, self.last = self.sums or {}, self.last or {}

    def add(self, figures: Figures) -> None:
        for key, value in figures.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value.detach() if isinstance(value, Tensor) else value)
        self.count += 1

    def flush(self) -> dict[str, float]:
        """Means since the last row (nothing when every step since was skipped)."""
        if self.count:
            self.last = {key: total / self.count for key, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return self.last


class _Log:
    """A CSV that is cut back to the resumed step, so that no step appears twice. Columns are those of the first row."""

    def __init__(self, path: Path, keep_until: int) -> None:
        self.path = path
        self.columns: list[str] = []
        kept: list[dict[str, str]] = []
        if keep_until and path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                kept = [row for row in reader if row["step"].isdigit() and int(row["step"]) <= keep_until]
                self.columns = list(reader.fieldnames or [])
        with written_whole(path) as temporary:
            self._create(temporary, kept)

    def _create(self, path: Path, rows: list[dict[str, str]]) -> None:
        with path.open("w", newline="") as file:
            if self.columns:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)

    def write(self, row: Mapping[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            if not self.columns:
                self.columns = list(row)
                csv.DictWriter(file, self.columns).writeheader()
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow(row)


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> Iterator[dict[str, Any]]:
    # Biases, gains and single vectors are not decayed: pulling them to zero regularises nothing.
    yield {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay}
    yield {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}


@torch.no_grad()
def _average(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    # Early on the average would be mostly the initialisation: the decay grows from 0.1 towards its value.
    weight = 1 - min(decay, (1 + step) / (10 + step)) if decay else 1.0
    current = model.state_dict()
    floating = [key for key, value in current.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[k] for k in floating], [current[k] for k in floating], weight)
    for key in current.keys() - set(floating):
        average[key].copy_(current[key])


def _plain(config: LoopConfig) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def _restore(
    name: str,
    path: Path,
    config: LoopConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    device: torch.device,
    accept_changes: bool,
) -> _State:
    try:
        payload = torch.load(path, map_location=device, weights_only=True)
        saved = payload["config"]
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        raise ReducioError(f"train {name}: cannot read checkpoint {path}: {error}".splitlines()[0]) from error
    changed = [k for k, v in _plain(config).items() if saved.get(k) != v and k not in _HARMLESS]
    if changed and not accept_changes:
        key = changed[0]
        raise ReducioError(
            f"train {name}: checkpoint {path} was made with {key}={saved.get(key)}, "
            f"this run has {key}={getattr(config, key)}; start anew with resume=False or use another folder"
        )
    try:
        model.load_state_dict(payload["model"])
        optimizer.load_state_dict(payload["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ReducioError(
            f"train {name}: checkpoint {path} belongs to another model: {str(error).splitlines()[0]}"
        ) from error
    for key, value in payload["average"].items():
        average[key].copy_(value)
    return _State(**payload["state"])
