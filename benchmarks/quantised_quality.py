"""What 8-bit numbers cost in quality, held to limits: `python benchmarks/quantised_quality.py --out ROW.json`.

No GPU is needed: the fast twin computes on a CPU what the kernels do, from the same 8-bit numbers. The decoder rebuilds
held-out clips of the toy world, each from a latent and content features of the float32 encoder, in float32 and in each
format; PSNR to the clip may fall by at most 0.15 dB in the mean. One step of the transformer, its blocks' linears in
8-bit numbers, may differ from float32's by at most twice what bfloat16's does. Exit status 1 where a format that the
package offers is over its limit; the transformer's are not offered. All else of a step is in bfloat16.

`--full-size` decodes a small clip with full-width random weights instead, calibrated on another: no truth exists there,
so its figure is the PSNR to float32's result. It may be at most 24.1 dB below bfloat16's, 16 times its error: an FP8
number keeps 4 bits of a value where bfloat16 keeps 8 (`accuracy_rule`). It takes 8 GB and many minutes.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints import calibration_file
from reducio_fast.checkpoints.strict_files import embedded_model
from reducio_fast.data import toy_world
from reducio_fast.fast.plan import Plan
from reducio_fast.fast.quantisation import Quantisation
from reducio_fast.fast.reducio.vae import FastReducioVAE
from reducio_fast.measurement import instruments
from reducio_fast.measurement.accuracy_rule import EIGHT_BIT_TIMES
from reducio_fast.measurement.bench import write
from reducio_fast.measurement.parity import liven
from reducio_fast.measurement.quantised_decoder import inputs, own_quantisation
from reducio_fast.media.pixels import to_bytes, to_unit
from reducio_fast.media.similarity import pooled_psnr
from reducio_fast.reference import ReducioVAE, VAEConfig
from reducio_fast.triton_kernels.eight_bits import EIGHT_BIT, to_eight_bits

CPU = torch.device("cpu")
DECODER_LIMIT, STEP_LIMIT = 0.15, 2.0  # dB; times bfloat16's error
FULL_SIZE_LIMIT = 20 * math.log10(EIGHT_BIT_TIMES)  # dB below bfloat16's PSNR to float32
FORMATS = {"e4m3fn": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz, "int8": torch.int8}
TIMESTEPS = (950, 500, 50)
_HELD_OUT = 11  # seed of the clips


class FormatPlan(Plan):
    """A plan of any 8-bit format, whatever the machine supports."""

    eight_bit: torch.dtype

    def quantised(self, path: str) -> tuple[Tensor, torch.dtype] | None:
        found = super().quantised(path)
        return None if found is None else (found[0], self.eight_bit)


def twin(vae: ReducioVAE, largest: dict[str, Tensor], eight_bit: torch.dtype | None) -> FastReducioVAE:
    if eight_bit is None:
        return FastReducioVAE(vae, Plan(CPU, torch.float32)).eval()
    plan = FormatPlan(CPU, torch.float32, quantisation=Quantisation("fp8", largest))
    plan.eight_bit = eight_bit
    return FastReducioVAE(vae, plan).eval()


def clips(count: int, size: int, length: int) -> list[np.ndarray]:
    rng = np.random.default_rng(_HELD_OUT)
    scenes = (toy_world.sample_scene(rng, held_out=True) for _ in range(count))
    return [toy_world.render(scene, rng, size, length) for scene in scenes]


@torch.no_grad()
def decoder_rows(vae: ReducioVAE, largest: dict[str, Tensor], frames: list[np.ndarray]) -> list[dict[str, Any]]:
    """One row per format: how far its PSNR to the original clip falls below float32's."""
    ways = {"float32": twin(vae, largest, None)}
    ways |= {name: twin(vae, largest, eight_bit) for name, eight_bit in FORMATS.items()}
    bfloat16 = copy.deepcopy(vae).to(torch.bfloat16)
    ways["bfloat16"] = FastReducioVAE(bfloat16, Plan(CPU, torch.bfloat16)).eval()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for clip in frames:
        video = to_unit(clip, CPU, torch.float32).transpose(0, 1)[None]
        latent = vae.normalize_latent(ways["float32"].encode(video).mode())
        image = video[:, :, vae.config.content_frame]
        for name, network in ways.items():
            features = network.encode_content(image.to(network.dtype))
            out = to_bytes(network.decode(latent.to(network.dtype), features)[0].float().transpose(0, 1)).numpy()
            found[name].append(pooled_psnr(clip, out))
    rows = []
    for name, values in found.items():
        falls = np.array(found["float32"]) - np.array(values)
        row = {"format": name, "psnr": float(np.mean(values)), "fall": float(falls.mean()), "worst": float(falls.max())}
        rows.append(row | {"right": bool(falls.mean() <= DECODER_LIMIT)})
        print(f"decoder, {name:<9} PSNR {row['psnr']:.2f} dB, falls by {row['fall']:+.3f}, worst {row['worst']:+.3f}")
    return rows


def in_eight_bits(transformer: nn.Module, eight_bit: torch.dtype, each_token: bool) -> nn.Module:
    """A copy in which the linear layers of the blocks use 8-bit numbers: weights with one scale per output, inputs with
    one per token, or one for all. Their values are rounded to the copy's dtype, which a kernel would not do."""
    quantised, limit = copy.deepcopy(transformer), EIGHT_BIT[eight_bit]

    def rounded(x: Tensor, dims: Any) -> Tensor:
        wide = x.float()
        scale = wide.abs().amax(dims, keepdim=True).clamp(min=1e-30) / limit
        return (to_eight_bits(wide / scale, eight_bit).float() * scale).to(x.dtype)

    def pre_hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounded(args[0], -1 if each_token else tuple(range(args[0].ndim))), *args[1:])

    for module in quantised.transformer_blocks.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight.data, 1)
            module.register_forward_pre_hook(pre_hook)
    return quantised


@torch.no_grad()
def transformer_rows(pipe: Any, clip: np.ndarray) -> list[dict[str, Any]]:
    """One row per format and scaling: relative L2 distance of a step from float32's at three timesteps."""
    transformer = pipe.transformer
    video = to_unit(clip, CPU, torch.float32).transpose(0, 1)[None]
    latent = pipe.vae.normalize_latent(pipe.vae.encode(video).mode())
    text, mask, _, _ = pipe.encode_prompt("a red circle moving right on a black background")
    condition = (text, mask, *pipe.encode_image(clip[pipe.vae.config.content_frame]))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    ways: dict[str, nn.Module] = {"bfloat16": copy.deepcopy(transformer).to(torch.bfloat16)}
    for name, eight_bit in FORMATS.items():
        for scaling, each_token in ((", a scale a token", True), (", one scale", False)):
            ways[name + scaling] = in_eight_bits(ways["bfloat16"], eight_bit, each_token)
    errors: dict[str, list[float]] = {name: [] for name in ways}
    for t in TIMESTEPS:
        noisy = pipe.scheduler.add_noise(latent, noise, torch.tensor([t]))

        def step(network: Any, noisy: Tensor = noisy, t: int = t) -> Tensor:
            dtype = next(network.parameters()).dtype
            given = [x.to(dtype) if x.is_floating_point() else x for x in condition]
            return network(noisy.to(dtype), torch.tensor([float(t)]), *given).float()

        exact = step(transformer)
        for name, network in ways.items():
            errors[name].append(float((step(network) - exact).norm() / exact.norm()))
    rows = []
    for name, values in errors.items():
        times = max(a / b for a, b in zip(values, errors["bfloat16"], strict=True))
        rows.append({"format": name, "errors": values, "times_bfloat16": times, "right": times <= STEP_LIMIT})
        print(f"step, {name:<25} {' '.join(f'{x:.4f}' for x in values)}, at most {times:.1f} times bfloat16's")
    return rows


@torch.no_grad()
def full_size_rows(pixels: int) -> list[dict[str, Any]]:
    """Full width, random weights: PSNR of each format's result to float32's, relative to the range of the latter, and
    how far it is below bfloat16's."""
    torch.manual_seed(0)
    vae = ReducioVAE(VAEConfig()).eval().requires_grad_(False)
    liven(vae)

    largest = own_quantisation(vae, "fp8", pixels).largest
    z, image = inputs(vae, pixels, 2)
    exact, rows = vae.decode(z, vae.encode_content(image)), []
    makers: dict[str, Callable[[], Any]] = {
        "bfloat16": lambda: FastReducioVAE(copy.deepcopy(vae).bfloat16(), Plan(CPU, torch.bfloat16)).eval()
    }
    makers |= {n: lambda eight_bit=eight_bit: twin(vae, largest, eight_bit) for n, eight_bit in FORMATS.items()}
    for name, make in makers.items():
        network = make()
        out = network.decode(z.to(network.dtype), network.encode_content(image.to(network.dtype))).float()
        span = float(exact.max() - exact.min())
        psnr = float(20 * torch.log10(span / (out - exact).square().mean().sqrt()))
        fall = rows[0]["psnr_to_float32"] - psnr if rows else 0.0
        right = fall <= FULL_SIZE_LIMIT  # False for NaN
        rows.append({"format": name, "psnr_to_float32": psnr, "below_bfloat16": fall, "right": right})
        print(f"full size at {pixels} pixels, {name:<9} PSNR to float32 {psnr:.1f} dB, {fall:.1f} below bfloat16's")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="(default: the embedded one)")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--full-size", type=int, metavar="PIXELS", help="full width, random weights, such as 64")
    parser.add_argument("--out", help="a JSON row")
    arguments = parser.parse_args()
    row: dict[str, Any] = {"benchmark": "quantised_quality", "machine": instruments.machine(CPU)}
    if arguments.full_size:
        judged, limit = full_size_rows(arguments.full_size), FULL_SIZE_LIMIT
        row |= {"full_size": judged, "pixels": arguments.full_size, "limits": {"below_bfloat16_db": limit}}
    else:
        folder = Path(arguments.model) if arguments.model else embedded_model()
        pipe = ReducioPipeline.from_pretrained(folder, dtype="float32", device="cpu", backend="reference")
        frames = clips(arguments.clips, pipe.sample_height, pipe.vae.config.num_frames)
        judged, limit = decoder_rows(pipe.vae, calibration_file.read(folder), frames), DECODER_LIMIT
        row |= {"clips": arguments.clips, "decoder": judged, "transformer": transformer_rows(pipe, frames[0])}
        row |= {"limits": {"decoder_db": DECODER_LIMIT, "step_times_bfloat16": STEP_LIMIT}}
    if arguments.out:
        write(row, arguments.out)
    if over := [found["format"] for found in judged if not found["right"]]:
        sys.exit(f"over the limit of {limit:.4g} dB: {', '.join(over)}")


if __name__ == "__main__":
    main()
