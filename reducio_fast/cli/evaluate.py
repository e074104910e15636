"""Score a model on prompts and clips, an autoencoder on real video, or generated clips."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..system.errors import ReducioError
from . import options
from .printing import Printed

WHAT = ("toy", "autoencoder", "clips", "vbench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="?", choices=WHAT, default="toy",
        help="toy: held-out prompts and clips of the toy world (default); autoencoder: real video through a model's; "
        "clips: a folder of generated clips; vbench: VBench in an environment of its own",
    )  # fmt: skip
    options.add_model(
        parser,
        also=" of toy, autoencoder, vbench",
        dtype="autoencoder: float32; else float32 on a CPU, bfloat16 on a GPU",
    )
    parser.add_argument("--prompts", type=options.positive, help="toy: prompts to draw (default: 64)")
    parser.add_argument("--seed", type=options.not_negative, help="toy: of the prompts and clips (default: 0)")
    parser.add_argument("--videos", nargs="+", metavar="PATH", help="autoencoder, clips: videos and folders of them")
    parser.add_argument("--real", nargs="+", metavar="PATH", help="clips: real videos, for FVD and motion")
    parser.add_argument(
        "--size", type=options.positive, action="append", help="autoencoder: pixels a side (default: 256)"
    )
    options.add_refine(parser, "toy, autoencoder: ", default=None)
    parser.add_argument("--lpips", metavar="FILE", help="autoencoder: torchvision's weights of AlexNet")
    parser.add_argument(
        "--fvd", metavar="FILE", help="autoencoder, clips: TorchScript I3D: [B, 3, 16, 224, 224] to features"
    )
    parser.add_argument("--classifier", metavar="FILE", help="clips: TorchScript C3D to class logits, for the IS")
    parser.add_argument("--clip", metavar="DIR", help="clips: an open_clip model, with --captions")
    parser.add_argument("--captions", metavar="FILE", help="clips: JSON {file name: caption}; vbench: [prompts]")
    parser.add_argument("--vbench", metavar="PYTHON", help="vbench: the interpreter of VBench's environment, on a GPU")
    parser.add_argument(
        "--dimension", action="append", metavar="NAME", help="vbench: which (default: motion_smoothness)"
    )
    parser.add_argument("--out", "-o", metavar="DIR", help="vbench: where its clips and results go")
    options.add_progress(parser)


_OWN = {
    "toy": ("model", "dtype", "device", "prompts", "seed", "refine"),
    "autoencoder": ("model", "dtype", "device", "videos", "size", "refine", "lpips", "fvd"),
    "clips": ("device", "videos", "real", "fvd", "classifier", "clip", "captions"),
    "vbench": ("model", "dtype", "device", "captions", "vbench", "dimension", "out"),
}


def run(arguments: argparse.Namespace) -> Printed:
    options.refuse_others(arguments, _OWN)
    return {"toy": _toy, "autoencoder": _autoencoder, "clips": _clips, "vbench": _vbench}[arguments.what](arguments)


def _model_folder(arguments: argparse.Namespace) -> Path:
    from ..checkpoints.strict_files import embedded_model

    return Path(arguments.model) if arguments.model else embedded_model()


def _pipeline(arguments: argparse.Namespace) -> Any:
    from ..checkpoints.strict_files import embedded_model
    from ..pipelines.reducio.pipeline import ReducioPipeline

    model = arguments.model or embedded_model()
    return ReducioPipeline.from_pretrained(model, dtype=arguments.dtype, device=arguments.device)


def _autoencoder(arguments: argparse.Namespace) -> Printed:
    options.needs(arguments, "videos")

    from ..checkpoints.networks import load_model
    from ..evaluation.published import autoencoder_table
    from ..evaluation.video_report import evaluate_autoencoder
    from ..reference import ReducioVAE, VAEConfig
    from ..system.devices import DTYPES, resolve_device

    folder, device = _model_folder(arguments), resolve_device(arguments.device)
    dtype = DTYPES[arguments.dtype or "float32"]  # float32 on a GPU too, as in the release
    vae = load_model(ReducioVAE, VAEConfig, folder / "vae", dtype, device).eval()
    sizes = arguments.size or [256]
    refine = arguments.refine or 0
    networks = (arguments.lpips, arguments.fvd)
    result = evaluate_autoencoder(vae, arguments.videos, sizes, *networks, arguments.progress, refine)
    config, lines = vae.config, []
    factor = f"{config.temporal_factor}x{config.spatial_factor}x{config.spatial_factor}"
    for size, entry in result.items():
        lines.append(f"{size} pixels{'':<14}{'clips':>7}{'PSNR dB':>9}{'gain dB':>9}{'worst':>8}{'content frame':>15}")
        for name, row in entry["videos"].items():
            gains = f"{row['pooled_gain_db']:>+9.2f}{row['worst_gain_db']:>+8.2f}"
            lines.append(f"{name:<24}{row['clips']:>7}{row['psnr']:>9.2f}{gains}{row['content_psnr']:>15.2f}")
        name = folder.name + (f", refine {refine}" if refine else "")
        lines += autoencoder_table(name, factor, config.latent_channels, entry["all"])
    return result, lines


def _clips(arguments: argparse.Namespace) -> Printed:
    options.needs(arguments, "videos")
    from ..evaluation.published import GENERATION
    from ..evaluation.video_report import evaluate_clips
    from ..system.devices import resolve_device

    result = evaluate_clips(
        arguments.videos,
        arguments.real,
        arguments.fvd,
        arguments.classifier,
        arguments.clip,
        options.captions(arguments.captions),
        arguments.progress,
        resolve_device(arguments.device),
    )
    lines = ["of each file its first 16 frames, taken at about 16 a second"]
    lines += [f"{name:<28}{value:>10.4g}" for name, value in result.items()]
    return result, [*lines, *(f"{'paper, ' + name:<28}{value:>10.4g}" for name, value in GENERATION.items())]


def _vbench(arguments: argparse.Namespace) -> Printed:
    options.needs(arguments, "vbench", "captions", "out")
    from ..evaluation.vbench import run_vbench

    prompts = options.read_json("captions", arguments.captions)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ReducioError(f"--captions {arguments.captions}: must be one JSON list of prompts")
    names = arguments.dimension or ["motion_smoothness"]
    result = run_vbench(_pipeline(arguments), prompts, arguments.out, arguments.vbench, names)
    return result, [json.dumps(result, indent=2)]


def _toy(arguments: argparse.Namespace) -> Printed:
    from ..evaluation.toy_report import evaluate as score

    result = score(
        model=_pipeline(arguments),
        num_prompts=arguments.prompts or 64,
        seed=arguments.seed or 0,
        progress=arguments.progress,
        refine=arguments.refine or 0,
    )
    lines = [f"{'':<10}{'right':>8}{'share':>9}{'95% interval':>18}"]
    for name in ("colour", "motion", "shape", "all"):
        row = result[name]
        low, high = row["interval"]
        right = f"{row['right']}/{result['prompts']}"
        lines.append(f"{name:<10}{right:>8}{row['share']:>9.1%}{f'{low:.1%} to {high:.1%}':>18}")
    lines += [f"  wrong: {failure}" for failure in result["failures"]]
    lines.append(f"{'VAE':<10}{'clips':>8}{'PSNR dB':>9}{'SSIM':>8}{'gain dB over the content frame repeated':>42}")
    for name, row in result["vae"].items():
        if "skipped" in row:
            lines.append(f"{name:<10}skipped: {row['skipped']}")
        else:
            lines.append(f"{name:<10}{row['clips']:>8}{row['psnr']:>9.2f}{row['ssim']:>8.4f}{row['gain_db']:>42.2f}")
    return result, lines
