"""The paper's ablations: trains a recipe once for every variant and seed; variants differ in one setting.

Each run has its own folder `VARIANT/seed-N` and can be resumed; its `log.csv` is the training curve. `ablation.csv` is
the table of all runs.
"""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...system.atomic_files import written_whole
from ...system.errors import ReducioError

TABLE = "ablation.csv"


@dataclass(frozen=True, slots=True)
class Ablation:
    """An ablation. `variants` maps a name to changes of the recipe, in the notation of `--set`."""

    model: str  # "dit" or "vae": the kind of recipe
    figure: str  # name of the compared figure, measured on held-out clips
    paper: str  # result of the paper
    variants: Mapping[str, tuple[str, ...]]


ABLATIONS: dict[str, Ablation] = {
    "latent-channels": Ablation(
        model="vae",
        figure="held_out_psnr",
        paper="Table 4: 16 channels are 2.71 dB better than 4; 32 gain almost nothing more",
        variants={str(n): (f"config.latent_channels={n}",) for n in (4, 8, 16, 32)},
    ),
    "fusion": Ablation(
        model="vae",
        figure="held_out_psnr",
        paper="Table 5: attention is 1.71 dB better than addition and linear fusion",
        variants={kind: (f'config.fusion="{kind}"',) for kind in ("attn", "add", "linear")},
    ),
    "attention": Ablation(
        model="dit",
        figure="held_out_error",
        paper="Table 7: 3D attention is 45 FVD better than 2D+1D at equal steps, whose training loss falls faster",
        variants={kind: (f'config.attention="{kind}"',) for kind in ("3d", "2d+1d")},
    ),
    "condition": Ablation(
        model="dit",
        figure="held_out_error",
        paper="Table 8: semantic tokens alone distort details, the content latent alone moves less; both are best",
        variants={
            "both": ('image_conditions=["semantic", "content"]',),
            "semantic": ('image_conditions=["semantic"]',),
            "content": ('image_conditions=["content"]',),
        },
    ),
}


def run_ablation(
    name: str,
    load: Callable[[list[str]], Any],
    train: Callable[[Any, Path], dict[str, float]],
    out: Path,
    seeds: int,
) -> list[dict[str, Any]]:
    """Train all variants, seed by seed, write `out/ablation.csv` and return its rows.

    Args:
        load: called with changes of the recipe; returns the changed recipe.
        train: called with a recipe and the folder of a run; returns the run's figures.
        seeds: number of runs per variant, with `loop.seed` 0, 1, ...

    Raises:
        ReducioError: there are several processes, of which each can join only one run; a variant's recipe is not valid,
            or sets no `held_out`.
    """
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ReducioError(f"WORLD_SIZE={processes}: --ablation {name} is trained by one process, without torchrun")
    ablation, rows = ABLATIONS[name], []
    runs = [(variant, seed) for seed in range(seeds) for variant in ablation.variants]
    recipes = [load([*ablation.variants[variant], f"loop.seed={seed}"]) for variant, seed in runs]
    if not all(recipe.held_out for recipe in recipes):
        raise ReducioError(f"ablation {name}: the recipe needs held_out, the number of clips to compare on")
    for (variant, seed), recipe in zip(runs, recipes, strict=True):
        figures = train(recipe, out / variant / f"seed-{seed}")
        rows.append({"variant": variant, "seed": seed, **figures})
        _write(rows, out / TABLE)
    return rows


def summary(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines to print: mean and range of each variant's figure over the seeds, and the result of the paper."""
    ablation = ABLATIONS[name]
    lines = [f"{name}, {ablation.figure} (the paper, {ablation.paper})"]
    for variant in ablation.variants:
        of_variant = [row for row in rows if row["variant"] == variant]
        values = [float(row[ablation.figure]) for row in of_variant]
        seconds = statistics.mean(float(row["seconds"]) for row in of_variant)
        spread = f"{min(values):.4g} to {max(values):.4g}, " if len(values) > 1 else ""
        lines.append(f"  {variant}: {statistics.mean(values):.4g} ({spread}{len(values)} seeds, {seconds:.0f} s a run)")
    return lines


def _write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
