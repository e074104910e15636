"""Train a model: the embedded one from nothing, a transformer on latents, an autoencoder on videos."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..system.errors import ReducioError
from . import options
from .printing import NOTHING, Printed

MODELS = ("tiny", "dit", "vae", "svd-tiny", "svd-lora")
ABLATIONS = ("latent-channels", "fusion", "attention", "condition")  # of training.reducio.ablations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=MODELS,
        help="tiny: the embedded model; dit: a transformer; vae: an autoencoder; svd-tiny: the embedded SVD; svd-lora: "
        "a LoRA on SVD's attention over time",
    )
    options.add_out(parser, "DIR", "components, checkpoints and logs go here")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from the last checkpoint (default)"
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume although the recipe, the data, the processes or the threads changed",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    options.add_progress(parser)
    tiny = parser.add_argument_group("tiny and svd-tiny")
    tiny.add_argument("--stages", metavar="A,B", help="only these stages of the recipe")
    tiny.add_argument("--steps-scale", type=float, metavar="X", help="multiplies the steps of every stage")
    tiny.add_argument("--data", metavar="DIR", help="tiny: downloaded film and photographs (default: OUT/data)")
    sized = parser.add_argument_group("dit, vae and svd-lora; under torchrun for several processes")
    sized.add_argument("--recipe", metavar="NAME", help="a TOML file, or a recipe of the package such as dit-256")
    sized.add_argument("--set", action="append", metavar="KEY=VALUE", help="change the recipe, e.g. loop.steps=100")
    sized.add_argument("--latents", metavar="DIR", help="dit: what reducio-fast extract made")
    sized.add_argument(
        "--model", metavar="DIR", help="dit: its other components (default: the embedded model); svd-lora: the SVD"
    )
    sized.add_argument(
        "--clips", metavar="FILE", help="vae, svd-lora: clips.parquet of reducio-fast curate, or its folder"
    )
    sized.add_argument(
        "--dtype", choices=options.DTYPES, help="svd-lora: of the frozen weights (default: the device's)"
    )
    sized.add_argument("--lpips", metavar="FILE", help="vae: torchvision's AlexNet (default: no perceptual loss)")
    sized.add_argument(
        "--ablation",
        choices=ABLATIONS,
        help="train the recipe once for each variant, in one process, and compare held-out clips",
    )
    sized.add_argument("--seeds", type=options.positive, metavar="N", help="runs of each variant (default: 1)")
    sized.add_argument("--price", type=float, metavar="X", help="of an hour of a process; prints the cost of a step")


_OWN = {
    "tiny": ("stages", "steps_scale", "data"),
    "dit": ("recipe", "set", "latents", "model", "price", "ablation", "seeds"),
    "vae": ("recipe", "set", "clips", "lpips", "price", "ablation", "seeds"),
    "svd-tiny": ("stages", "steps_scale"),
    "svd-lora": ("recipe", "set", "clips", "model", "dtype", "price"),
}


def run(arguments: argparse.Namespace) -> Printed:
    options.refuse_others(arguments, _OWN)
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise ReducioError(f"--price {arguments.price}: must be a finite number of at least 0")
    runs = {"tiny": _tiny, "dit": _dit, "vae": _vae, "svd-tiny": _svd_tiny, "svd-lora": _svd_lora}
    printed = runs[arguments.what](arguments)
    return printed if os.environ.get("RANK", "0") == "0" else NOTHING  # under torchrun the first process prints


def _tiny(arguments: argparse.Namespace) -> Printed:
    from ..training.tiny.recipe import train

    return _staged(arguments, train(arguments.out, data=arguments.data, **_stages(arguments), **_shared(arguments)))


def _svd_tiny(arguments: argparse.Namespace) -> Printed:
    from ..training.svd.tiny_recipe import train

    return _staged(arguments, train(arguments.out, **_stages(arguments), **_shared(arguments)))


def _stages(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "stages": arguments.stages.split(",") if arguments.stages is not None else None,
        "scale": 1.0 if arguments.steps_scale is None else arguments.steps_scale,
    }


def _staged(arguments: argparse.Namespace, figures: dict[str, dict[str, float]]) -> Printed:
    lines = [f"{stage}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()) for stage, row in figures.items()]
    return {"out": arguments.out, "stages": figures}, [*lines, f"wrote {arguments.out}"]


def _dit(arguments: argparse.Namespace) -> Printed:
    options.needs(arguments, "recipe", "latents")

    from ..training.reducio.dit import DiTRecipe, train_dit

    def train(recipe: DiTRecipe, out: str | Path) -> dict[str, float]:
        return train_dit(arguments.latents, out, recipe, model=arguments.model, **_shared(arguments))

    return _trained(arguments, DiTRecipe, train, "model")


def _vae(arguments: argparse.Namespace) -> Printed:
    options.needs(arguments, "recipe", "clips")

    from ..training.reducio.vae import VAERecipe, train_vae

    def train(recipe: VAERecipe, out: str | Path) -> dict[str, float]:
        return train_vae(arguments.clips, out, recipe, lpips=arguments.lpips, **_shared(arguments))

    return _trained(arguments, VAERecipe, train, "vae")


def _svd_lora(arguments: argparse.Namespace) -> Printed:
    options.needs(arguments, "model", "recipe", "clips")

    from ..training.recipe_file import load
    from ..training.svd.lora import LoRARecipe, train_lora

    recipe = load(LoRARecipe, arguments.recipe, arguments.set)
    figures = train_lora(
        arguments.model, arguments.clips, arguments.out, recipe, dtype=arguments.dtype, **_shared(arguments)
    )
    return _printed(arguments, figures, "lora")


def _shared(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("device", "resume", "accept_changes", "progress")}


def _trained(
    arguments: argparse.Namespace, recipe_class: type, train: Callable[[Any, str | Path], dict[str, float]], folder: str
) -> Printed:
    """One run, or the runs of an ablation."""
    from ..training.recipe_file import load

    def recipe(changes: list[str]) -> Any:
        return load(recipe_class, arguments.recipe, [*(arguments.set or []), *changes])

    name = arguments.ablation
    if name is None:
        if arguments.seeds is not None:
            raise ReducioError("--seeds belongs to --ablation; one run's seed is --set loop.seed=N")
        return _printed(arguments, train(recipe([]), arguments.out), folder)

    from ..training.reducio.ablations import ABLATIONS, run_ablation, summary

    options.refuse(arguments, ["price"], "of one run; ablation.csv has the seconds of each")
    if any(change.split("=")[0].strip() == "loop.seed" for change in arguments.set or ()):
        raise ReducioError("--set loop.seed: an ablation runs seeds 0 to N - 1; name their number by --seeds")
    if ABLATIONS[name].model != arguments.what:
        raise ReducioError(f"--ablation {name} is of train {ABLATIONS[name].model}, not of train {arguments.what}")
    rows = run_ablation(name, recipe, train, Path(arguments.out), arguments.seeds or 1)
    return {"out": arguments.out, "rows": rows}, [*summary(name, rows), f"wrote {arguments.out}/ablation.csv"]


def _printed(arguments: argparse.Namespace, figures: dict[str, float], folder: str) -> Printed:
    lines = [", ".join(f"{name} {value:.4g}" for name, value in figures.items())]
    if arguments.price is not None:
        figures["price_a_step"] = figures["process_seconds_a_step"] / 3600 * arguments.price
        lines.append(f"a step costs {figures['price_a_step']:.3g} at {arguments.price:g} an hour and process")
    return {"out": arguments.out, **figures}, [*lines, f"wrote {arguments.out}/{folder}"]
