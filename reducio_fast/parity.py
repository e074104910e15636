"""`reducio-fast parity`: the fast path against the reference on this machine, by the rule of `numerics`.

Every stage gets the same inputs three times: the reference in float32 (the oracle; float64 where the fast path runs in
float32), the reference at the fast path's precision (eager), and the fast path. Importable with torch, Triton, numpy
and safetensors alone, so that a bare GPU machine can run it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .checkpoints import embedded_model, find_model, load_model
from .errors import ReducioError
from .inputs import resolve_device, resolve_dtype, triton_missing
from .numerics import judge
from .reference import Condition, DiTConfig, ReducioDiT, ReducioVAE, VAEConfig, initial_latent, sample
from .schedules import scheduler

Row = dict[str, Any]
# A full-width tile and clip of the smallest size there is: the widths are what the kernels are specialised for.
FULL_SIZE_PIXELS = 256


def compare(
    model: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    full_size: bool | None = None,
) -> list[Row]:
    """One row a stage: `what`, `error` and `eager` (relative, against the oracle), `limit`, `right`.

    The model is the embedded one unless a folder is named. `full_size` adds the full-width networks with random
    weights (8 GB of memory); None does so on a GPU only. Raises ReducioError where the fast path cannot run.
    """
    if missing := triton_missing():
        raise ReducioError(f"parity: {missing}")
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, None, device)
    folder = embedded_model() if model is None else find_model(model)
    vae = load_model(ReducioVAE, VAEConfig, folder / "vae", torch.float32, device)
    dit = load_model(ReducioDiT, DiTConfig, folder / "transformer", torch.float32, device)
    name = "default" if model is None else folder.name
    rows = list(compare_networks(name, dit, vae, dtype, 128 if model is None else FULL_SIZE_PIXELS, whole=True))
    if full_size if full_size is not None else device.type == "cuda":
        del vae, dit
        with torch.device(device):
            torch.manual_seed(0)
            full = ReducioDiT(DiTConfig()), ReducioVAE(VAEConfig())
        for network in full:
            liven(network)
        rows += compare_networks("full size", *full, dtype, FULL_SIZE_PIXELS, whole=False)
    return rows


def lines(rows: list[Row]) -> list[str]:
    head = f"{'':<36}{'error':>10}{'eager':>10}{'limit':>10}"
    body = [f"{r['what']:<36}{r['error']:>10.2e}{r['eager']:>10.2e}{r['limit']:>10.2e}" for r in rows]
    return [head, *(line + ("" if r["right"] else "  WRONG") for line, r in zip(body, rows, strict=True))]


@torch.no_grad()
def compare_networks(
    name: str, dit: ReducioDiT, vae: ReducioVAE, dtype: torch.dtype, pixels: int, whole: bool
) -> Iterator[Row]:
    """The rows of two float32 networks; in float32 both become float64, which is then their oracle."""
    from .fast.dit import FastReducioDiT
    from .fast.plan import Plan
    from .fast.sampler import sample as fast_sample
    from .fast.vae import FastReducioVAE

    device = next(vae.parameters()).device
    low_dit, low_vae = copy.deepcopy(dit).to(dtype).eval(), copy.deepcopy(vae).to(dtype).eval()
    if dtype == torch.float32:  # else eager would be its own oracle
        dit, vae = dit.double(), vae.double()
    wide = vae.post_quant_conv.weight.dtype
    plan = Plan(device, dtype)
    fast_dit, fast_vae = FastReducioDiT(low_dit, plan).eval(), FastReducioVAE(low_vae, plan).eval()

    vaes: list[tuple[Any, torch.dtype]] = [(fast_vae, dtype), (low_vae, dtype), (vae, wide)]

    def row(what: str, fast: Tensor, eager: Tensor, oracle: Tensor) -> Row:
        verdict = judge(fast.to(eager.dtype), eager, oracle)
        return {
            "what": f"{name}: {what}", "dtype": str(dtype).removeprefix("torch."), "device": str(device),
            "error": verdict.fast, "eager": verdict.eager, "limit": verdict.limit, "right": verdict.right,
        }  # fmt: skip

    config, generator = vae.config, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    video = random(1, 3, config.num_frames, pixels, pixels).mul(0.5).clamp(-1, 1)
    video = torch.nn.functional.avg_pool3d(video, 3, 1, 1)  # pictures are smooth, noise is not
    image = video[:, :, config.content_frame]
    moments = [n.encode(video.to(kind)) for n, kind in vaes]
    yield row("vae.encode", *(m.mean for m in moments))
    latent = vae.normalize_latent(moments[2].mean).float()
    decoded = [n.decode(latent.to(kind), n.encode_content(image.to(kind))) for n, kind in vaes]
    yield row("vae.decode", *decoded)

    d = dit.config
    cell = d.content_patch_size * d.content_stride
    side = max(pixels // 8 // cell, 1) * cell
    mask = torch.ones(1, d.caption_length, dtype=torch.long, device=device)
    mask[:, d.caption_length // 3 :] = 0
    cond = Condition(
        random(1, d.caption_length, d.caption_channels), mask, random(1, 16, d.semantic_channels),
        random(1, d.content_channels, side, side),
    )  # fmt: skip
    noise = initial_latent((1, *latent.shape[1:]), [0], device)
    timestep = torch.tensor([500.0], device=device)
    arguments = (timestep, cond.text, cond.text_mask, cond.semantic, cond.content)
    channels = d.latent_channels
    yield row("dit.step", *(n(noise, *arguments)[:, :channels] for n in (fast_dit, low_dit, dit)))
    if whole:
        run: list[tuple[Callable[..., Tensor], Any]] = [(fast_sample, fast_dit), (sample, low_dit), (sample, dit)]
        latents = [function(n, scheduler(), noise.to(wide if n is dit else noise.dtype), cond) for function, n in run]
        yield row("20 steps with guidance", *latents)
        clips = [
            n.decode(z.to(kind), n.encode_content(image.to(kind)))
            for (n, kind), z in zip(vaes, latents, strict=True)
        ]
        yield row("end to end", *clips)


@torch.no_grad()
def liven(network: torch.nn.Module) -> None:
    """Random weights where a fresh network has zeros: a silent branch would compare as equal whatever it computes."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
