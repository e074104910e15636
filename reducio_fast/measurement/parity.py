"""`reducio-fast parity`: the fast path against the reference on this machine, by the rule of `accuracy_rule`.

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

from ..checkpoints.hub import find_model
from ..checkpoints.networks import load_model
from ..checkpoints.strict_files import embedded_model
from ..reference import Condition, DiTConfig, ReducioDiT, ReducioVAE, VAEConfig, initial_latent, sample
from ..reference.reducio.config import GUIDANCE_SCALE, NUM_INFERENCE_STEPS
from ..system.devices import resolve_device, resolve_dtype, triton_missing
from ..system.errors import ReducioError
from .accuracy_rule import judge
from .bare_scheduler import scheduler
from .quantised_decoder import decode_rows

Row = dict[str, Any]
# Side of a full-width clip: one tile on a GPU. On a CPU, where a tile takes an hour, the smallest side with more than
# one cell.
GPU_PIXELS, CPU_PIXELS = 256, 64


def compare(
    model: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    full_size: bool | None = None,
    flush: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """One row per stage: `what`, `dtype`, `error` and `eager` (relative, against the oracle), `limit`, `right`.

    The model is the embedded one unless a folder is named; `dtype` None is what the fast path takes by default here.
    `full_size` adds the full-width networks with random weights, one after the other (7 GB of memory in bfloat16), and
    a decode in each 8-bit type that the device offers; None does so on a GPU only. `flush` gets the rows so far after
    each row. Raises ReducioError if the fast path cannot run.
    """
    if missing := triton_missing():
        raise ReducioError(f"parity: {missing}")
    from ..fast.plan import default_dtype

    device = resolve_device(device)
    use_default, dtype = dtype is None, resolve_dtype(dtype, None, device)
    folder = embedded_model() if model is None else find_model(model)
    vae = load_model(ReducioVAE, VAEConfig, folder / "vae", torch.float32, device)
    dit = load_model(ReducioDiT, DiTConfig, folder / "transformer", torch.float32, device)
    dtype = default_dtype(device, dtype, dit)[0] if use_default else dtype
    pixels = GPU_PIXELS if device.type == "cuda" else CPU_PIXELS
    name, default_pixels = ("default", 128) if model is None else (folder.name, pixels)
    rows: list[Row] = []

    def gather(new_rows: Iterator[Row]) -> None:
        for row in new_rows:
            rows.append(row)
            flush(rows)

    gather(compare_networks(name, dit, vae, dtype, default_pixels, whole=True))
    if full_size if full_size is not None else device.type == "cuda":
        del vae, dit
        for network_class in (ReducioVAE, ReducioDiT):
            pair = _full_size(network_class, device)
            gather(compare_networks("full size", *pair, dtype, pixels, whole=False))
            if pair[1] is not None:
                gather(decode_rows("full size", pair[1], dtype, pixels))
            del pair  # before the next one is made
    return rows


@torch.no_grad()
def compare_networks(
    name: str, dit: ReducioDiT | None, vae: ReducioVAE | None, dtype: torch.dtype, pixels: int, whole: bool
) -> Iterator[Row]:
    """The rows of float32 networks, either of which may be None. `whole` adds sampling, and sampling with decoding. If
    `dtype` is float32, the networks are converted to float64 as the oracle."""
    from ..fast.plan import Plan
    from ..fast.reducio.dit import FastReducioDiT
    from ..fast.reducio.vae import FastReducioVAE
    from ..fast.sampler import sample as fast_sample

    networks: list[Any] = [network for network in (vae, dit) if network is not None]
    device = next(networks[0].parameters()).device
    wide = torch.float64 if dtype == torch.float32 else torch.float32  # else eager would be its own oracle
    generator = torch.Generator().manual_seed(0)

    def three(network: Any, twin: Any) -> list[tuple[Any, torch.dtype]]:
        """Fast, eager and oracle, each with its dtype."""
        low = copy.deepcopy(network).to(dtype).eval()
        return [(twin(low, Plan(device, dtype)).eval(), dtype), (low, dtype), (network.to(wide).eval(), wide)]

    def row(comparison: str, fast: Tensor, eager: Tensor, oracle: Tensor) -> Row:
        return judge(fast.to(eager.dtype), eager, oracle).row(f"{name}: {comparison}", dtype, device)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def decode(latents: list[Tensor]) -> list[Tensor]:
        return [
            n.decode(z.to(network_dtype), n.encode_content(image.to(network_dtype)))
            for (n, network_dtype), z in zip(vaes, latents, strict=True)
        ]

    if vae is not None:
        vaes = three(vae, FastReducioVAE)
        video = random(1, 3, vae.config.num_frames, pixels, pixels).mul(0.5).clamp(-1, 1)
        video = torch.nn.functional.avg_pool3d(video, 3, 1, 1)  # pictures are smooth, noise is not
        image = video[:, :, vae.config.content_frame]
        moments = [n.encode(video.to(network_dtype)).mean for n, network_dtype in vaes]
        yield row("vae.encode", *moments)
        yield row("vae.decode", *decode([vae.normalize_latent(moments[-1]).float()] * 3))
    if dit is None:
        return

    dits = three(dit, FastReducioDiT)
    d = dit.config
    cell = d.content_patch_size * d.content_stride
    side = max(pixels // 8 // cell, 1) * cell
    mask = torch.ones(1, d.caption_length, dtype=torch.long, device=device)
    mask[:, d.caption_length // 3 :] = 0
    cond = Condition(
        random(1, d.caption_length, d.caption_channels),
        mask,
        random(1, 16, d.semantic_channels),
        random(1, d.content_channels, side, side),
    )
    clip, side = VAEConfig() if vae is None else vae.config, pixels // d.spatial_factor
    steps = clip.num_frames // clip.temporal_factor
    noise = initial_latent((1, d.latent_channels, steps, side, side), [0], device)
    arguments = (torch.tensor([500.0], device=device), cond.text, cond.text_mask, cond.semantic, cond.content)
    yield row("dit.step", *(n(noise, *arguments)[:, : d.latent_channels] for n, _ in dits))
    if vae is None or not whole:
        return
    loops: list[Callable[..., Tensor]] = [fast_sample, sample, sample]
    dtypes = (noise.dtype, noise.dtype, wide)  # of the latent between steps
    latents = [
        loop(n.denoiser(cond, None, GUIDANCE_SCALE), scheduler(), noise.to(dtype), NUM_INFERENCE_STEPS)
        for loop, (n, _), dtype in zip(loops, dits, dtypes, strict=True)
    ]
    yield row("20 steps with guidance", *latents)
    yield row("end to end", *decode(latents))


def _full_size(network_class: type, device: torch.device) -> tuple[ReducioDiT | None, ReducioVAE | None]:
    """(transformer, autoencoder): the full-width network of that class, and None for the other."""
    torch.manual_seed(0)
    with torch.device(device):
        pair = (None, ReducioVAE(VAEConfig())) if network_class is ReducioVAE else (ReducioDiT(DiTConfig()), None)
    for network in pair:
        if network is not None:
            liven(network)
    return pair


@torch.no_grad()
def liven(network: torch.nn.Module) -> None:
    """Make weights random that are zero in a fresh network: a zero branch compares as equal whatever it computes."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
