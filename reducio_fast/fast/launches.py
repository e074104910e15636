"""Every kernel launch of a clip, for a GPU that is not here: the networks run on tensors that have no data.

What `compile-check` builds is compared with this, and what a first clip would compile one by one is compiled from it by
many processes (`compile.precompile`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..compile.precompile import Call, precompile
from ..reference import DIT_PRESETS, VAE_PRESETS, DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from ..reference.reducio.image_vae import ImageVAE, ImageVAEConfig
from ..reference.svd.config import TemporalVAEConfig, VideoUNetConfig
from ..reference.svd.unet import VideoUNet
from ..reference.svd.vae import TemporalVAE
from ..triton_kernels.launch import Launch, recording
from .quantisation import Quantisation

_Network = TypeVar("_Network", bound=nn.Module)

SEMANTIC_TOKENS = 256  # of OpenCLIP ViT-H at 224 pixels


class _Answer(TorchDispatchMode):
    """What a tensor without data says where it is asked."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answer
        return func(*args, **(kwargs or {}))


def keys_of(pixels: int) -> int:
    """How many keys cross-attention has at this size: those of the caption, of the picture's sense and of its content.

    Of the published preset for `pixels`, 256, 512 or 1024."""
    config = DIT_PRESETS[f"reducio-{pixels}"]
    cell = 8 * config.content_patch_size * config.content_stride
    return config.caption_length + SEMANTIC_TOKENS + (pixels // cell) ** 2


def clip_launches(
    arch: str,
    dit_config: DiTConfig = DIT_PRESETS["reducio-1024"],
    vae_config: VAEConfig = VAE_PRESETS["reducio-ft4"],
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "auto",
    quantisation: Quantisation | None = None,
    pixels: int = 256,
) -> list[Launch]:
    """What a clip of these networks launches on `arch`, in order, graphs aside: of the first blocks of the transformer,
    whose others are like them, and of one tile. No kernel is built for a size, so those of a small clip serve all."""
    from ..triton_kernels.guidance_dpm_step import guidance_dpm_step
    from .plan import Plan
    from .reducio.dit import FastReducioDiT
    from .reducio.vae import FastReducioVAE

    device = torch.device("cuda", 0)
    dit_config = dataclasses.replace(dit_config, depth=dit_config.content_groups + 1)

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, device=device, dtype=kind)

    with recording(arch) as launches, FakeTensorMode(), torch.no_grad():
        plan = Plan(device, dtype, attention=attention)
        if quantisation is not None:
            largest = {path: empty(len(x), kind=torch.float32) for path, x in quantisation.largest.items()}
            plan.quantisation = Quantisation(quantisation.word, largest)
        with device, _Answer(False):  # no weight is drawn again for lying too far out
            vae = FastReducioVAE(_cast(ReducioVAE(vae_config), dtype), plan)
            dit = FastReducioDiT(_cast(ReducioDiT(dit_config), dtype), plan)
        latent = empty(1, *vae_config.latent_shape(pixels, pixels), kind=torch.float32)
        with _Answer(True):  # every value is finite
            vae.decode(latent.to(dtype), vae.encode_content(empty(1, 3, pixels, pixels)), as_uint8=True)
        prepared = dit.prepare(
            empty(2, dit_config.caption_length, dit_config.caption_channels),
            torch.empty(2, dit_config.caption_length, device=device, dtype=torch.long),
            empty(2, SEMANTIC_TOKENS, dit_config.semantic_channels),
            empty(2, dit_config.content_channels, pixels // 8, pixels // 8),
        )
        prediction = dit.denoise(latent, dit.modulations(empty(1, kind=torch.float32), latent.shape[2:]), prepared)
        guidance_dpm_step(prediction.contiguous(), latent, torch.zeros_like(latent), empty(6, kind=torch.float32))
    return launches


def svd_launches(arch: str, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """What one step and one decode of Stable Video Diffusion launch, at its published widths, and the decode of a still
    by an image autoencoder of the same."""
    from ..triton_kernels.guidance_dpm_step import guidance_dpm_step
    from .plan import Plan
    from .reducio.image_vae import FastImageVAE
    from .svd.unet import FastVideoUNet, StepInputs
    from .svd.vae import FastTemporalVAE

    device, frames, side = torch.device("cuda", 0), 2, 16
    config = VideoUNetConfig()

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, device=device, dtype=kind)

    with recording(arch) as launches, FakeTensorMode(), torch.no_grad():
        plan = Plan(device, dtype)
        with device, _Answer(False):
            unet = FastVideoUNet(_cast(VideoUNet(config), dtype), plan)
            vae = FastTemporalVAE(_cast(TemporalVAE(TemporalVAEConfig()), dtype), plan)
            image_vae = FastImageVAE(_cast(ImageVAE(ImageVAEConfig()), dtype), plan)
        image = empty(2, frames, side, side, config.in_channels - config.out_channels)
        conditions = unet.conditions(image, empty(2, 1, config.per_level("cross_attention_dim")[0]), empty(2, 3))
        inputs = StepInputs([empty(size) for size in unet.row_sizes], conditions)
        prediction = unet.denoise(empty(1, frames, config.out_channels, side, side), inputs)
        latent = empty(1, frames, config.out_channels, side, side, kind=torch.float32)
        row = empty(frames + 5, kind=torch.float32)
        guidance_dpm_step(prediction.contiguous(), latent, torch.zeros_like(latent), row)
        vae.decode(empty(1, frames, 4, side, side))
        image_vae.decode(empty(1, 4, side, side))
    return launches


def _cast(network: _Network, dtype: torch.dtype) -> _Network:
    """`network.to(dtype)`, which cannot cast tensors without data in place."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return network


def launches_of(
    arch: str, denoiser: nn.Module, decoder: nn.Module, attention: str, quantisation: Quantisation | None
) -> list[Launch]:
    """What a clip of a loaded model launches on `arch`, as in `clip_launches`; of a family other than Reducio []."""
    if type(denoiser) is not ReducioDiT or type(decoder) is not ReducioVAE:
        return []
    dtype = next(denoiser.parameters()).dtype
    return clip_launches(arch, denoiser.config, decoder.config, dtype, attention, quantisation)


def precompile_launches(
    device: torch.device, launches: Iterable[Launch], jobs: int | None = None, check: Callable[[], None] = lambda: None
) -> tuple[int, list[str]]:
    """Compile the kernels of `launches` for this GPU: (kernels, one line for each that failed). jobs, check: as in
    `precompile`."""
    from triton.runtime import driver

    calls = calls_of(launches)
    with torch.cuda.device(device):
        target = driver.active.get_current_target()
    return len(calls), precompile(calls, target, jobs, check)


def calls_of(launches: Iterable[Launch]) -> list[Call]:
    """Each build that these launches need, once: tensors become their types, numbers what Triton builds apart."""
    calls: dict[Call, None] = {}
    for launch in launches:
        parameters = {parameter.name: parameter for parameter in launch.kernel.params}
        arguments = tuple(
            (name, _kind(value, parameters.get(name))) for name, value in sorted(launch.arguments.items())
        )
        function = launch.kernel.fn
        calls[Call(function.__module__, function.__qualname__, arguments)] = None
    return list(calls)


def _kind(value: Any, parameter: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype
    if parameter is None or parameter.is_constexpr or value is None:  # no parameter: an option of the compiler
        return value
    if isinstance(value, float):
        return 0.5
    if parameter.do_not_specialize or value == 1 or value >= 2**31:
        return 2 if parameter.do_not_specialize and value < 2**31 else value
    return 16 if value % 16 == 0 else 3
