"""Train a model: the embedded one from nothing, or a transformer on extracted latents."""

from __future__ import annotations

import argparse

from ..system.errors import ReducioError
from . import options
from .printing import Printed

MODELS = ("tiny", "dit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=MODELS, help="tiny: the embedded model; dit: a transformer")
    options.add_out(parser, "DIR", "components, checkpoints and logs go here")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from the last checkpoint (default)"
    )
    parser.add_argument(
        "--accept-changes", action="store_true", help="resume although the recipe, the processes or the threads changed"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    options.add_progress(parser)
    tiny = parser.add_argument_group("tiny")
    tiny.add_argument("--stages", metavar="A,B", help="only these stages of the recipe")
    tiny.add_argument("--steps-scale", type=float, metavar="X", help="multiplies the steps of every stage")
    tiny.add_argument("--data", metavar="DIR", help="downloaded film and photographs (default: OUT/data)")
    sized = parser.add_argument_group("dit; under torchrun for several processes")
    sized.add_argument("--recipe", metavar="NAME", help="a TOML file, or a recipe of the package such as dit-256")
    sized.add_argument("--set", action="append", metavar="KEY=VALUE", help="change the recipe, e.g. loop.steps=100")
    sized.add_argument("--latents", metavar="DIR", help="what reducio-fast extract made")
    sized.add_argument("--model", metavar="DIR", help="its other components (default: the embedded model)")
    sized.add_argument("--price", type=float, metavar="X", help="of an hour of one process: prints what a step costs")


_OWN = {"tiny": ("stages", "steps_scale", "data"), "dit": ("recipe", "set", "latents", "model", "price")}


def run(arguments: argparse.Namespace) -> Printed:
    for model, names in _OWN.items():
        given = [name for name in names if getattr(arguments, name) is not None]
        if model != arguments.what and given:
            raise ReducioError(
                f"train {arguments.what} takes no --{given[0].replace('_', '-')}, which is of train {model}"
            )
    return _tiny(arguments) if arguments.what == "tiny" else _dit(arguments)


def _tiny(arguments: argparse.Namespace) -> Printed:
    from ..training.tiny.recipe import train

    figures = train(
        arguments.out,
        stages=arguments.stages.split(",") if arguments.stages else None,
        scale=1.0 if arguments.steps_scale is None else arguments.steps_scale,
        resume=arguments.resume,
        progress=arguments.progress,
        device=arguments.device,
        data=arguments.data,
        accept_changes=arguments.accept_changes,
    )
    lines = [f"{stage}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()) for stage, row in figures.items()]
    return {"out": arguments.out, "stages": figures}, [*lines, f"wrote {arguments.out}"]


def _dit(arguments: argparse.Namespace) -> Printed:
    for name in ("recipe", "latents"):
        if getattr(arguments, name) is None:
            raise ReducioError(f"train dit needs --{name}")

    from ..training.recipe_file import load
    from ..training.reducio.dit import DiTRecipe, train_dit

    figures = train_dit(
        arguments.latents,
        arguments.out,
        load(DiTRecipe, arguments.recipe, arguments.set),
        model=arguments.model,
        device=arguments.device,
        resume=arguments.resume,
        accept_changes=arguments.accept_changes,
        progress=arguments.progress,
    )
    lines = [", ".join(f"{name} {value:.4g}" for name, value in figures.items())]
    if arguments.price is not None:
        figures["price_a_step"] = figures["process_seconds_a_step"] / 3600 * arguments.price
        lines.append(f"a step costs {figures['price_a_step']:.3g} at {arguments.price:g} an hour and process")
    return {"out": arguments.out, **figures}, [*lines, f"wrote {arguments.out}/model"]
