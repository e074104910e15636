"""Score a model on held-out prompts and clips."""

from __future__ import annotations

import argparse

from . import options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="model folder (default: the embedded toy model)")
    parser.add_argument("--prompts", type=options.positive, default=64, help="held-out prompts to draw (default: 64)")
    parser.add_argument("--seed", type=options.not_negative, default=0)
    options.add_progress(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..evaluation.toy_report import evaluate as score

    result = score(
        model=arguments.model, num_prompts=arguments.prompts, seed=arguments.seed, progress=arguments.progress
    )
    lines = [f"{'':<10}{'right':>8}{'share':>9}{'95% interval':>18}"]
    for name in ("colour", "motion", "shape", "all"):
        row = result[name]
        low, high = row["interval"]
        right = f"{row['right']}/{arguments.prompts}"
        lines.append(f"{name:<10}{right:>8}{row['share']:>9.1%}{f'{low:.1%} to {high:.1%}':>18}")
    lines += [f"  wrong: {failure}" for failure in result["failures"]]
    lines.append(f"{'VAE':<10}{'clips':>8}{'PSNR dB':>9}{'SSIM':>8}{'gain dB over the content frame repeated':>42}")
    for name, row in result["vae"].items():
        if "skipped" in row:
            lines.append(f"{name:<10}skipped: {row['skipped']}")
        else:
            lines.append(f"{name:<10}{row['clips']:>8}{row['psnr']:>9.2f}{row['ssim']:>8.4f}{row['gain_db']:>42.2f}")
    return result, lines
