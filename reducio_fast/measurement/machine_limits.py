"""The limits of `compile-check` for the machine code of the hottest kernels, and the rates that it predicts for them.

`machine_limits.json` has, for each version of Triton, target and build, upper and lower limits for counts of
`compile.machine_code`, and `measured`, the FLOP/s on the card once they are measured. With a version that the file does
not name registers and instructions differ, so the counts are shown and not checked. Spills, hazards, missing matrix
instructions and divisions are wrong with any version.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import torch

from ..compile.aot import VERSION, Build
from ..fast.launches import keys_of
from ..triton_kernels import quantised_conv3d
from ..triton_kernels.conv3d import blocks_for
from ..triton_kernels.tables import Settings, settings
from .rate_model import CHIPS, attention, blocks_at_once, convolution, rate


@functools.cache
def limits() -> dict[str, dict[str, Any]]:
    """Targets and their builds, by Triton's major and minor version."""
    text = (resources.files(__package__) / "machine_limits.json").read_text(encoding="utf-8")
    data: dict[str, dict[str, Any]] = json.loads(text)
    return data


def held(version: str) -> bool:
    """Whether the counts are checked against their limits with this version of Triton."""
    return _minor(version) in limits()


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def counts(build: Build) -> dict[str, int]:
    """All numbers that a limit can name; empty if there was no disassembler."""
    if build.code is None:
        return {}
    numbers = {name: value for name, value in asdict(build.code).items() if isinstance(value, int)}
    numbers |= {"registers": build.registers, "shared": build.shared}
    return numbers | ({"blocks": blocks_at_once(build)} if build.arch in CHIPS else {})


def exceeded(build: Build, version: str = VERSION) -> list[str]:
    """One line for each limit that a build by this version of Triton breaks."""
    targets, numbers = limits().get(_minor(version), {}), counts(build)
    entry = targets.get(build.arch, {}).get(build.variant, {})
    if not numbers or build.problems:
        return []
    too_many = [
        f"{name}: {numbers[name]}, the limit is {most}"
        for name, most in entry.get("at most", {}).items()
        if numbers[name] > most
    ]
    return too_many + [
        f"{name}: {numbers[name]}, it must be {least} or more"
        for name, least in entry.get("at least", {}).items()
        if numbers[name] < least
    ]


def divides(build: Build) -> list[str]:
    """The loop of a convolution must not divide integers by run-time values: each takes some twenty instructions."""
    convolves = build.variant.startswith(("conv3d", "upsample_conv3d", "quantised_conv3d"))
    if build.code is None or not convolves or not build.code.division:
        return []
    return [f"{build.code.division} instructions of an integer division in the loop"]


@dataclass(frozen=True, slots=True)
class Prediction:
    variant: str
    arch: str
    what: str
    predicted: float | None  # FLOP/s by `rate_model`
    measured: float | None  # FLOP/s


def prediction(build: Build) -> Prediction | None:
    """The prediction for a hot shape; None for other builds."""
    hot = any(build.variant in targets.get(build.arch, {}) for targets in limits().values())
    problem = PROBLEMS.get(build.variant)
    if not hot or problem is None:
        return None
    entry = limits().get(_minor(VERSION), {}).get(build.arch, {}).get(build.variant, {})
    op, what, numbers = problem
    if op == "attention":
        B, L, S, N, D = numbers
        shape = attention(B, L, S, N, D, settings(op, str(D), build.arch))
    else:
        C, K, frames, side, taps, phases = numbers
        quantised = op == quantised_conv3d.OP
        chosen = quantised_conv3d.blocks_for(C, K, build.arch) if quantised else bfloat16_blocks(op, C, K, build.arch)
        flops, blocks, passes = convolution(C, K, frames, side, taps, chosen)
        shape = (flops * phases, blocks * phases, passes)
    return Prediction(build.variant, build.arch, what, rate(build, *shape), entry.get("measured"))


def bfloat16_blocks(op: str, C: int, K: int, arch: str) -> Settings:
    return blocks_for(op, torch.bfloat16, C, K, arch)


# Calls of a 1024x1024 clip: op, description, and the numbers for `rate_model`: channels in and out, frames, side, taps
# per phase and phases; or clips, queries, keys, heads, head dim.
PROBLEMS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "conv3d bf16 128->128 k3 residual stats": ("conv3d", "16x320x320", (128, 128, 16, 320, 27, 1)),
    "conv3d bf16 256->256 k3 residual stats": ("conv3d", "16x160x160", (256, 256, 16, 160, 27, 1)),
    "upsample_conv3d bf16 256->256 space stats": ("upsample_conv3d", "from 16x160x160", (256, 256, 16, 160, 12, 4)),
    **{
        f"quantised_conv3d {kind} {C}->{C} k3 residual stats": (
            "quantised_conv3d",
            f"16x{side}x{side}",
            (C, C, 16, side, 27, 1),
        )
        for kind in ("fp8e4nv", "fp8e4b8", "i8")
        for C, side in ((128, 320), (256, 160))
    },
    "attention bf16 72": ("attention", "2x4096 queries and keys", (2, 4096, 4096, 16, 72)),
    "attention bf16 72 counted": ("attention", "2x4096 queries, content keys", (2, 4096, keys_of(1024), 16, 72)),
    "attention bf16 64": ("attention", "102400 queries, 6400 keys", (1, 102400, 6400, 4, 64)),
}
