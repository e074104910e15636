"""What a clip will need, stage by stage, before its first step; and how to decode it so that the device can hold it.

The forecast is a dry run of the pipeline's own stages on tensors without contents (`compile.memory`), for whatever runs
them: the reference, or the fast twins. On a GPU a kernel of ours counts as what it returns. Forecasts count tensors: an
allocator's rounding and a vendor library's workspaces come on top, which is why only HEADROOM of what is free is used.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...memory.dry_run import META, DryRun, free_bytes, weight_bytes, without_weights
from ...reference import Condition, ReducioVAE, VAEConfig, initial_latent
from ...system.errors import ReducioError
from ..call import request, validation
from . import content_frame

if TYPE_CHECKING:
    from ..execution.executor import Stages


LOG = logging.getLogger("reducio_fast")
STAGES = ("content.generate", "text.encode", "image.encode", "dit.step", "vae.decode")
HEADROOM = 0.9
SMALLER = (3 / 4, 1 / 2, 1 / 4)  # of the sides, tried for "what would fit"


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a clip is decoded: whole, or in tiles of `tile_size` pixels (plus overlap), `tile_batch` of them at once."""

    tiled: bool
    tile_size: int
    tile_batch: int = 1

    def __str__(self) -> str:
        return f"in tiles of {self.tile_size}, {self.tile_batch} at once" if self.tiled else "whole"


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes: of the networks that the stage runs, and the most that is alive beside all weights while it runs.

    `activations` is None where a foreign component does not run on tensors without contents.
    """

    stage: str
    weights: int
    activations: int | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one clip. `weights` are all networks' together, packed copies of the fast twins included."""

    height: int
    width: int
    decoding: Decoding
    weights: int
    stages: tuple[StageMemory, ...]

    def peak(self, offload: bool = False) -> int:
        """The most bytes at once; with `offload`, only the networks of the stage at work are on the device."""
        return max((s.weights if offload else self.weights) + (s.activations or 0) for s in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"peak": self.peak(), "peak_with_offload": self.peak(offload=True)}


@dataclass(frozen=True, slots=True)
class Fit:
    """What was chosen for a call."""

    decoding: Decoding
    offload: bool = False


def forecast(
    stages: Stages, height: int, width: int, decoding: Decoding | None = None, earlier: Forecast | None = None
) -> Forecast:
    """Of a clip of this size, decoded as the pipeline would by itself, or as given. Computes nothing.

    `earlier`: of the same clip decoded in another way, so that only vae.decode has to be found out.
    """
    decoding = default_decoding(stages, height, width) if decoding is None else decoding
    dry = DryRun()
    with torch.no_grad(), dry:
        ghost = _ghost(stages, dry)
        peaks: dict[str, int | None] = {"vae.decode": _peak_of_decoding(ghost, dry, stages, height, width, decoding)}
        if earlier is not None:
            rows = tuple(
                s if s.stage not in peaks else dataclasses.replace(s, activations=peaks[s.stage])
                for s in earlier.stages
            )
            return dataclasses.replace(earlier, decoding=decoding, stages=rows)
        peaks |= _run_stages(ghost, dry, stages, height, width)
        of = {stage: weight_bytes(*ghost._stage_networks(stage)) for stage in STAGES}
        everything = weight_bytes(*ghost._networks(), *(n for stage in STAGES for n in ghost._stage_networks(stage)))
    rows = tuple(StageMemory(stage, of[stage], peaks[stage]) for stage in STAGES)
    return Forecast(height, width, decoding, everything, rows)


def default_decoding(stages: Stages, height: int, width: int) -> Decoding:
    config = stages.vae.config
    tiled = config.needs_tiling(height, width) if stages.vae_tiling is None else stages.vae_tiling
    return Decoding(tiled, config.tile_size)


def smaller_tiles(config: VAEConfig) -> int | None:
    """Half the tile, where half an overlap is still a whole number of latent cells: 128 pixels in the release."""
    half = config.tile_size // 2
    overlap = half * config.tile_overlap
    return half if half % config.spatial_factor == 0 and overlap % config.spatial_factor == 0 else None


def attempts(stages: Stages, decoding: Decoding) -> Iterator[Decoding]:
    """`decoding`, and what needs less, in the order in which running out of memory leads to it.

    Tiles change the clip a little (normalisation sees a tile), so a clip that is to be decoded whole stays whole.
    """
    tried = [decoding, dataclasses.replace(decoding, tile_batch=1)]
    if decoding.tiled or stages.vae_tiling is None:
        tried.append(Decoding(True, decoding.tile_size))
        if (half := smaller_tiles(stages.vae.config)) is not None:
            tried.append(Decoding(True, half))
    yield from dict.fromkeys(tried)


def as_chosen(vae: Any, decoding: Decoding) -> Any:
    """The VAE, reference or twin, on the same weights, with this tile size and batch."""
    if (decoding.tile_size, decoding.tile_batch) == (vae.config.tile_size, getattr(vae, "tile_batch", 1)):
        return vae
    other = copy.copy(vae)  # shares its modules
    if not isinstance(vae, ReducioVAE):
        other.reference = (as_chosen(vae.reference[0], dataclasses.replace(decoding, tile_batch=1)),)
        other.tile_batch = decoding.tile_batch
    other.config = dataclasses.replace(vae.config, tile_size=decoding.tile_size)
    return other


def fit(stages: Stages, height: int, width: int) -> Fit:
    """How to make a clip of this size on the device as it is now. ReducioError, in one line, where nothing fits."""
    device, default = stages.execution_device, default_decoding(stages, height, width)
    free = free_bytes(device)
    roomy = device.type == "cpu" and free is not None and _generous(stages, height, width) < free
    if free is None or roomy:
        return Fit(default)
    room = int(free * HEADROOM) + stages.resident_bytes()

    def known(decoding: Decoding) -> Forecast:
        return stages.forecast(height, width, decoding)

    earlier = stages._fits.get((height, width))
    still = earlier is not None and (earlier.offload, earlier.decoding.tiled) == (stages.offloading, default.tiled)
    if earlier is not None and still and known(earlier.decoding).peak(earlier.offload) <= room:
        return earlier  # another number of tiles at once would be another graph
    offloads = [True] if stages.offloading else [False] if device.type == "cpu" else [False, True]
    for offload in offloads:
        for decoding in attempts(stages, default):
            spare = room - known(decoding).peak(offload)
            if spare >= 0:
                if decoding.tiled and device.type != "cpu" and stages.backend == "fast":
                    decoding = _widen(known, decoding, height, width, room, offload)
                if decoding != default and not decoding.tile_batch > 1:
                    LOG.warning("vae.decode: %dx%d is decoded %s to fit into memory", height, width, decoding)
                return Fit(decoding, offload)
    raise ReducioError(_refusal(stages, known(default), room, offloads[-1]))


def _widen(
    known: Callable[[Decoding], Forecast], decoding: Decoding, height: int, width: int, room: int, offload: bool
) -> Decoding:
    """As many tiles at once as fit: what one more needs is the same for each."""
    one, two = (known(dataclasses.replace(decoding, tile_batch=n)).peak(offload) for n in (1, 2))
    tiles = -(-height // decoding.tile_size) * -(-width // decoding.tile_size)
    more = (room - one) // (two - one) if two > one else tiles
    return dataclasses.replace(decoding, tile_batch=max(1, min(tiles, 1 + more)))


def _refusal(stages: Stages, needed: Forecast, room: int, offload: bool) -> str:
    worst = max(needed.stages, key=lambda s: (s.weights if offload else needed.weights) + (s.activations or 0))
    weights = worst.weights if offload else needed.weights
    device, peak = stages.execution_device, needed.peak(offload)
    line = (
        f"memory: a clip of {needed.height}x{needed.width} needs {_size(peak)} on {device} ({_size(weights)} of "
        f"weights, {_size(worst.activations or 0)} for {worst.stage}), {_size(peak - room)} more than there is"
    )
    factor = stages.vae.config.spatial_factor
    for share in SMALLER:
        height, width = (max(factor, int(n * share) // factor * factor) for n in (needed.height, needed.width))
        if stages.forecast(height, width).peak(offload) <= room:
            return f"{line}; {height}x{width} would fit"
    return f"{line}; no smaller size fits either, the weights alone need {_size(weights)}"


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 / 4 else f"{n / 2**20:.0f} MiB"


def _generous(stages: Stages, height: int, width: int) -> int:
    """Well above any forecast, for the price of a multiplication: 64 full-size tensors of the widest fine level."""
    config = stages.vae.config
    reach = int(config.tile_size * (1 + config.tile_overlap))
    cells = height * width if stages.vae_tiling is False else min(height, reach) * min(width, reach)
    widest = config.base_channels * max(config.channel_multipliers[:2])
    return 64 * cells * config.num_frames * widest * stages.dtype.itemsize + 2**30


def _ghost(stages: Stages, dry: DryRun) -> Stages:
    """A copy of the pipeline whose weights are shapes."""
    names = ("vae", "transformer", "scheduler", "text_encoder", "image_encoder", "content_encoder", "text_to_image")
    networks, ghost = stages._networks(), copy.copy(stages)
    given = {name: getattr(stages, name) for name in names}
    for name, part in without_weights(given, *networks, keep=(stages.tokenizer,)).items():
        setattr(ghost, name, part)
    ghost._offload = None
    if stages._engine is not None:
        ghost._engine = _Twins(ghost, stages, dry)
    dry.given(*ghost._networks(), *(n for stage in STAGES for n in ghost._stage_networks(stage)))
    transformers: list[Any] = ghost._stage_networks("dit.step")
    for network in transformers:
        dry.remember(*network.transformer_blocks)
    vaes: list[Any] = ghost._stage_networks("vae.decode")
    for network in vaes:
        dry.remember(network.decoder, network.encoder_2d)
    return ghost


class _Twins:
    """Stands in for the engine: twins of a ghost's networks, planned for the real device."""

    def __init__(self, ghost: Stages, stages: Stages, dry: DryRun) -> None:
        from ...fast.engine import Twins
        from ...fast.plan import Plan
        from ...fast.reducio.dit import FastReducioDiT
        from ...fast.reducio.vae import FastReducioVAE
        from ...triton_kernels.registry import OPS

        class KernelPlan(Plan):
            """Every op is one kernel. What a vendor's library does instead allocates no more."""

            def pick(self, path: str, op: str, shape: str = "") -> Callable[..., Any]:
                return dry.opaque(OPS[op].twin)

            def library_pads(self, op: str, shape: str) -> bool:
                return False

        kind = Plan if stages.execution_device.type == "cpu" else KernelPlan
        plan = kind(torch.device("cpu"), stages.dtype)
        self.made = Twins(FastReducioDiT(ghost.transformer, plan), FastReducioVAE(ghost.vae, plan), plan)

    def twins(self, *_: Any) -> Any:
        return self.made


def _peak_of_decoding(ghost: Stages, dry: DryRun, stages: Stages, height: int, width: int, decoding: Decoding) -> int:
    # The twins call oneDNN at every size.
    dry.unfolding = stages.execution_device.type == "cpu" and ghost._engine is None
    latent = torch.empty((1, *validation.latent_shape(ghost.vae.config, height, width)), device=META)
    return dry.peak_of(ghost._decode_as, latent, np.zeros((height, width, 3), np.uint8), decoding)[1]


def _run_stages(
    ghost: Stages, dry: DryRun, stages: Stages, height: int, width: int
) -> Iterator[tuple[str, int | None]]:
    """All stages but the last."""
    frame = np.zeros((height, width, 3), np.uint8)
    config, generator = ghost.vae.config, torch.Generator().manual_seed(0)
    dry.unfolding = stages.execution_device.type == "cpu"
    yield "content.generate", _peak_of_drawing(ghost.text_to_image, dry, height, width, generator)
    if ghost.text_encoder is None:
        length, channels = ghost.transformer.null_text.shape
        text = torch.empty(1, length, channels, dtype=stages.dtype, device=META)
        mask, peak = torch.empty(1, length, dtype=torch.bool, device=META), 0
    else:
        (text, mask), peak = dry.peak_of(ghost._encode_text, "a red circle")
    yield "text.encode", peak
    (semantic, latent), peak = dry.peak_of(ghost._encode_image, frame, request.Embeds())
    yield "image.encode", peak
    cond = Condition(text, mask, semantic, latent)
    uncond = cond.without_text(ghost.transformer.null_text)
    noise = initial_latent((1, *validation.latent_shape(config, height, width)), [generator])
    # Two steps: a multistep scheduler remembers its last prediction from then on.
    yield "dit.step", dry.peak_of(ghost._sample, noise, cond, uncond, 4.5, 2, generator, None)[1]


def _peak_of_drawing(pipeline: Any, dry: DryRun, height: int, width: int, generator: torch.Generator) -> int | None:
    """Of the text-to-image stage: a diffusers pipeline, whichever it is."""
    if pipeline is None:
        return 0
    words = (pipeline, "a red circle", "", height, width, generator, False, {"num_inference_steps": 2})
    try:
        # Pixels would be asked for what they hold: the drawing ends where its decoder does.
        pipeline.image_processor.postprocess = lambda *_, **__: np.zeros((1, height, width, 3), np.float32)
        return dry.peak_of(content_frame.draw_image, *words)[1]
    except Exception as error:  # foreign code, which may ask a tensor for what it holds in ways nobody can answer
        LOG.info("content.generate: no forecast for a %s (%s)", type(pipeline).__name__, error)
        return None
