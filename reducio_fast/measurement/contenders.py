"""The workloads to measure and profile: clips of the default model, or of random networks with given conditions.

A `Contender` is one way to make the clip of a workload. Latency does not depend on weights, so random ones are enough.
With them this module needs only torch, Triton, numpy and safetensors, which a bare GPU machine has.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoints.hub import find_model
from ..checkpoints.strict_files import embedded_model
from ..compile import cache
from ..fast.launches import SEMANTIC_TOKENS
from ..media.pixels import to_bytes, to_unit
from ..reference import DIT_PRESETS, Condition, DiTConfig, ReducioDiT, ReducioVAE, VAEConfig, initial_latent, sample
from ..reference.reducio.config import GUIDANCE_SCALE, NUM_INFERENCE_STEPS
from ..system import cache_folder
from ..system.devices import resolve_dtype
from ..system.errors import ReducioError
from ..system.stage_clock import Stopwatch, Timings
from .bare_scheduler import scheduler
from .ladder import ladder
from .names import QUANTISED, WORKLOADS
from .parity import compare_networks, liven
from .quantised_decoder import balanced_steps, decode_rows, own_quantisation
from .svd_clip import SVDClip
from .tile import Contender, DecodedTile, Flops, compile_reference

PROMPT = "a red circle moving right on a black background"
STEPS, GUIDANCE = NUM_INFERENCE_STEPS, GUIDANCE_SCALE
NARROW_STEPS = 3
FPS = 16.0  # a clip of 16 frames lasts a second

# The same networks, narrow and small: a CPU runs every part of a benchmark on them in seconds.
NARROW = (
    DiTConfig(
        hidden_size=48, depth=2, num_heads=4, caption_channels=32, caption_length=12, semantic_channels=32,
        position_base_size=2,
    ),
    VAEConfig(
        base_channels=8, channel_multipliers=(1, 1, 2, 2, 2, 2), content_base_channels=8, norm_groups=4, num_heads=2,
        content_channel_multipliers=(1, 1, 2, 2), fusion_head_dim=8, num_res_blocks=1, num_frames=4, temporal_factor=2,
    ),
    32,
)  # fmt: skip


class GivenConditions:
    """Sampling and decoding with two networks and a given condition."""

    def __init__(
        self, name: str, dit: ReducioDiT, vae: ReducioVAE, cond: Condition, image: Tensor, noise: Tensor,
        scheduler: Any, steps: int = STEPS,
    ) -> None:  # fmt: skip
        from ..fast.engine import add_tuned_tables

        add_tuned_tables(noise.device)  # for the twins that are made without an engine
        self.name, self.dit, self.vae, self.steps = name, dit, vae, steps
        self.cond, self.image, self.noise, self.scheduler = cond, image, noise, scheduler
        self.pixels = max(image.shape[-2:])
        self.tiled = vae.config.needs_tiling(*image.shape[-2:])
        self.device, self.dtype = noise.device, next(dit.parameters()).dtype
        height, width = image.shape[-2:]
        self.shape = {"num_frames": vae.config.num_frames, "height": height, "width": width, "fps": FPS}
        self.what = (
            f"{name}: {vae.config.num_frames}x{height}x{width}, {steps} steps with guidance, conditions given"
            f"{', tiled' if self.tiled else ''}"
        )

    @classmethod
    def random(
        cls,
        name: str,
        dit: DiTConfig,
        vae: VAEConfig,
        pixels: int,
        dtype: torch.dtype,
        device: torch.device,
        steps: int = STEPS,
    ) -> GivenConditions:
        """Random weights, none of them all zero, and conditions of the sizes that the encoders return."""
        torch.manual_seed(0)
        with torch.device(device):
            transformer, autoencoder = ReducioDiT(dit), ReducioVAE(vae)
        for network in (transformer, autoencoder):
            liven(network.requires_grad_(False).eval())
            network.to(dtype)
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        mask = torch.zeros(1, dit.caption_length, dtype=torch.long, device=device)
        mask[:, : dit.caption_length // 3] = 1
        cond = Condition(
            normal(1, dit.caption_length, dit.caption_channels),
            mask,
            normal(1, SEMANTIC_TOKENS, dit.semantic_channels),
            normal(1, dit.content_channels, pixels // 8, pixels // 8),
        )
        image = F.avg_pool2d(normal(1, 3, pixels, pixels), 9, 1, 4).mul(4).clamp(-1, 1)  # pictures are smooth
        noise = initial_latent((1, *vae.latent_shape(pixels, pixels)), [0], device)
        return cls(name, transformer, autoencoder, cond, image, noise, scheduler(), steps)

    @classmethod
    def of_pipeline(cls, name: str, pipe: Any) -> GivenConditions:
        """The networks of a loaded pipeline with its conditions for `PROMPT`, which are computed once, here."""
        with torch.no_grad():
            out = pipe(PROMPT, num_inference_steps=1, progress=False)
            text, mask, _, _ = pipe.encode_prompt(PROMPT)
            cond = Condition(text, mask, *pipe.encode_image(out.content))
            image = to_unit(out.content, pipe.device, pipe.dtype)[None]
        shape = pipe.vae.config.latent_shape(*out.content.shape[:2])
        noise = initial_latent((1, *shape), [0], pipe.device)
        return cls(name, pipe.transformer, pipe.vae, cond, image, noise, pipe.scheduler)

    @torch.no_grad()
    def clip(self, dit: Any, vae: Any, steps: int | None = None) -> tuple[np.ndarray, Timings]:
        """Make one clip with these networks, reference or fast twins. `steps` None: those of the workload."""
        stage, reference = Stopwatch(self.device), isinstance(dit, ReducioDiT)
        with stage("dit.step"):
            run = sample if reference else _fast_sample()
            latent = run(dit.denoiser(self.cond, None, GUIDANCE), self.scheduler, self.noise, steps or self.steps)
        with stage("vae.decode"):
            features = vae.encode_content(self.image, tiled=self.tiled)
            latent = latent.to(self.dtype)
            if isinstance(vae, ReducioVAE):
                video = vae.decode(latent, features, tiled=self.tiled)[0].float()
                frames = to_bytes(video.transpose(0, 1)).cpu().numpy()
            else:
                frames = vae.decode(latent, features, tiled=self.tiled, as_uint8=True)[0].cpu().numpy()
        return frames, stage.seconds

    def contender(self, name: str) -> Contender:
        if name == "reference":
            return Contender(name, "plain PyTorch, eager", self.dtype, lambda: self.clip(self.dit, self.vae))
        if name == "compiled":
            dit, vae = copy.deepcopy(self.dit), copy.deepcopy(self.vae)
            return Contender(name, compile_reference(dit, vae, self.device), self.dtype, lambda: self.clip(dit, vae))
        from ..fast.engine import Engine

        compiled = name == "fast-compiled"
        if name == "fast-default":
            raise ReducioError(f"contender: fast-default needs the workload default or tile, is asked for {self.name}")
        engine = Engine(compiled or None, store=cache.folder("regions", _origin(self.device), cache_folder.root()))
        description, algebra, steps = (
            "fast twins, as backend='fast' builds them" + ", compiled" * compiled,
            "folded",
            None,
        )
        if name in QUANTISED:
            engine.quantisation = own_quantisation(self.vae, "fp8", min(self.pixels, 256))
            description += ", the decoder in FP8, with ranges measured on noise"
        if name.endswith("balanced"):
            algebra, steps = "folded balanced", balanced_steps(self.steps)
            description += f", {steps} steps"
        run = functools.partial(self.clip, engine.twin(self.dit), engine.twin(self.vae), steps)
        return Contender(name, description, _rate_dtype(name, self.dtype, self.device), run, algebra)

    def rungs(self) -> list[Contender]:
        """The ladder, without the rungs that change nothing on this device."""
        from ..fast.plan import Plan
        from ..fast.reducio.dit import FastReducioDiT
        from ..fast.reducio.vae import FastReducioVAE

        contenders: list[Contender] = []
        before: Any = None
        for rung in ladder():
            if rung.name == "compile" and self.device.type == "cuda":
                continue  # takes minutes for all levels of four tile shapes; `--contenders fast-compiled` has it
            if rung.contender:
                contenders.append(replace(self.contender(rung.contender), name=rung.name, what=rung.what))
                continue
            plan = Plan(self.device, self.dtype, rung.kernels)
            dit = FastReducioDiT(self.dit, plan).eval() if rung.transformer else self.dit
            vae = FastReducioVAE(self.vae, plan).eval() if rung.vae else self.vae
            build = (rung.transformer, rung.vae, [(c.path, c.implementation) for c in plan.choices])
            if build != before:
                run = functools.partial(self.clip, dit, vae)
                algebra = "folded" if rung.vae else "folded transformer" if rung.transformer else "direct"
                contenders.append(Contender(rung.name, rung.what, self.dtype, run, algebra))
            before = build
        return contenders

    def parity(self) -> list[dict[str, Any]]:
        """Compare the fast path with the oracle, on these networks at the size that `parity` uses for full width."""
        dit, vae = copy.deepcopy(self.dit).float(), copy.deepcopy(self.vae).float()
        return list(compare_networks(self.name, dit, vae, self.dtype, min(self.pixels, 256), whole=False))

    def quantised_parity(self) -> list[dict[str, Any]]:
        return list(decode_rows(self.name, copy.deepcopy(self.vae), self.dtype, min(self.pixels, 256)))

    @functools.cached_property
    def flops(self) -> dict[str, Flops]:
        """{"direct" or "folded": {stage: floating-point operations}}, two per multiply-add, counted by torch.

        Counted on the meta device, so nothing is computed. The folded count is what the fast twins execute: 12% fewer
        in the full-size decoder, because they merge up-sampling and the convolution after it. Norms are not counted.
        """
        return count(self)


class DefaultClip:
    """Whole clips of a model folder, from the prompt to the frames, by the public pipeline."""

    def __init__(self, folder: str | os.PathLike[str] | None, dtype: str | None, device: torch.device) -> None:
        self.name = "default" if folder is None else os.path.basename(os.fspath(folder).rstrip("/"))
        self.folder = embedded_model() if folder is None else find_model(folder)
        # Explicit, so that the fast path does not choose its own precision: contenders and roof have the same one.
        self.asked, self.device = resolve_dtype(dtype, None, device), device

    # Made at first use: the first clip of a fresh process (`bench.COLD`) needs one contender and nothing else.
    @functools.cached_property
    def _reference(self) -> Any:
        return self._pipe("reference")

    @functools.cached_property
    def networks(self) -> GivenConditions:
        return GivenConditions.of_pipeline(self.name, self._reference)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._reference.dtype
        return dtype

    @property
    def shape(self) -> dict[str, float]:
        return self.networks.shape | {"fps": self._reference.fps}

    @property
    def what(self) -> str:
        pipe = self._reference
        size = f"{pipe.vae.config.num_frames}x{pipe.sample_height}x{pipe.sample_width}"
        return f"{self.name}: {size} from a prompt, {STEPS} steps with guidance"

    def _pipe(self, backend: str, compile: bool | None = None, own_dtype: bool = False, **kwargs: Any) -> Any:
        from ..pipelines.reducio.pipeline import ReducioPipeline

        dtype = None if own_dtype else self.asked
        return ReducioPipeline.from_pretrained(
            self.folder, dtype=dtype, device=self.device, backend=backend, compile=compile, **kwargs
        )

    def contender(self, name: str) -> Contender:
        fast, compiled = name.startswith("fast"), name == "fast-compiled"
        own_dtype = name == "fast-default"
        quantised, balanced = {"quantise": "fp8"} if name in QUANTISED else {}, name.endswith("balanced")
        pipe = self._pipe("fast" if fast else "reference", compiled or None, own_dtype, **quantised)
        description = f"ReducioPipeline, backend='{pipe.backend}'" + ", compile=True" * compiled
        description += ", quantise='fp8'" * bool(quantised) + ", quality='balanced'" * balanced
        steps = {"quality": "balanced"} if balanced else {"num_inference_steps": STEPS}
        if name == "compiled":
            description = compile_reference(pipe.transformer, pipe.vae, self.device)

        def run() -> tuple[np.ndarray, Timings]:
            out = pipe(PROMPT, guidance_scale=GUIDANCE, progress=False, **steps)
            return out.frames, dict(out.timings)

        dtypes = {pipe.executor.network(part).dtype for part in ("transformer", "vae")} if own_dtype else {pipe.dtype}
        dtype = _rate_dtype(name, dtypes.pop(), self.device) if len(dtypes) == 1 else None
        algebra = "folded balanced" if balanced else "folded" if fast else "direct"
        return Contender(name, description, dtype, run, algebra)

    def rungs(self) -> list[Contender]:
        return self.networks.rungs()

    def parity(self) -> list[dict[str, Any]]:
        return self.networks.parity()

    def quantised_parity(self) -> list[dict[str, Any]]:
        return self.networks.quantised_parity()

    @property
    def flops(self) -> dict[str, Flops]:
        return self.networks.flops


def workload(
    name: str, model: str | os.PathLike[str] | None, dtype: str | None, device: torch.device
) -> DefaultClip | GivenConditions | DecodedTile | SVDClip:
    """Build one of `WORKLOADS`. Raises ReducioError for an unknown one, and for a full-size one on a CPU."""
    if name not in WORKLOADS:
        raise ReducioError(f"workload: {name!r} is unknown; known: {', '.join(WORKLOADS)}")
    if name == "default":
        return DefaultClip(model, dtype, device)
    if model is not None:
        raise ReducioError(f"model: {os.fspath(model)} given, but workload {name} has random weights; leave one out")
    resolved = resolve_dtype(dtype, None, device)
    if name == "tile":
        return DecodedTile(resolved, device)
    if name == "narrow":
        return GivenConditions.random("narrow", *NARROW, resolved, device, NARROW_STEPS)
    if name == "svd-narrow":
        return SVDClip(name, resolved, device)
    if device.type != "cuda":
        raise ReducioError(
            f"workload: {name} is full-size, which takes a CPU an hour and more for a clip; name a GPU, or measure "
            "'default', 'narrow', 'tile' or 'svd-narrow'"
        )
    if name in ("svd", "svd-short"):
        return SVDClip(name, resolved, device)
    return GivenConditions.random(
        f"full size {name}", DIT_PRESETS[f"reducio-{name}"], VAEConfig(), int(name), resolved, device
    )


def count(conditions: GivenConditions) -> dict[str, Flops]:
    """See `GivenConditions.flops`."""
    from ..fast.plan import Plan
    from ..fast.reducio.dit import FastReducioDiT
    from ..fast.reducio.vae import FastReducioVAE

    meta = torch.device("meta")
    with meta:
        dit = ReducioDiT(conditions.dit.config).requires_grad_(False)
        vae = ReducioVAE(conditions.vae.config).requires_grad_(False)

    def twice(x: Tensor | None) -> Any:
        """Both halves of guidance, without data."""
        if x is None:
            return None
        return x.expand(2, *x.shape[1:]).to(meta, torch.float32 if x.is_floating_point() else x.dtype)

    cond = [
        twice(x)
        for x in (conditions.cond.text, conditions.cond.text_mask, conditions.cond.semantic, conditions.cond.content)
    ]
    noise, image = conditions.noise.to(meta).float(), conditions.image.to(meta).float()
    steps = torch.empty(2, device=meta)
    plan = Plan(meta, torch.float32)
    fast_dit, fast_vae = FastReducioDiT(dit, plan), FastReducioVAE(vae, plan)
    prepared = fast_dit.prepare(*cond)
    modulation = fast_dit.modulations(steps[:1], noise.shape[2:])

    def flops_of(run: Callable[[], Any]) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return float(counter.get_total_flops())

    def decode(network: Any) -> float:
        return flops_of(
            lambda: network.decode(noise, network.encode_content(image, tiled=conditions.tiled), tiled=conditions.tiled)
        )

    both = noise.expand(2, *noise.shape[1:])
    once = flops_of(lambda: fast_dit.prepare(*cond))
    each = flops_of(lambda: fast_dit.denoise(noise, modulation, prepared))
    step, balanced = (once + steps * each for steps in (conditions.steps, balanced_steps(conditions.steps)))
    direct = {"dit.step": conditions.steps * flops_of(lambda: dit(both, steps, *cond)), "vae.decode": decode(vae)}
    return {
        "direct": direct,
        "folded transformer": direct | {"dit.step": step},
        "folded": {"dit.step": step, "vae.decode": (folded := decode(fast_vae))},
        "folded balanced": {"dit.step": balanced, "vae.decode": folded},
    }


def _rate_dtype(contender: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of most products: a rate is compared with the roof of that dtype only."""
    from ..fast.quantisation import eight_bit_type

    return eight_bit_type("fp8", device) if contender in QUANTISED else dtype


def _origin(device: torch.device) -> cache.Origin:
    from ..triton_kernels.tables import arch_of

    return cache.Origin.here(arch_of(device))


def _fast_sample() -> Callable[..., Tensor]:
    from ..fast.sampler import sample as fast_sample

    return fast_sample
