"""The calls of Stable Video Diffusion that take most of the time of our kernels, one `Problem` each, for the tuner.

The clip is that of the workload "svd": 25 frames of 576x1024, 25 steps, both halves of guidance in one batch. The U-Net
has three levels with transformers, at an eighth of the picture's sides and less. Its decoder runs frame by frame from
144x256 on. Convolutions and products that always run on the vendor's library are not listed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fast.packed_layers import UpConv, as_frames, as_images
from ..fast.plan import Plan
from ..triton_kernels.upsample_conv3d import fold_weight
from .hot_shapes import Problem, Ways, attention_ways, norm_ways, op_ways, random_input
from .svd_clip import FULL


def svd_problems(arch: str) -> list[Problem]:
    """At least one call for each class of launch settings that a step or a decode uses, in bfloat16; the same for every
    `arch`. `calls` counts convolutions without a residual as those with one, and norms of clips as those of frames."""
    unet, _, height, width, steps = FULL
    frames, problems = unet.num_frames, list[Problem]()
    images = 2 * frames

    def add(
        op: str, key: str, plan: str, variant: str, what: str, calls: float, make: Callable[..., Ways], *sizes: Any
    ) -> None:
        problems.append(Problem(op, key, plan, f"{op} {variant}", what, calls, functools.partial(make, *sizes)))

    for C, scale in ((320, 8), (640, 16), (1280, 32)):  # five transformers and five res blocks each
        H, W, heads = height // scale, width // scale, C // 64
        L, clips = H * W, f"2x{frames}x{H}x{W}"
        add("geglu_linear", "*", f"{C}->{4 * C}", f"bf16 {C}->{4 * C}", clips, 15 * steps, geglu_ways, C, images * L)
        add(
            "attention", "64", "self 64", "bf16 64", f"{images}x{L} queries and keys, {heads} heads", 5 * steps,
            attention_ways, 64, images, L, L, heads, False,
        )  # fmt: skip
        variant = f"bf16 {heads} heads {frames} frames"
        add("frame_attention", "*", "64", variant, clips, 5 * steps, frame_attention_ways, heads, frames, L)
        for kind, times in (("plain", 10), ("branch", 5), ("blend", 5)):
            what = f"{kind}, {clips}, {C} channels"
            add("stream_layer_norm", str(C), "", f"bf16 {C}", what, times * steps, stream_norm_ways, kind, C, images, L)
        what, variant = f"{clips}, residual", f"bf16 {C} residual"
        add("temporal_conv", "*", f"{C}->{C}", variant, what, 10 * steps, temporal_ways, C, 2, frames, L, False)
        plan, variant = f"{C}->{C} alone", f"bf16 {C} alone residual"
        add("temporal_conv", "*", plan, variant, what, 5 * steps, temporal_ways, C, 1, images, L, True)
    for C, side in ((512, 4), (256, 2), (128, 1)):  # three res blocks each
        H, W = height // side, width // side
        what, variant = f"a frame of {H}x{W}, residual", f"bf16 {C} residual"
        add("temporal_conv", "*", f"{C}->{C}", variant, what, 6 * frames, temporal_ways, C, 1, 1, H * W, False)
    for key, C, N, scale, calls in (
        ("K<=128", 320, images, 8, 2 * steps),
        ("K<=128", 640, images, 16, steps),
        ("*", 1280, images, 32, steps),
        ("*", 1280, images, 64, 4 * steps),
        ("*", 512, 1, 4, 3 * frames),
        ("*", 256, 1, 2, 2 * frames),
        ("K<=128", 128, 1, 1, 2 * frames),
    ):
        H, W = height // scale, width // scale
        variant = f"bf16 {C}->{C} k1 residual"
        add("conv3d", key, f"{C}->{C} frames", variant, f"{N}x{H}x{W}", calls, frame_conv_ways, C, N, H, W)
    for key, C, room, N, scale, calls in (
        ("K<=128", 640, 320, images, 16, steps),
        ("*", 1280, 640, images, 32, steps),
        ("*", 512, 0, 1, 4, frames),
        ("*", 256, 0, 1, 2, frames),
    ):
        H, W = height // scale, width // scale
        variant = f"bf16 {C}->{C} space frames" + f" room {room}" * bool(room)
        what = f"from {N}x{H}x{W}"
        add("upsample_conv3d", key, f"{C}->{C} frames", variant, what, calls, frame_upsample_ways, C, room, N, H, W)
    # No convolution computes statistics here, so every norm launches all three kernels. A clip has as many elements as
    # its frames have together, but fewer and longer sums.
    H, W = height // 8, width // 8
    of_frames, of_clips, of_decoder = (images, 1, H, W, 320), (2, frames, H, W, 320), (1, 1, height, width, 128)
    for key, shape, calls in (
        ("apply", of_frames, 23 * steps),
        ("apply", of_decoder, 12 * frames),
        ("statistics", of_clips, 23 * steps),
        ("statistics", of_decoder, 12 * frames),
        ("finalise", of_clips, 10 * steps),
    ):
        what, variant = f"{key}, {'x'.join(map(str, shape))}", f"{key} bf16 {shape[-1]}"
        add("group_norm_silu", key, "", variant, what, calls, norm_ways, False, shape, (0, 0, False))
    variant = "bf16 on fp32 guided per frame"
    add("guidance_dpm_step", "*", "", variant, f"{frames}x4x{H}x{W}", steps, step_ways, (frames, 4, H, W))
    return problems


def geglu_ways(C: int, rows: int, device: torch.device) -> Ways:
    weight, bias = random_input(device, 8 * C, C, scale=C**-0.5), random_input(device, 8 * C)
    return op_ways("geglu_linear", random_input(device, rows, C), weight, bias)


def frame_attention_ways(heads: int, frames: int, L: int, device: torch.device) -> Ways:
    return op_ways("frame_attention", random_input(device, 2, frames, L, 3, heads, 64))


def stream_norm_ways(kind: str, C: int, B: int, L: int, device: torch.device) -> Ways:
    """kind: "plain" adds a row before the norm, "branch" adds a tensor too, "blend" blends the sum with another one."""
    x, row, weight, bias = (random_input(device, *shape) for shape in ((B, L, C), (B, C), (C,), (C,)))
    branch = random_input(device, B, L, C) if kind == "branch" else None
    blend: tuple[Tensor, ...] = ()
    if kind == "blend":
        blend = (random_input(device, B, L, C), random_input(device, B, C), torch.full_like(weight[:1], 0.5))
    return op_ways("stream_layer_norm", x, row, weight, bias, 1e-5, branch, *blend)


def temporal_ways(C: int, B: int, frames: int, L: int, alone: bool, device: torch.device) -> Ways:
    """With bias and residual. `alone`: one tap, as in a transformer's last product."""
    taps, cells = 1 if alone else 3, frames * L
    x, residual = random_input(device, B, cells + (taps - 1) * L, C), random_input(device, B, cells, C)
    sources: list[Tensor | None] = [x[:, tap * L : tap * L + cells] for tap in range(taps)]
    if alone:
        sources = [None, *sources, None]
    weight, bias = random_input(device, taps, C, C, scale=(taps * C) ** -0.5), random_input(device, C)
    return op_ways("temporal_conv", *sources, weight, bias, residual)


def frame_conv_ways(C: int, N: int, H: int, W: int, device: torch.device) -> Ways:
    """With bias and residual. The vendor's way is that of a model whose plan chooses it: no border, and the residual is
    added in place."""
    x, residual = random_input(device, N, H, W, C), random_input(device, N, H, W, C)
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))[None]
    weight, bias = random_input(device, C, 9 * C, scale=(9 * C) ** -0.5), random_input(device, C)
    kernel = weight.view(C, 3, 3, C).permute(0, 3, 1, 2)
    return {
        "kernel": lambda: torch.ops.reducio_fast.conv3d(padded, weight, bias, residual[None])[0][0],
        "vendor": lambda: as_frames(F.conv2d(as_images(x), kernel, bias, padding=1)).add_(residual),
    }


def frame_upsample_ways(C: int, room: int, N: int, H: int, W: int, device: torch.device) -> Ways:
    """Both ways write the border first. `room`: channels that our kernel leaves free for a skip connection."""
    x = random_input(device, N, H, W, C)
    conv = nn.Conv2d(C, C, 3, padding=1, device=device, dtype=x.dtype).requires_grad_(False)
    phases = fold_weight(conv.weight[:, :, None], time=False, causal=False)
    vendor = UpConv(conv, Plan(x.device, x.dtype, allowed=()), "")

    def kernel() -> Tensor:
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))[None]
        return torch.ops.reducio_fast.upsample_conv3d(padded, phases, conv.bias, room=room)[0][0, ..., :C]

    return {"kernel": kernel, "vendor": lambda: vendor(x)}


def step_ways(shape: tuple[int, ...], device: torch.device) -> Ways:
    """Guidance per frame and a step of a float32 latent [1, *shape]."""
    prediction = random_input(device, 2, *shape)
    latent, previous = (random_input(device, 1, *shape).float() for _ in range(2))
    return op_ways("guidance_dpm_step", prediction, latent, previous, random_input(device, shape[0] + 5).float())
