"""How far each preset of `quality` is from the solution, and its work: `python benchmarks/quality_presets.py`.

For some prompts of the toy world the content frame is drawn once. Then each preset's motion latent, in float32, is
compared with that of 500 equal steps: relative L2 distance, which is the same on every machine up to rounding. Work is
counted, not timed: evaluations of the transformer's blocks for one item, guidance halves apart.

`--clips N` makes N whole clips at each preset instead, both stages by it, and has the detector say how many show the
colour, motion and shape of their prompts.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints.strict_files import embedded_model
from reducio_fast.data.toy_detector import detect
from reducio_fast.evaluation.toy_report import held_out_scenes, tally
from reducio_fast.measurement import instruments
from reducio_fast.measurement.bench import write
from reducio_fast.pipelines.call.quality import PRESETS, STRONG_GUIDANCE

SOLUTION_STEPS = 500
CACHE = {"exact, cache 0.15": {"cache_threshold": 0.15}}
SHORTCUTS: dict[str, dict[str, Any]] = {
    "exact, guidance from 25%": {"guidance_interval": (0.25, 1.0)},
    "exact, guidance difference kept once": {"guidance_reuse": 2},
    "15 steps, lu": {"num_inference_steps": 15, "schedule": "lu"},
    "15 steps, exponential": {"num_inference_steps": 15, "schedule": "exponential"},
    **CACHE,
}


class Work:
    """Counts items that go through the transformer's blocks: one item through all blocks counts 1."""

    def __init__(self, pipe: ReducioPipeline) -> None:
        self.blocks = pipe.executor.network("transformer").transformer_blocks
        self.items = 0.0
        for block in self.blocks:
            block.register_forward_hook(self._count)

    def _count(self, module: Any, args: Any, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.items += len(out[0]) / len(self.blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="(default: the embedded one)")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--guidance-scale", type=float, default=4.5)
    parser.add_argument("--solution-steps", type=int, default=SOLUTION_STEPS)
    parser.add_argument("--clips", type=int, default=0, help="make whole clips, so many a preset")
    parser.add_argument("--out", help="a JSON row")
    arguments = parser.parse_args()
    folder = embedded_model() if arguments.model is None else arguments.model
    pipe = ReducioPipeline.from_pretrained(folder, dtype="float32", device="cpu", backend="fast")
    if arguments.clips:
        right = {name: clips(pipe, name, arguments.clips) for name in PRESETS}
        save(arguments, {"clips": arguments.clips, "right": right})
        return
    work = Work(pipe)
    ways = {name: {"quality": name} for name in PRESETS} | SHORTCUTS
    distances: dict[str, list[float]] = {name: [] for name in ways}
    items: dict[str, list[float]] = {name: [] for name in ways}
    for number, scene in enumerate(held_out_scenes(arguments.prompts)):
        prompt = scene.caption()
        frame = pipe(prompt, seed=number, num_inference_steps=1, progress=False, output_type="latent").content
        common = {"image": frame, "seed": number, "progress": False, "output_type": "latent"}
        common["guidance_scale"] = arguments.guidance_scale
        solution = pipe(prompt, num_inference_steps=arguments.solution_steps, **common).frames
        for name, options in ways.items():
            work.items = 0.0
            latent = pipe(prompt, **options, **common).frames
            distances[name].append(float((latent - solution).norm() / solution.norm()))
            items[name].append(work.items)
    rows = []
    for name in ways:
        row = {
            "way": name,
            "distance": statistics.mean(distances[name]),
            "worst": max(distances[name]),
            "items_through_blocks": statistics.mean(items[name]),
        }
        rows.append(row)
        figures = f"distance {row['distance']:.4f}, worst {row['worst']:.4f}, {row['items_through_blocks']:5.1f} passes"
        print(f"{name:<38} {figures}")
    strong = "above" if arguments.guidance_scale > STRONG_GUIDANCE else "below"
    print(f"guidance {arguments.guidance_scale:g}, {strong} {STRONG_GUIDANCE:g}; {arguments.prompts} prompts")
    settings = {n: getattr(arguments, n) for n in ("guidance_scale", "prompts", "solution_steps")}
    save(arguments, settings | {"rows": rows})


def clips(pipe: ReducioPipeline, quality: str, count: int) -> dict[str, Any]:
    """How many clips of held-out prompts the detector finds right."""
    scenes = held_out_scenes(count)
    seen = [
        detect(pipe(scene.caption(), seed=number, quality=quality, progress=False).frames)
        for number, scene in enumerate(scenes)
    ]
    found = tally(scenes, seen)
    print(f"{quality:<10} {found}")
    return found


def save(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    if arguments.out:
        write(
            {"benchmark": "quality_presets", "machine": instruments.machine(torch.device("cpu"))} | found, arguments.out
        )


if __name__ == "__main__":
    main()
