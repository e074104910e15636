"""The one rule that decides whether a fast result is right, for kernel tests, model-level parity and users alike.

A result in low precision cannot equal the float32 oracle, and a fixed tolerance either misses errors or fails at
random. So the rule compares with plain PyTorch in the same precision: the fast path may be twice as far from the
oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The error that the rule allows even if eager is exact, by the precision of the result: another order of sums in
# float32, half an ulp of the final rounding elsewhere.
EPS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}
# Products of 8-bit numbers may be this many times as far from the oracle as bfloat16: e4m3 keeps 4 bits of a number
# where bfloat16 keeps 8, so its rounding is 2^4 times as coarse. What is farther off lost more than the type does.
EIGHT_BIT_TIMES = 16.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Relative errors ||a - oracle|| / ||oracle|| of both results, the limit for the fast one, and the index of its
    largest error."""

    fast: float
    eager: float
    limit: float
    worst: tuple[int, ...]

    @property
    def right(self) -> bool:
        return self.fast <= self.limit  # False for NaN

    def row(self, what: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """The verdict as plain data for JSON."""
        return {
            "what": what,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "error": self.fast,
            "eager": self.eager,
            "limit": self.limit,
            "right": self.right,
        }

    def __str__(self) -> str:
        return f"error {self.fast:.3g}, eager {self.eager:.3g}, limit {self.limit:.3g}, worst at {list(self.worst)}"


def relative_error(x: Tensor, oracle: Tensor) -> float:
    """||x - oracle|| / ||oracle|| in float64 (the norm of x where the oracle is zero); NaN if either holds one."""
    oracle = oracle.double()
    scale = torch.linalg.vector_norm(oracle)
    return float(torch.linalg.vector_norm(x.double() - oracle) / (scale if scale else 1.0))


def judge(fast: Tensor, eager: Tensor, oracle: Tensor) -> Verdict:
    """err(fast) <= 2 * err(eager) + eps, `eager` being plain PyTorch in the precision of `fast`.

    Raises ValueError if shapes or the two precisions differ: such results cannot be compared.
    """
    if not fast.shape == eager.shape == oracle.shape or fast.dtype != eager.dtype:
        described = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (fast, eager, oracle))
        raise ValueError(f"fast, eager and oracle do not compare: {described}")
    error = relative_error(eager, oracle)
    difference = (fast.double() - oracle.double()).abs().nan_to_num(nan=torch.inf)
    worst = torch.unravel_index(difference.argmax(), fast.shape) if fast.numel() else ()
    return Verdict(relative_error(fast, oracle), error, 2 * error + EPS[fast.dtype], tuple(int(i) for i in worst))
