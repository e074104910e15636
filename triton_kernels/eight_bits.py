"""8-bit number formats of quantised kernels: which one a GPU multiplies, their largest value, rounding to them.

FP8 is e4m3 (sign, 4 bits of exponent, 3 of mantissa: a relative error of at most 2^-4). NVIDIA and gfx950 use the OCP
format (torch's `float8_e4m3fn`, up to 448); gfx942 uses `float8_e4m3fnuz`, whose exponents are one lower, up to 240.
sm_80 has neither and multiplies 8-bit integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import INTERPRETER

EIGHT_BIT = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0, torch.int8: 127.0}  # dtype: largest number

# By the name of a GPU's table: the dtype that the GPU multiplies.
FP8 = {
    "sm_90": torch.float8_e4m3fn,
    "sm_100": torch.float8_e4m3fn,
    "sm_103": torch.float8_e4m3fn,
    "gfx950": torch.float8_e4m3fn,
    "gfx942": torch.float8_e4m3fnuz,
    INTERPRETER: torch.float8_e4m3fn,  # also torch on a CPU: emulated
}
INT8 = {"sm_80": torch.int8, "sm_86": torch.int8, INTERPRETER: torch.int8}
WORDS = {"fp8": FP8, "int8": INT8}


def best_eight_bit(arch: str) -> torch.dtype | None:
    """The 8-bit dtype of the kernels shipped for `arch`: FP8, else int8, else None."""
    return FP8.get(arch, INT8.get(arch))


def limit_of(eight_bit: torch.dtype | None) -> float:
    return 0.0 if eight_bit is None else EIGHT_BIT[eight_bit]


# Triton's interpreter (3.6 to 3.8) drops the carry where rounding reaches a power of two: 127.9 becomes 64. Under the
# interpreter `quantise` therefore rounds first, and the conversion has nothing left to round.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def round_to_e4m3(y, SUBNORMAL: tl.constexpr):
    """float32 of the same value as the nearest e4m3. SUBNORMAL: the distance of the smallest numbers."""
    bits = y.to(tl.int32, bitcast=True)
    bits += 0x7FFFF + ((bits >> 20) & 1)  # 20 of 23 bits of the mantissa go
    normal = (bits & -0x100000).to(tl.float32, bitcast=True)
    small = (y + 12582912.0 * SUBNORMAL) - 12582912.0 * SUBNORMAL
    return tl.where(tl.abs(y) < 8 * SUBNORMAL, small, normal)


@triton.jit
def quantise(y, LIMIT: tl.constexpr, TYPE: tl.constexpr):
    """float32 to the nearest 8-bit number, even ones where two are as near; what is larger than all becomes the largest
    (a conversion alone would make NaN of it on some hardware). NaN stays NaN, which 8-bit integers do not have."""
    y = tl.where(y > LIMIT, LIMIT, tl.where(y < -LIMIT, -LIMIT, y))
    if TYPE.is_int():
        y = (y + 12582912.0) - 12582912.0  # 1.5 * 2^23: a float32 of that size has no digits after the point
    elif INTERPRETED:
        y = round_to_e4m3(y, 0.001953125 if TYPE.is_fp8e4nv() else 0.0009765625)  # 2^-9, 2^-10
    return y.to(TYPE)


def to_eight_bits(y: Tensor, eight_bit: torch.dtype) -> Tensor:
    """`quantise` in plain PyTorch."""
    y = y.clamp(-EIGHT_BIT[eight_bit], EIGHT_BIT[eight_bit])
    return (y.round() if eight_bit == torch.int8 else y).to(eight_bit)
