"""The training loop of every recipe: one process or many, resumable to the byte, logged.

A recipe passes a model and a function `loss_fn(step, micro, rng) -> (loss, figures)` that draws its own batch. There is
no random state: a batch depends only on (seed, step, micro), where `micro` numbers the batches of a step over all
processes. So a run that was stopped and resumed ends with the same weights as an uninterrupted one, and one process
that accumulates two batches ends with the same weights as two processes, bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ..system.errors import ReducioError
from .checkpoint_folders import CheckpointFolder
from .mixed_precision import autocast
from .processes import PARALLEL, Processes, accumulating, spread
from .recipe_file import check_least, check_positive
from .run_log import RunLog

Figures = Mapping[str, "float | Tensor"]
LossFunction = Callable[[int, int, np.random.Generator], "tuple[Tensor, Figures]"]
Factor = Callable[[int], float]  # 0-based step -> factor on the learning rate

CHECKPOINTS, DECAYS = "checkpoints", ("cosine", "linear")
# Settings that do not affect the weights, only when a run stops or what it logs: a resumed run may change them.
_HARMLESS = frozenset(
    {"max_seconds", "log_every", "checkpoint_every", "keep_checkpoints", "background_checkpoints", "tensorboard"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """Settings of one training run; lengths are in optimizer steps. `ema_decay=0` turns weight averaging off."""

    steps: int
    learning_rate: float
    warmup_steps: int = 50
    final_rate: float = 0.02  # the rate ends at this fraction of learning_rate
    decay: str = "cosine"  # or "linear": shape of the learning rate's decay after the warm-up
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8  # added to the denominator of Adam's step
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    autocast: bool = True  # bfloat16 around the loss function, on a device that has instructions for it
    seed: int = 0
    max_bad_steps: int = 10  # consecutive non-finite steps after which the run raises an error
    log_every: int = 20
    checkpoint_every: int = 500
    max_seconds: float | None = None  # stop (resumable) after this much wall clock in one call
    micro_batches: int = 1  # batches per step, summed over all processes, which share them evenly
    parallel: str = "ddp"  # or "fsdp": also shards parameters, optimizer state and averaged weights
    keep_checkpoints: int = 2
    background_checkpoints: bool = False  # write checkpoints while training continues: worthwhile above about 10 GB
    tensorboard: bool = False

    def __post_init__(self) -> None:
        counts = ("steps", "log_every", "checkpoint_every", "max_bad_steps", "micro_batches", "keep_checkpoints")
        check_least(self, 1, *counts)
        check_least(self, 0, "warmup_steps", "final_rate", "weight_decay", "max_seconds")
        check_positive(self, "learning_rate", "eps")
        if not self.clip_norm > 0:  # infinity: the gradient is not clipped
            raise ReducioError(f"LoopConfig: clip_norm must be above 0, got {self.clip_norm}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ReducioError(f"LoopConfig: betas must be two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.seed < 2**63:
            raise ReducioError(f"LoopConfig: seed must be a whole number from 0 to {2**63 - 1}, got {self.seed}")
        if self.decay not in DECAYS:
            raise ReducioError(f"LoopConfig: decay={self.decay!r} must be one of {', '.join(DECAYS)}")
        if self.parallel not in PARALLEL:
            raise ReducioError(f"LoopConfig: parallel={self.parallel!r} must be one of {', '.join(PARALLEL)}")
        if not 0 <= self.ema_decay < 1:
            raise ReducioError(f"LoopConfig: ema_decay must be in [0, 1), got {self.ema_decay}")

    def rate(self, step: int) -> float:
        """Learning rate of `step` (0-based): linear warm-up, then decay to `final_rate` times the peak."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        left = 1 - min(1.0, done) if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * left)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of `run`; `averaged` is the model's full (unsharded) state dict with averaged weights, on its device."""

    step: int
    finished: bool
    seconds: float  # training time over all calls, without set-up
    averaged: dict[str, Tensor]
    last: dict[str, float]  # the last logged figures

    def figures(self, world_size: int) -> dict[str, float]:
        """Figures for a command to print: steps, wall time, process-seconds per step, and the last logged figures."""
        per_step = self.seconds / max(1, self.step)
        times = {"seconds_a_step": per_step, "process_seconds_a_step": per_step * world_size}
        return {"steps": self.step, "seconds": self.seconds, **self.last, **times}


class _Losses(nn.Module):
    """The model and its loss as one module, so that DDP and FSDP can hook its forward pass."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, step: int, micro: int, rng: np.random.Generator) -> tuple[Tensor, Figures]:
        return self.loss_fn(step, micro, rng)


def run(
    name: str,
    model: nn.Module,
    loss_fn: LossFunction,
    config: LoopConfig,
    folder: str | os.PathLike[str],
    processes: Processes | None = None,
    resume: bool = True,
    accept_changes: bool = False,
    progress: bool = True,
    blocks: Iterable[nn.Module] = (),
    rate_of: Callable[[str], Factor] = lambda name: unchanged,
    recorded: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train `model` in place until `config.steps`, and write `checkpoints/` and `log.csv` into `folder`.

    Args:
        loss_fn: called as `loss_fn(step, micro, rng)` with the 0-based step, the 0-based number of the batch among the
            step's over all processes, and a numpy generator that depends on `(config.seed, step, micro)` alone; torch's
            global generator is seeded the same way. Returns a scalar loss and figures to log (scalars or 0-d tensors).
            A step's gradient is the mean over its batches. Parameters that require no gradient do not change.
        processes: this process and its group, from `processes.joined`; None means one process on the CPU.
        resume: continue from the checkpoint in `folder` if there is one; False starts anew and replaces it.
        accept_changes: resume although the configuration, something in `recorded`, or the number of processes or
            threads changed (an uninterrupted run can then no longer reproduce the weights).
        blocks: parts of the model that "fsdp" gathers one by one.
        rate_of: maps a parameter's name in `model` to the factor on its learning rate: the same function for the same
            factors.
        recorded: what else affects the weights, by name (see `recorded_fields`): checkpoints hold it, and a resumed run
            must have the same.

    Raises:
        ReducioError: the loss or the gradient stayed non-finite for `max_bad_steps` steps; the checkpoint belongs to
            another configuration or another model, or is damaged; the processes cannot share a step's batches evenly;
            there is no space for a checkpoint.
    """
    processes = processes or Processes(0, 1, torch.device("cpu"))
    folder, device = Path(folder), processes.device
    if config.micro_batches % processes.world_size:
        raise ReducioError(
            f"train {name}: {processes.world_size} processes cannot share micro_batches={config.micro_batches} evenly; "
            "make it a multiple"
        )
    model.to(device).train()
    losses = spread(_Losses(model, loss_fn), config.parallel, processes, blocks)
    named = [(name, p) for name, p in losses.named_parameters() if p.requires_grad]
    chosen = [p for _, p in named]
    groups, factors = _groups(named, config, rate_of)
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    _allocate(optimizer)
    average = {k: v.detach().clone() for k, v in get_model_state_dict(losses).items()}
    checkpoints = CheckpointFolder(
        name, folder / CHECKPOINTS, processes, config.keep_checkpoints, config.background_checkpoints
    )
    if not resume:
        checkpoints.clear()
    latest, state = checkpoints.latest(), _State()
    recorded = _plain(recorded or {})
    conditions = {"world_size": processes.world_size, "threads": torch.get_num_threads()}
    if latest is not None:
        saved = checkpoints.run_of(latest, state=_State)
        _check(name, latest, saved, config, conditions, recorded, accept_changes)
        tensors = _tensors(losses, optimizer, average)
        checkpoints.load(latest, tensors)
        set_model_state_dict(losses, tensors["model"])
        set_optimizer_state_dict(losses, optimizer, tensors["optimizer"])
        for group, own in zip(optimizer.param_groups, _groups(named, config, rate_of)[0], strict=True):
            group |= own  # the checkpoint has the settings of its own run
        state = _State(**saved["state"])
    log = RunLog(folder, state.step, config.tensorboard) if processes.first else None
    began, before = time.monotonic(), state.seconds
    own = range(processes.rank, config.micro_batches, processes.world_size)

    def save() -> None:
        run_data = {"config": _plain(asdict(config)), "conditions": conditions, "recorded": recorded}
        run_data["state"] = asdict(state)
        run_data["versions"] = {"torch": torch.__version__, "numpy": np.__version__}
        checkpoints.save(state.step, _tensors(losses, optimizer, average), run_data)

    bad = 0
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        tqdm(
            total=config.steps,
            initial=state.step,
            desc=name,
            disable=not (progress and processes.first),
            mininterval=2.0,
        ) as bar,
    ):
        while state.step < config.steps:
            optimizer.zero_grad(set_to_none=True)
            loss, sums = torch.zeros((), device=device), dict[str, Any]()
            for micro in own:
                rng = np.random.default_rng((config.seed, state.step, micro))
                torch.manual_seed(int(rng.integers(2**62)))
                with accumulating(losses, last=micro == own[-1]):
                    with autocast(device, config.autocast):
                        part, figures = losses(state.step, micro, rng)
                    # Divide before the sum, as DDP does across processes; otherwise the last bit of a sum differs.
                    (part / len(own)).backward()
                loss += part.detach() / len(own)
                for key, value in figures.items():
                    value = value.detach() if isinstance(value, Tensor) else value
                    sums[key] = sums.get(key, 0.0) + value / len(own)
            norm = nn.utils.clip_grad_norm_(chosen, config.clip_norm)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if processes.all_finite(loss, norm):
                bad = 0
                for group, factor in zip(optimizer.param_groups, factors, strict=True):
                    group["lr"] = config.rate(state.step) * factor(state.step)
                optimizer.step()
                _average(average, losses, config.ema_decay, state.step)
                state.add({"loss": loss, **sums, "gradient": norm})
            else:
                # The weights are still finite: a single bad batch is skipped, but a diverged run must stop.
                bad += 1
                if bad >= config.max_bad_steps:
                    checkpoints.finish()
                    raise ReducioError(
                        f"train {name}: loss {float(loss):g} and gradient norm {float(norm):g} "
                        f"at step {state.step}, {bad} non-finite steps in a row; the last checkpoint is in {folder}"
                    )
            state.step += 1
            state.seconds = before + time.monotonic() - began
            bar.update()
            if state.step % config.log_every == 0 or state.step == config.steps:
                row = processes.mean(state.flush())
                state.last = row
                if row and log is not None:  # no row when every step so far was skipped
                    log.write(
                        {
                            "step": state.step,
                            **row,
                            "rate": config.rate(state.step - 1),
                            "seconds": round(state.seconds, 2),
                        }
                    )
                    bar.set_postfix({k: f"{v:.4g}" for k, v in row.items()}, refresh=False)
            timed_out = config.max_seconds is not None and processes.any(time.monotonic() - began >= config.max_seconds)
            if state.step % config.checkpoint_every == 0 or state.step == config.steps or timed_out:
                save()
            if timed_out:
                break
    checkpoints.finish()
    model.eval()
    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in average.items()}
    averaged = {k.removeprefix("model."): v for k, v in whole.items()}
    return Outcome(state.step, state.step >= config.steps, state.seconds, averaged, dict(state.last or {}))


@dataclass(slots=True)
class _State:
    """All data that a resumed run needs besides tensors, including the sums of the unfinished log row."""

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
        """Means since the last row; the previous means if all steps since then were skipped."""
        if self.count:
            self.last = {key: total / self.count for key, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return self.last


def unchanged(_step: int) -> float:
    return 1.0


def _groups(
    named: list[tuple[str, nn.Parameter]], config: LoopConfig, rate_of: Callable[[str], Factor]
) -> tuple[list[dict[str, Any]], list[Factor]]:
    """Parameter groups by learning-rate factor and weight decay, and their factors. Weight decay skips biases, gains
    and vectors."""
    groups: dict[tuple[Factor, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        factor = rate_of(name.removeprefix("module.").removeprefix("model."))
        groups.setdefault((factor, config.weight_decay if parameter.ndim >= 2 else 0.0), []).append(parameter)
    shared = {"betas": config.betas, "eps": config.eps}
    return [{"params": p, "weight_decay": decay, **shared} for (_, decay), p in groups.items()], [f for f, _ in groups]


def _allocate(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer state of all parameters now: a checkpoint must contain the state of every parameter,
    including those that get no gradient until a later phase."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # changes no weight: the learning rate is 0
    optimizer.zero_grad(set_to_none=True)
    for entry in optimizer.state.values():
        entry["step"].zero_()


@torch.no_grad()
def _average(average: dict[str, Tensor], losses: nn.Module, decay: float, step: int) -> None:
    # The decay grows from 0.1 to its value; with the full decay the early average would be mostly the initialisation.
    weight = 1 - min(decay, (1 + step) / (10 + step)) if decay else 1.0
    current = get_model_state_dict(losses)
    floating = [key for key, value in current.items() if value.is_floating_point()]
    torch._foreach_lerp_([_own(average[k]) for k in floating], [_own(current[k]) for k in floating], weight)
    for key in current.keys() - set(floating):
        average[key].copy_(current[key])


def _own(x: Tensor) -> Tensor:
    """This process's shard of a sharded parameter; an unsharded tensor unchanged."""
    return x.to_local() if isinstance(x, DTensor) else x


def recorded_fields(recipe: Any, **data: Any) -> dict[str, Any]:
    """A recipe's fields and the `data` that it is used with, for `run`. `loop` and `threads` are left out, which `run`
    records itself, and fields that do not affect the weights."""
    left_out = ("loop", "threads", "gradient_checkpointing", "evaluated", "held_out_pool", "prompts")
    return {name: value for name, value in asdict(recipe).items() if name not in left_out} | data


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they are read back from JSON; other objects as text."""
    return json.loads(json.dumps(values, default=str))


def _tensors(losses: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors of a checkpoint, under names that do not depend on how the model is sharded."""
    return {
        "model": get_model_state_dict(losses),
        "optimizer": get_optimizer_state_dict(losses, optimizer),
        "average": average,
    }


def _check(
    name: str,
    folder: Path,
    saved: Mapping[str, Any],
    config: LoopConfig,
    conditions: dict[str, int],
    recorded: dict[str, Any],
    accept_changes: bool,
) -> None:
    """Raise `ReducioError` if resuming from the checkpoint would change the weights of an uninterrupted run."""
    defaults = {f.name: f.default for f in fields(config)}  # of settings that are newer than the checkpoint
    made = _plain(defaults) | saved["config"] | saved["conditions"]
    before = saved.get("recorded", {})  # older checkpoints have none
    wanted = {**_plain(asdict(config)), **conditions}
    made |= {key: before[key] for key in recorded if key in before}
    wanted |= {key: value for key, value in recorded.items() if key in before}
    # A sum of at most two batches is the same for any number of processes.
    harmless = _HARMLESS | ({"world_size"} if config.micro_batches <= 2 else frozenset())
    for key, value in wanted.items():
        if made.get(key) != value and key not in harmless and not accept_changes:
            raise ReducioError(
                f"train {name}: checkpoint {folder} was made with {key}={made.get(key)}, this run has {key}={value}; "
                "the weights would not be those of one run: --accept-changes resumes anyway, --no-resume starts anew"
            )
