"""The calls that take most of the time of a 1024x1024 clip of Reducio, one `Problem` each: the tuner times them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..fast.launches import keys_of

Ways = dict[str, Callable[[], Any]]


@dataclass(frozen=True, slots=True)
class Problem:
    """One call of the hot path. `make(device)` returns functions to time, by name: "kernel" is ours, "vendor" is the
    vendor's, others may follow. "expected" computes our kernel's first results with the vendor's operators, if "vendor"
    returns something else.

    `key` is its shape class among the launch settings, `plan` its class in the plan, `variant` the prefix of its
    builds' names in `compile-check`. `calls`: how often a clip makes it.
    """

    op: str
    key: str
    plan: str
    variant: str
    what: str
    calls: float
    make: Callable[[torch.device], Ways] = field(repr=False, compare=False)

    @property
    def plan_entry(self) -> str:
        """Its class as the plan names it, with the op."""
        return f"{self.op} {self.plan}".strip()


def hot_problems(arch: str) -> list[Problem]:
    """81% of the work of Reducio's decoder, its norms, and the transformer's attention and norms, all in bfloat16; and
    the hottest convolutions in the 8-bit numbers of `arch`, if it has any. A clip has 16 tiles and 20 steps."""
    from ..triton_kernels.eight_bits import best_eight_bit
    from ..triton_kernels.launch import TYPES

    tiles, steps = 14.4, 20  # of a 1024x1024 clip: its 16 tiles have as many pixels as 14.4 full ones
    problems = []
    for C, K, side, times in (
        (128, 128, 320, 7),
        (256, 128, 320, 1),
        (256, 256, 160, 9),
        (512, 512, 80, 1),
        (256, 256, 80, 7),
    ):
        variant = f"conv3d bf16 {C}->{K} k3 {'residual ' * (C == K)}stats"
        problems.append(Problem(
            "conv3d", "K<=128" if K <= 128 else "*", f"{C}->{K}", variant, f"16x{side}x{side}",
            times * tiles, functools.partial(conv_ways, C, K, 16, side),
        ))  # fmt: skip
    if (eight_bit := best_eight_bit(arch)) is not None:
        for C, side, times in ((128, 320, 7), (256, 160, 9)):
            variant = f"quantised_conv3d {TYPES[eight_bit]} {C}->{C} k3 residual stats"
            problems.append(Problem(
                "quantised_conv3d", "K<=128" if C <= 128 else "*", f"{C}->{C}", variant, f"16x{side}x{side}",
                times * tiles, functools.partial(quantised_ways, C, C, 16, side, eight_bit),
            ))  # fmt: skip
    for C, time_, frames, side in (
        (256, False, 16, 160),
        (256, False, 16, 80),
        (512, False, 16, 40),
        (512, True, 8, 20),
    ):
        axes = "space+time" if time_ else "space"
        problems.append(Problem(
            "upsample_conv3d", "*", f"{C}->{C}", f"upsample_conv3d bf16 {C}->{C} {axes} stats",
            f"{axes}, from {frames}x{side}x{side}", tiles, functools.partial(upsample_ways, C, time_, frames, side),
        ))  # fmt: skip
    for plan, D, B, L, S, N, counted, calls in (
        ("self 72", 72, 2, 4096, 4096, 16, False, 28 * steps),
        ("cross 72", 72, 2, 4096, keys_of(1024), 16, True, 28 * steps),
        ("fusion 64", 64, 1, 16 * 80 * 80, 80 * 80, 4, False, tiles),
        ("fusion 64", 64, 1, 16 * 40 * 40, 40 * 40, 8, False, tiles),
    ):
        problems.append(Problem(
            "attention", str(D), plan, f"attention bf16 {D}", f"{B}x{L} queries, {S} keys", calls,
            functools.partial(attention_ways, D, B, L, S, N, counted),
        ))  # fmt: skip
    for key, C, side, calls in (
        ("apply", 128, 320, 14),
        ("apply", 256, 160, 16),
        ("finalise", 128, 320, 30),
        ("statistics", 128, 320, 2),
    ):
        problems.append(Problem(
            "group_norm_silu", key, "", f"group_norm_silu {key} bf16 {C}", f"{key}, {C} channels of 16x{side}x{side}",
            calls * tiles, functools.partial(norm_ways, key != "statistics", (1, 16, side, side, C), (1, 1, True)),
        ))  # fmt: skip
    for op, calls in (("ada_layer_norm", 1), ("gated_residual_ada_layer_norm", 56)):
        problems.append(
            Problem(
                op,
                "1152",
                "",
                f"{op} bf16 1152",
                "2x4096 tokens",
                calls * steps,
                functools.partial(token_norm_ways, op),
            )
        )
    return problems


def random_input(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(scale)


def conv_ways(C: int, K: int, T: int, side: int, device: torch.device) -> Ways:
    """With bias, residual and statistics; after the vendor's convolution a separate kernel computes the statistics."""
    from ..triton_kernels import conv3d, group_norm_silu

    x = random_input(device, 1, T + 2, side + 2, side + 2, C)
    w, b = random_input(device, K, 27 * C, scale=(27 * C) ** -0.5), random_input(device, K)
    residual = random_input(device, 1, T, side, side, K)
    return {
        "kernel": lambda: torch.ops.reducio_fast.conv3d(x, w, b, residual, True),
        "vendor": lambda: group_norm_silu.statistics(conv3d.twin(x, w, b, residual)[0], False),
        "expected": lambda: conv3d.twin(x, w, b, residual)[0],
    }


def quantised_ways(C: int, K: int, T: int, side: int, eight_bit: torch.dtype, device: torch.device) -> Ways:
    """As `conv_ways`, of x in 8-bit numbers; the vendor convolves the numbers that they stand for."""
    from ..triton_kernels import eight_bits, group_norm_silu, quantised_conv3d

    x = random_input(device, 1, T + 2, side + 2, side + 2, C)
    weight = random_input(device, K, C, 3, 3, 3, scale=(27 * C) ** -0.5)
    b, residual = random_input(device, K), random_input(device, 1, T, side, side, K)
    multiplier, w, scale = quantised_conv3d.pack(weight, x.abs().amax((0, 1, 2, 3)), eight_bit)
    x8 = eight_bits.to_eight_bits(x * multiplier, eight_bit)
    return {
        "kernel": lambda: torch.ops.reducio_fast.quantised_conv3d(x8, w, scale, b, residual, True),
        "vendor": lambda: group_norm_silu.statistics(quantised_conv3d.twin(x8, w, scale, b, residual)[0], False),
        "expected": lambda: quantised_conv3d.twin(x8, w, scale, b, residual)[0],
    }


def upsample_ways(C: int, time_: bool, T: int, side: int, device: torch.device) -> Ways:
    from ..triton_kernels import group_norm_silu, upsample_conv3d

    x = random_input(device, 1, T + 2, side + 2, side + 2, C)
    w = upsample_conv3d.fold_weight(random_input(device, C, C, 3, 3, 3, scale=(27 * C) ** -0.5), time_, False)
    b = random_input(device, C)
    return {
        "kernel": lambda: torch.ops.reducio_fast.upsample_conv3d(x, w, b, False, True),
        "vendor": lambda: group_norm_silu.statistics(upsample_conv3d.twin(x, w, b)[0], False),
        "expected": lambda: upsample_conv3d.twin(x, w, b)[0],
    }


def attention_ways(D: int, B: int, L: int, S: int, N: int, counted: bool, device: torch.device) -> Ways:
    from ..fast.plan import flash_attention
    from ..triton_kernels import attention

    q, k, v = random_input(device, B, L, N, D), random_input(device, B, S, N, D), random_input(device, B, S, N, D)
    count = torch.full((B,), S - 80, dtype=torch.int32, device=device) if counted else None
    ways: Ways = {
        "kernel": lambda: torch.ops.reducio_fast.attention(q, k, v, count),
        "vendor": lambda: attention.twin(q, k, v, count),
    }
    return ways if counted else ways | {"flash-attn": lambda: flash_attention(q, k, v)}


def norm_ways(
    has_statistics: bool, shape: tuple[int, ...], padding: tuple[int, int, bool], device: torch.device
) -> Ways:
    """`has_statistics`: the convolution before the norm has computed the statistics. padding: front, back, halo."""
    from ..triton_kernels import group_norm_silu

    x, C = random_input(device, *shape), shape[-1]
    w, b = random_input(device, C), random_input(device, C)
    partials = group_norm_silu.statistics(x, False) if has_statistics else None
    arguments = (32, 1e-6, True, False)
    return {
        "kernel": lambda: torch.ops.reducio_fast.group_norm_silu(x, w, b, *arguments, partials, *padding),
        "vendor": lambda: group_norm_silu.twin(x, w, b, *arguments, None, *padding),
    }


def token_norm_ways(op: str, device: torch.device) -> Ways:
    x, branch = random_input(device, 2, 4096, 1152), random_input(device, 2, 4096, 1152)
    rows = [random_input(device, 1152).expand(2, -1) for _ in range(3)]
    return op_ways(op, x, *rows[:2]) if op == "ada_layer_norm" else op_ways(op, x, branch, *rows)


def op_ways(op: str, *inputs: Any) -> Ways:
    """Of an op whose twin is what a model runs where its plan chooses the vendor."""
    from ..triton_kernels.registry import OPS

    return {
        "kernel": lambda: getattr(torch.ops.reducio_fast, op)(*inputs),
        "vendor": lambda: OPS[op].twin(*inputs),
    }
