"""The transformer's recipe: trains on latents of `extract` and writes a model folder that `generate()` loads.

Every random draw (rows, noise, time, dropped captions) depends on the seed, the step and the row's index in the global
batch, so the number of processes and of micro-batches does not change it. Letters in shapes: B batch, C channels,
T frames, H W rows and columns, L text positions, S semantic tokens.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checkpoints.layouts import REDUCIO
from ...checkpoints.model_folder import read_facts, read_index, write_model
from ...checkpoints.networks import load_model
from ...checkpoints.strict_files import INDEX as MODEL_INDEX
from ...checkpoints.strict_files import check_component, check_model_folder, check_same_class, embedded_model
from ...data.epoch_order import EpochOrder
from ...data.latent_shards import LatentDataset
from ...media.aspect_buckets import BASES
from ...reference import DiTConfig, ReducioDiT
from ...reference.reducio.config import DIT_PRESETS
from ...system.atomic_files import check_replaceable
from ...system.errors import ReducioError
from ...system.paths import check_output_folder
from ..loop import LoopConfig, Outcome, recorded_fields, run
from ..processes import joined
from ..recipe_file import check_least, check_share, check_threads, configured, start_folder
from ..recompute import recompute
from .extract import encoder_checksums, encoder_settings
from .objective import Objective

IMAGE_CONDITIONS = ("semantic", "content")
# Embeddings that a later training stage may add; their output starts at zero.
ADDED_EMBEDDINGS = tuple(
    f"adaln_single.emb.{name}_embedder." for name in ("resolution", "aspect_ratio", "fps", "motion")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTRecipe:
    """Settings of a transformer's training. `batch` is global: all processes and micro-batches share it."""

    loop: LoopConfig
    batch: int  # clips per step, split into `loop.micro_batches` parts
    model: str | None = None  # a preset of `DIT_PRESETS`; None: the configuration of `start`
    config: dict[str, Any] = field(default_factory=dict)  # fields of `DiTConfig` that replace the preset's
    start: str | None = None  # folder with the initial weights, written by `convert` or by the previous stage
    objective: str = "epsilon"
    condition_drop: float = 0.1  # share of captions replaced by the null text, for classifier-free guidance
    image_drop: float = 0.0  # share of content frames that are dropped together with their captions
    clip_drop: float = 0.1  # share of frame rates, and of motions, dropped if config.clip_conditioning is true
    gradient_checkpointing: bool = False  # recompute the activations of a block in the backward pass
    threads: int | None = None  # CPU threads of each process; their number affects the rounding of sums
    held_out: int = 0  # clips of the first bucket excluded from training; their error is reported at the end
    # Conditions from the content frame: OpenCLIP tokens and content latent. A model trained with one of them is saved
    # without the encoder of the other.
    image_conditions: tuple[str, ...] = IMAGE_CONDITIONS

    def __post_init__(self) -> None:
        if self.batch < 1 or self.batch % self.loop.micro_batches:
            raise ReducioError(f"batch={self.batch} must be a multiple of loop.micro_batches={self.loop.micro_batches}")
        check_share(self, "condition_drop", "image_drop", "clip_drop")
        check_least(self, 0, "held_out")
        check_threads(self.threads)
        if not self.image_conditions or not set(self.image_conditions) <= set(IMAGE_CONDITIONS):
            raise ReducioError(
                f"image_conditions={list(self.image_conditions)}: must be one or both of {', '.join(IMAGE_CONDITIONS)}"
            )
        if self.model is not None and self.model not in DIT_PRESETS:
            raise ReducioError(f"model={self.model!r}: must be one of {', '.join(DIT_PRESETS)}")
        if self.model is None and self.start is None:
            raise ReducioError("a recipe needs `model` (a preset) or `start` (a folder)")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one bucket, in float32."""

    latent: Tensor  # [B, C, T, H, W]
    noise: Tensor
    time: Tensor  # [B] in 0..1
    text: Tensor  # [B, L, C]; the null text for dropped captions
    mask: Tensor  # bool [B, L]
    semantic: Tensor | None  # [B, S, C]
    content: Tensor | None  # [B, 4, H/8, W/8]
    clip: Tensor  # [B, 2], frame rate and motion; NaN if dropped or unknown

    def to(self, device: torch.device) -> Batch:
        """The batch with all tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: None if x is None else x.to(device, non_blocking=True) for name, x in moved.items()})


def train_dit(
    latents: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: DiTRecipe,
    model: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    resume: bool = True,
    accept_changes: bool = False,
    progress: bool = True,
) -> dict[str, float]:
    """Train a transformer and write `out/model`: the transformer with the encoders and the autoencoder of `model`.

    Args:
        latents: folder that `extract` wrote with the encoders of `model`.
        out: output folder, with `runs/dit` (checkpoints, log) and `model`; under torchrun the same for all processes.
        model: model folder, of which the transformer and the scheduler are not read; None means the embedded model.

    Returns:
        The last logged figures, `steps`, `seconds`, seconds per step and, with held-out clips, `held_out_error`.

    Raises:
        ReducioError: the latents come from other encoders, or do not fit the network; `model` or `out/model` cannot be
            read or written at the end; or see `loop.run`.
    """
    folder = Path(model) if model is not None else embedded_model()
    check_model_folder(folder)
    dataset = LatentDataset(latents, encoder_checksums(folder), encoder_settings(folder))
    recorded = recorded_fields(recipe, latents=asdict(dataset.about), clips=dataset.counts)
    dataset.leave_out(set(IMAGE_CONDITIONS) - set(recipe.image_conditions))
    held_out = _take_held_out(dataset, recipe)
    with joined(device, recipe.threads) as processes:
        torch.manual_seed(recipe.loop.seed)
        network = build_network(recipe)
        _check_fits(network.config, dataset)
        check_export(network, recipe, folder, Path(out) / "model")
        trainer = Trainer(network, dataset, recipe, processes.device)
        outcome = run(
            "dit",
            network,
            trainer.loss,
            recipe.loop,
            Path(out) / "runs" / "dit",
            processes,
            resume,
            accept_changes,
            progress,
            network.transformer_blocks,
            recorded=recorded,
        )
        figures = outcome.figures(processes.world_size)
        if processes.first:
            size = square_of(dataset.counts)
            trained = export(network.config, outcome, recipe, folder, Path(out) / "model", size)
            if held_out:
                figures["held_out_error"] = held_out_error(trained, trainer.objective, held_out)
        processes.barrier()
    return figures


def build_network(recipe: DiTRecipe) -> ReducioDiT:
    """The network before its first step."""
    folder = None if recipe.start is None else start_folder(recipe.start, "transformer")
    first = None if folder is None else load_model(ReducioDiT, DiTConfig, folder, torch.float32)
    base = DIT_PRESETS[recipe.model] if recipe.model is not None else first.config
    network = ReducioDiT(configured(base, recipe.config))
    for name, part in (("semantic", network.semantic_projection), ("content", network.content_embedding)):
        if name not in recipe.image_conditions:
            part.requires_grad_(False)  # it gets no gradient, and DDP would wait for one
    if first is not None:
        _start_from(network, first, folder)
    if recipe.gradient_checkpointing:
        recompute(network.transformer_blocks)
    return network


def _start_from(network: ReducioDiT, other: ReducioDiT, folder: Path) -> None:
    """Load the weights of the previous stage. Embeddings that this stage adds (1024: for sizes) start with output 0. If
    only the previous stage learned the variance, its outputs are left out."""
    weights, wanted = other.state_dict(), network.state_dict()
    if other.config.learn_sigma and not network.config.learn_sigma:
        # The output's rows are (place in the patch, channel); the means come first, see `unpatchify`.
        patch, channels = math.prod(other.config.patch_size), other.config.latent_channels
        for name in ("proj_out.weight", "proj_out.bias"):
            weights[name] = weights[name].unflatten(0, (patch, -1))[:, :channels].flatten(0, 1)
    new = [name for name in wanted if name not in weights]
    if not all(name.startswith(ADDED_EMBEDDINGS) for name in new) or any(
        wanted[name].shape != value.shape for name, value in weights.items() if name in wanted
    ):
        raise ReducioError(
            f"start: the network of {folder} has other weights than the recipe's; its config must be the same"
        )
    network.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in new and ".linear_2." in name:
                parameter.zero_()


class Trainer:
    """Draws batches and computes their losses."""

    def __init__(self, network: ReducioDiT, dataset: LatentDataset, recipe: DiTRecipe, device: torch.device) -> None:
        self.network, self.dataset, self.recipe, self.device = network, dataset, recipe, device
        self.objective = Objective(recipe.objective, network.config.learn_sigma)
        self.order = EpochOrder(dataset.counts, recipe.batch, recipe.loop.seed)

    def loss(self, step: int, micro: int, _rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self.draw(step, micro)
        loss, parts = self.objective.loss(
            lambda x, t: predict(self.network, batch, x, t), batch.latent, batch.noise, batch.time
        )
        return loss, {name: value.mean() for name, value in parts.items()}

    def draw(self, step: int, micro: int) -> Batch:
        """Part `micro` of the global batch of a step."""
        bucket, rows = self.order.rows(step)
        share = self.recipe.batch // self.recipe.loop.micro_batches
        places = range(micro * share, (micro + 1) * share)
        samples = [self.dataset.sample(bucket, rows[place]) for place in places]
        rngs = [np.random.default_rng((self.recipe.loop.seed, 1 << 21, step, place)) for place in places]
        times = [self.objective.draw_time(rng) for rng in rngs]
        noises = [
            torch.from_numpy(rng.standard_normal(s["latent"].shape, np.float32))
            for rng, s in zip(rngs, samples, strict=True)
        ]
        shares = (self.recipe.condition_drop, self.recipe.image_drop, self.recipe.clip_drop, self.recipe.clip_drop)
        drops = [Drops(*(bool(rng.random() < share) for share in shares)) for rng in rngs]
        return collate(samples, noises, times, self.network.null_text.detach().cpu(), drops).to(self.device)


class Drops(NamedTuple):
    """The dropped conditions of a clip. Dropping the content frame also drops the caption."""

    caption: bool = False
    image: bool = False
    fps: bool = False
    motion: bool = False


def collate(
    samples: list[dict[str, Any]], noises: list[Tensor], times: list[float], null_text: Tensor, drops: list[Drops]
) -> Batch:
    """Stack samples of one bucket into a batch.

    The same number of null tokens replaces the tokens of a dropped caption, as in PixArt-alpha.
    """
    longest = max(1, *(len(sample["text"]) for sample in samples))
    text = torch.zeros(len(samples), longest, null_text.shape[1])
    mask = torch.zeros(len(samples), longest, dtype=torch.bool)
    for i, (sample, drop) in enumerate(zip(samples, drops, strict=True)):
        length = len(sample["text"])
        text[i, :length] = null_text[:length] if drop.caption or drop.image else sample["text"]
        mask[i, :length] = True
    images = []
    for name in IMAGE_CONDITIONS:
        if name not in samples[0]:
            images.append(None)
            continue
        kept = torch.tensor([0.0 if drop.image else 1.0 for drop in drops])
        stacked = torch.stack([sample[name] for sample in samples])
        images.append(stacked * kept.view(-1, *[1] * (stacked.ndim - 1)))
    latent = torch.stack([sample["latent"] for sample in samples])
    clip = torch.tensor(
        [
            (
                math.nan if drop.fps else sample["fps"],
                math.nan if drop.motion or sample["motion"] is None else sample["motion"],
            )
            for sample, drop in zip(samples, drops, strict=True)
        ]
    )
    return Batch(latent, torch.stack(noises), torch.tensor(times), text, mask, *images, clip)


def predict(network: ReducioDiT, batch: Batch, noisy: Tensor, timestep: Tensor) -> Tensor:
    """All output channels of the network, including a learned variance."""
    return network(noisy, timestep, batch.text, batch.mask, batch.semantic, batch.content, clip=batch.clip)


def _take_held_out(dataset: LatentDataset, recipe: DiTRecipe) -> Batch | None:
    """Remove the last clips of the first bucket from the dataset; return them with fixed noise and times."""
    if not recipe.held_out:
        return None
    samples = dataset.take_last(next(iter(dataset.counts)), recipe.held_out)
    rng = np.random.default_rng((recipe.loop.seed, 1 << 22))
    noises = [torch.from_numpy(rng.standard_normal(s["latent"].shape, np.float32)) for s in samples]
    times = ((np.arange(len(samples)) + 0.5) / len(samples)).tolist()
    unused = torch.zeros(1, samples[0]["text"].shape[1])
    return collate(samples, noises, times, unused, [Drops()] * len(samples))


@torch.no_grad()
def held_out_error(network: ReducioDiT, objective: Objective, batch: Batch) -> float:
    """Mean squared error of the prediction on the held-out clips."""
    parts = objective.loss(lambda x, t: predict(network, batch, x, t), batch.latent, batch.noise, batch.time)[1]
    return float(parts["error"].mean())


def _check_fits(config: DiTConfig, dataset: LatentDataset) -> None:
    sample = dataset.sample(next(iter(dataset.counts)), 0)
    wanted = {
        "caption_channels": (sample["text"].shape[-1], config.caption_channels),
        "latent_channels": (sample["latent"].shape[0], config.latent_channels),
    }
    if "semantic" in sample:
        wanted["semantic_channels"] = (sample["semantic"].shape[-1], config.semantic_channels)
    for name, (has, needs) in wanted.items():
        if has != needs:
            raise ReducioError(f"the latents have {name}={has}, the recipe's network {needs}; set config.{name}")


def _replaced(network: ReducioDiT, recipe: DiTRecipe) -> dict[str, Any]:
    """The components that `export` writes instead of those of the model folder."""
    return {"transformer": network, "scheduler": Objective(recipe.objective, network.config.learn_sigma).scheduler()}


def check_export(network: ReducioDiT, recipe: DiTRecipe, model: Path, target: Path) -> None:
    """Raise ReducioError, without loading weights, if `export` would fail after the training."""
    from ...pipelines.execution.components import Components
    from ...pipelines.reducio.component_table import check_components, check_settings
    from ...pipelines.reducio.pipeline import ReducioPipeline

    read_index(model, REDUCIO)
    defaults = {name: value.default for name, value in inspect.signature(ReducioPipeline).parameters.items()}
    reading = ReducioPipeline.configs, ReducioPipeline.loaders
    facts = read_facts(model, REDUCIO, *reading, _replaced(network, recipe))
    parts = Components(REDUCIO, defaults | facts)
    check_components(parts)
    check_settings(parts)
    for name in ("vae", "text_encoder", "image_encoder", "content_encoder", "preview_decoder"):
        if parts[name] is not None:
            check_component(model / name)
    check_replaceable(target, MODEL_INDEX, "model")
    check_same_class(target, MODEL_INDEX, REDUCIO.pipeline)
    target.parent.mkdir(parents=True, exist_ok=True)
    check_output_folder(target)


def square_of(buckets: Iterable[str]) -> int:
    """The size that `extract` was given, from the names of its buckets, such as "192x320"."""
    height, width = map(int, next(iter(buckets)).split("x"))
    return height if height == width else min(BASES, key=lambda base: abs(height * width - base * base))


def export(config: DiTConfig, outcome: Outcome, recipe: DiTRecipe, model: Path, target: Path, size: int) -> ReducioDiT:
    """Write a copy of `model` with the averaged weights and the objective's scheduler; return the network. Its clips
    are of `size` pixels, as the latents were, unless a call names another size."""
    from ...pipelines.reducio.pipeline import ReducioPipeline

    network = ReducioDiT(config)
    network.load_state_dict({name: value.cpu() for name, value in outcome.averaged.items()})
    network.eval()
    replaced = _replaced(network, recipe)
    pipe = ReducioPipeline.from_pretrained(model, device="cpu", backend="reference", **replaced)
    parts = {name: getattr(pipe, name) for name in (*REDUCIO.names, *REDUCIO.settings)}
    parts |= {"sample_height": size, "sample_width": size}
    for name, encoder in zip(IMAGE_CONDITIONS, ("image_encoder", "content_encoder"), strict=True):
        if name not in recipe.image_conditions:
            parts[encoder] = None
    write_model(target, parts, REDUCIO, model)
    (target / "training.json").write_text(
        json.dumps({"steps": outcome.step, "seconds": round(outcome.seconds, 1)}, indent=2) + "\n", encoding="utf-8"
    )
    return network
