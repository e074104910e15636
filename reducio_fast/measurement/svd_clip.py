"""The workloads "svd", "svd-short" and "svd-narrow": one clip of Stable Video Diffusion with random weights.

Latency does not depend on weights. "svd" is the published size, 25 frames of 576x1024; "svd-short" is the same with two
steps, for the ladder; "svd-narrow" has a U-Net of 69 million weights and 6 frames of 128x128, which two cores of a CPU
sample in seconds. The baseline, eager or compiled, is diffusers' own classes on the same weights, or our reference if
diffusers is not installed: the row says which.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fast.engine import Engine, add_tuned_tables
from ..fast.plan import Plan
from ..fast.sampler import advance
from ..fast.sampler import sample as fast_sample
from ..fast.svd.unet import FastVideoDenoiser, FastVideoUNet, StepInputs
from ..fast.svd.vae import FastTemporalVAE
from ..media.pixels import to_bytes
from ..reference import initial_latent, sample
from ..reference.svd.config import MAX_GUIDANCE_SCALE, MIN_GUIDANCE_SCALE, TemporalVAEConfig, VideoUNetConfig
from ..reference.svd.sampler import ImageCondition, denoiser
from ..reference.svd.unet import VideoUNet
from ..reference.svd.vae import TemporalVAE
from ..system.stage_clock import Stopwatch, Timings
from .accuracy_rule import judge
from .bare_scheduler import EulerScheduler
from .tile import Contender, Flops
from .work import Work, WorkCounter, count

TIME_IDS = (6.0, 127.0, 0.02)  # fps - 1, motion bucket, noise augmentation
FULL = (VideoUNetConfig(), TemporalVAEConfig(), 576, 1024, 25)
SHORT = (*FULL[:-1], 2)
NARROW = (
    VideoUNetConfig(block_out_channels=(64, 128, 256, 256), num_attention_heads=(1, 2, 4, 4), num_frames=6),
    TemporalVAEConfig(block_out_channels=(32, 64, 64, 64)),
    128,
    128,
    4,
)
KERNELS = (
    ("group_norm_silu", "GroupNorm + SiLU kernel, statistics apart"),
    ("attention", "our flash attention over the positions of a frame"),
    ("temporal_conv", "three shifted products, or the last of a transformer, bias and residual in one kernel"),
    ("geglu_linear", "value, gate and gelu in one kernel"),
    ("frame_attention", "attention over frames where they lie"),
    ("stream_layer_norm", "rows, residual and blend inside the norms"),
    ("upsample_conv3d", "up-sampling and the convolution after it in one kernel"),
    ("conv3d", "convolutions that add a residual, in our kernel"),
    ("guidance_dpm_step", "guidance per frame and the scheduler's step in one kernel"),
)


@dataclass(frozen=True, slots=True)
class _DiffusersUNet:
    """diffusers' U-Net with the methods of the reference's."""

    network: Any

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs, return_dict=False)[0]

    def denoiser(self, *arguments: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return denoiser(self, *arguments)


@dataclass(frozen=True, slots=True)
class _DiffusersVAE:
    """diffusers' autoencoder with the decoding of the reference's."""

    network: Any

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def decode(self, latents: Tensor) -> Tensor:
        frames = self.network.decode(latents.flatten(0, 1), num_frames=latents.shape[1], return_dict=False)[0]
        return frames.unflatten(0, latents.shape[:2])


def _of_diffusers(unet: VideoUNet, vae: TemporalVAE) -> tuple[Any, Any] | None:
    """diffusers' networks, which share the weights of these; None where diffusers is not installed."""
    try:
        from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    except ImportError:
        return None
    theirs = []
    for network_class, ours in ((UNetSpatioTemporalConditionModel, unet), (AutoencoderKLTemporalDecoder, vae)):
        known = inspect.signature(network_class).parameters
        with torch.device("meta"):
            network = network_class(**{k: v for k, v in ours.config.to_dict().items() if k in known})
        network.load_state_dict(ours.state_dict(), assign=True)
        theirs.append(network.eval().requires_grad_(False))
    return _DiffusersUNet(theirs[0]), _DiffusersVAE(theirs[1])


class SVDClip:
    """See the module. `unet` and `vae` are the reference's."""

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device) -> None:
        add_tuned_tables(device)  # for the twins that are made without an engine
        unet, vae, height, width, self.steps = {"svd": FULL, "svd-short": SHORT, "svd-narrow": NARROW}[name]
        self.name, self.dtype, self.device = name, dtype, device
        torch.manual_seed(0)
        with torch.device(device):
            self.unet = VideoUNet(unet).to(dtype).eval().requires_grad_(False)
            self.vae = TemporalVAE(vae).to(dtype).eval().requires_grad_(False)
        frames, latent = unet.num_frames, (vae.latent_channels, height // 8, width // 8)
        draw = torch.Generator().manual_seed(0)
        embeds = torch.randn(1, 1, unet.per_level("cross_attention_dim")[0], generator=draw)
        tensors = embeds, torch.randn(1, *latent, generator=draw), torch.tensor([TIME_IDS])
        self.cond = ImageCondition(*(x.to(device, dtype) for x in tensors))
        self.noise = initial_latent((1, frames, *latent), [0], device)
        self.scale = torch.linspace(MIN_GUIDANCE_SCALE, MAX_GUIDANCE_SCALE, frames)
        self.shape = {"num_frames": frames, "height": height, "width": width, "fps": 7.0}
        self.what = f"{name}: {frames}x{height}x{width}, {self.steps} steps with guidance, random weights"

    @torch.no_grad()
    def clip(self, unet: Any, vae: Any) -> tuple[np.ndarray, Timings]:
        """One clip by these networks, of either kind."""
        stage, run = Stopwatch(self.device), fast_sample if isinstance(unet, FastVideoUNet) else sample
        with stage("dit.step"):
            latent = run(unet.denoiser(self.cond, None, self.scale), EulerScheduler(), self.noise, self.steps)
        with stage("vae.decode"):
            video = vae.decode((latent / self.vae.config.scaling_factor).to(vae.dtype))[0].float()
            frames = to_bytes(video.clamp(-1, 1)).cpu().numpy()
        return frames, stage.seconds

    def contender(self, name: str) -> Contender:
        if name in ("reference", "compiled"):
            theirs = _of_diffusers(self.unet, self.vae)
            whose = "our reference (diffusers is not installed)" if theirs is None else "diffusers' classes"
            ours: tuple[Any, Any] = self.unet, self.vae
            unet, vae = theirs or ours
            way = "eager"
            if name == "compiled":
                mode = "max-autotune-no-cudagraphs" if self.device.type == "cuda" else "default"
                way = f"torch.compile {mode}"
                if theirs is None:
                    unet, vae = copy.deepcopy(ours)
                for part in (unet, vae.decoder) if theirs is None else (unet.network, vae.network.decoder):
                    part.compile(mode=mode, dynamic=False)
            return Contender(name, f"{whose}, {way}", self.dtype, functools.partial(self.clip, unet, vae))
        engine = Engine(True if name == "fast-compiled" else None)
        engine.free_dtype = name == "fast-default"
        unet, vae = engine.twin(self.unet), engine.twin(self.vae)
        dtype = unet.dtype if unet.dtype == vae.dtype else None
        return Contender(name, "fast twins", dtype, functools.partial(self.clip, unet, vae), "folded")

    def rungs(self) -> list[Contender]:
        """The ladder, without the rungs that change nothing on this device."""
        rungs = [self.contender("reference")]

        def add(name: str, what: str, kernels: frozenset[str], decodes: bool = True) -> None:
            plan = Plan(self.device, self.dtype, kernels)
            unet, vae = FastVideoUNet(self.unet, plan), FastTemporalVAE(self.vae, plan) if decodes else self.vae
            algebra = "folded" if decodes else "folded unet"
            rungs.append(Contender(name, what, self.dtype, functools.partial(self.clip, unet, vae), algebra))

        add("unet", "fast U-Net on torch ops: channels-last, constants for cross-attention, folded blends and "
            "up-sampling, one table of embeddings", frozenset(), decodes=False)  # fmt: skip
        add("decoder", "fast decoder on torch ops: all frames together, one at a time", frozenset())
        kernels: frozenset[str] = frozenset()
        for name, what in KERNELS if self.device.type == "cuda" else ():
            kernels |= {name}
            add(name, what, kernels)
        return rungs

    def parity(self) -> list[dict[str, Any]]:
        """The twins against the reference on a small clip, oracle in float64 or float32."""
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        noise = self.noise[:, :3, :, :8, :8]
        cond = ImageCondition(self.cond.embeds, self.cond.latents[..., :8, :8], self.cond.added_time_ids)
        rows = []
        for what, network, run in (
            ("unet", self.unet, lambda n, t: n.denoiser(cond.to(self.device, t), None, 1.0)),
            ("vae.decode", self.vae, None),
        ):

            @torch.no_grad()
            def result(n: Any, dtype: torch.dtype, run: Any = run) -> Tensor:
                if run is None:
                    return n.decode(noise.to(dtype))
                step = fast_sample if isinstance(n, FastVideoUNet) else sample
                return step(run(n, dtype), EulerScheduler(), noise.to(dtype), 2)

            fast, eager = result(Engine(False).twin(network), self.dtype), result(network, self.dtype)
            verdict = judge(fast, eager, result(copy.deepcopy(network).to(wide), wide))
            rows.append(verdict.row(f"{self.name}: {what}", self.dtype, self.device))
        return rows

    @functools.cached_property
    def flops(self) -> dict[str, Flops]:
        """{"direct" or "folded": {stage: floating-point operations}}."""
        work = svd_work(self.unet.config, self.vae.config, self.noise.shape[1], *self.noise.shape[-2:])
        steps = {"direct": work["unet"], "folded": work["fast unet"]}
        decodes = {"direct": work["decoder"], "folded": work["fast decoder"]}
        counted = {
            algebra: {"dit.step": self.steps * steps[algebra].flops, "vae.decode": decodes[algebra].flops}
            for algebra in steps
        }
        return counted | {"folded unet": counted["direct"] | {"dit.step": counted["folded"]["dit.step"]}}


def svd_work(
    unet: VideoUNetConfig, vae: TemporalVAEConfig, frames: int, height: int, width: int, dtype: Any = torch.float16
) -> dict[str, Work]:
    """What one guided step and one decode take, by the reference and by its fast twin as a GPU runs it: "unet", "fast
    unet", "decoder", "fast decoder". The reference's step is the U-Net alone; that of the twin is the sampler's whole
    step from a float32 latent: scaling, U-Net, guidance per frame and Euler. height, width: of the latent."""

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    def network(counter: WorkCounter, network_class: Any, config: Any, fast: bool) -> Any:
        with torch.device("meta"):
            plain = network_class(config).to(dtype).eval()
        engine = Engine(False).without_weights(counter.opaque, torch.device("cuda"))
        built = engine.twin(plain) if fast else plain
        counter.given(plain, built)
        return built

    def plain_step(counter: WorkCounter) -> Callable[[], Any]:
        net = network(counter, VideoUNet, unet, False)
        sample = empty(2, frames, unet.in_channels, height, width)
        inputs = empty(2, 1, unet.per_level("cross_attention_dim")[0]), empty(2, len(TIME_IDS))
        return lambda: net(sample, empty(), *inputs)

    def fast_step(counter: WorkCounter) -> Callable[[], Any]:
        net = network(counter, VideoUNet, unet, True)
        image = empty(2, frames, height, width, unet.in_channels - unet.out_channels)
        token = empty(2, 1, unet.per_level("cross_attention_dim")[0])
        conditions = net.conditions(image, token, empty(2, len(TIME_IDS)))
        inputs = StepInputs([empty(size) for size in net.row_sizes], conditions)
        wide = functools.partial(empty, kind=torch.float32)
        latent, previous = (wide(1, frames, unet.out_channels, height, width) for _ in range(2))
        row, scale = wide(frames + 5), wide()
        return lambda: advance(FastVideoDenoiser(net), None, latent, previous, inputs, row, scale)

    def decode(counter: WorkCounter, fast: bool) -> Callable[[], Any]:
        net = network(counter, TemporalVAE, vae, fast)
        latent = empty(1, frames, vae.latent_channels, height, width)
        return lambda: net.decode(latent)

    return {
        "unet": count(plain_step),
        "fast unet": count(fast_step),
        "decoder": count(functools.partial(decode, fast=False)),
        "fast decoder": count(functools.partial(decode, fast=True)),
    }
