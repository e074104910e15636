"""The workload "tile": one full-width tile of 256 pixels, decoded by the published architecture with random weights.

Latency does not depend on weights. A CPU takes a minute and more for each decode of the reference.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..media.pixels import to_bytes
from ..reference import ReducioDiT, ReducioVAE, VAEConfig
from ..system.errors import ReducioError
from ..system.stage_clock import Stopwatch, Timings
from .accuracy_rule import judge
from .names import QUANTISED
from .quantised_decoder import decode_rows, own_quantisation

PIXELS = 256
Flops = dict[str, float]


@dataclass(frozen=True, slots=True)
class Contender:
    """`run` makes one clip: uint8 frames [T, H, W, 3] on the host, and seconds per stage."""

    name: str
    what: str
    dtype: torch.dtype | None  # None: the networks differ in it, so no roof is theirs
    run: Callable[[], tuple[np.ndarray, Timings]]
    algebra: str = "direct"  # which operations it executes: "direct" as in the reference, or "folded"


def compile_reference(dit: ReducioDiT | None, vae: ReducioVAE, device: torch.device, mode: str | None = None) -> str:
    """Apply torch.compile in place as recommended to its users: block by block, with channels-last weights.

    Returns a description. On a GPU the mode is max-autotune without its own graphs, because those reuse a tile's memory
    before the tile is blended.
    """
    mode = mode or ("max-autotune-no-cudagraphs" if device.type == "cuda" else "default")
    for network in (vae,) if dit is None else (dit, vae):
        for parameter in network.parameters():
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            if parameter.ndim in formats:
                parameter.data = parameter.data.to(memory_format=formats[parameter.ndim])
    for block in () if dit is None else dit.transformer_blocks:
        block.compile(mode=mode, dynamic=False)  # all blocks use one compilation
    for part in (vae.encoder_2d, vae.decoder):
        part.compile(mode=mode, dynamic=False)
    return f"torch.compile {mode}, channels_last_3d"


class DecodedTile:
    """Decoding of one tile; see the module."""

    name = "tile"

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        torch.manual_seed(0)
        config = VAEConfig()
        self.vae = ReducioVAE(config).to(device, dtype).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        self.image = (torch.rand(1, 3, PIXELS, PIXELS, generator=generator) * 2 - 1).to(device, dtype)
        self.latent = torch.randn(1, *config.latent_shape(PIXELS, PIXELS), generator=generator).to(device, dtype)
        self.shape = {"num_frames": config.num_frames, "height": PIXELS, "width": PIXELS, "fps": 16.0}
        self.what = f"tile: full-width decoder, {config.num_frames}x{PIXELS}x{PIXELS}, random weights"

    @torch.no_grad()
    def decode(self, vae: Any) -> tuple[np.ndarray, Timings]:
        stage, dtype = Stopwatch(self.device), next(vae.parameters()).dtype
        with stage("vae.decode"):
            features = vae.encode_content(self.image.to(dtype))
            video = vae.decode(self.latent.to(dtype), features)[0].float()
        return to_bytes(video.transpose(0, 1)).cpu().numpy(), stage.seconds

    def contender(self, name: str) -> Contender:
        if name == "reference":
            return Contender(name, "plain PyTorch, eager", self.dtype, lambda: self.decode(self.vae))
        if name == "compiled":
            vae = copy.deepcopy(self.vae)
            return Contender(name, compile_reference(None, vae, self.device), self.dtype, lambda: self.decode(vae))
        from ..fast.engine import Engine

        engine = Engine(True if name == "fast-compiled" else None)
        engine.free_dtype = name == "fast-default"
        if name not in QUANTISED:
            twin = engine.twin(self.vae)
            return Contender(name, "fast twin", twin.dtype, functools.partial(self.decode, twin), "folded")
        from ..fast.quantisation import eight_bit_type

        engine.quantisation = own_quantisation(self.vae, "fp8")
        run = functools.partial(self.decode, engine.twin(self.vae))
        what, dtype = "fast twin in FP8, with ranges measured on noise", eight_bit_type("fp8", self.device)
        return Contender(name, what, dtype, run, "folded")

    def rungs(self) -> list[Contender]:
        raise ReducioError("ladder: needs the workload default or narrow, or a size; tile has no ladder")

    def parity(self) -> list[dict[str, Any]]:
        """The twin against the reference on a tile of 64 pixels, oracle in float64 or float32."""
        from ..fast.engine import Engine

        oracle_dtype = torch.float64 if self.dtype == torch.float32 else torch.float32
        image, latent = self.image[..., :64, :64], self.latent[..., :2, :2]

        @torch.no_grad()
        def decode(vae: Any, dtype: torch.dtype) -> Tensor:
            return vae.decode(latent.to(dtype), vae.encode_content(image.to(dtype)))

        fast, eager = decode(Engine(False).twin(self.vae), self.dtype), decode(self.vae, self.dtype)
        oracle = decode(copy.deepcopy(self.vae).to(oracle_dtype), oracle_dtype)
        verdict = judge(fast.to(eager.dtype), eager, oracle)
        return [verdict.row("tile: vae.decode", self.dtype, self.device)]

    def quantised_parity(self) -> list[dict[str, Any]]:
        return list(decode_rows(self.name, copy.deepcopy(self.vae), self.dtype, 64))

    @functools.cached_property
    def flops(self) -> dict[str, Flops]:
        """{"direct" or "folded": {"vae.decode": floating-point operations}}, counted on the meta device."""
        from ..fast.plan import Plan
        from ..fast.reducio.vae import FastReducioVAE

        meta = torch.device("meta")
        vae = copy.deepcopy(self.vae).to(meta).float()
        latent, image = self.latent.to(meta).float(), self.image.to(meta).float()
        counted = {}
        for algebra, network in (("direct", vae), ("folded", FastReducioVAE(vae, Plan(meta, torch.float32)))):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                network.decode(latent, network.encode_content(image))
            counted[algebra] = {"vae.decode": float(counter.get_total_flops())}
        return counted
