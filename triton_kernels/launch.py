"""What every kernel file shares: checks, launch settings per GPU, and the list of what is compiled ahead of time.

Wrappers check their inputs once and kernels trust them. Launch settings are data (`tables/<arch>.json`), never tuned in
a user's call: a GPU without a table of its own gets `default.json` and one log line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.uint8: "u8"}
FLOATING = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One specialisation of a kernel that the project ships: what `compile-check` builds for a target with no GPU."""

    name: str  # "conv3d bf16 128->128", unique within a kernel file
    kernel: Any  # the jit function
    signature: Mapping[str, str]  # every run-time argument: "*bf16", "i32", "fp32"
    constants: Mapping[str, Any]  # every constexpr, block sizes included
    options: Mapping[str, int] = field(default_factory=dict)  # num_warps, num_stages, ...
    unaligned: tuple[str, ...] = ()  # arguments that need not be multiples of 16 (scalars: elements, pointers: bytes)
    matrix: bool = False  # the target's matrix instruction must appear
    bulk_copy: bool = False  # the hardware's bulk copy must appear on sm_90, buffer loads on gfx942


def interpreted(kernel: Any) -> bool:
    """Whether `kernel` runs in Triton's interpreter (TRITON_INTERPRET=1 at import), hence on CPU tensors."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def launcher(kernel: Any) -> Any:
    """`kernel` ready for `[grid](...)`, visible to torch.compile; the interpreter's functions pass through."""
    return kernel if interpreted(kernel) else wrap_triton(kernel)


def use_descriptors(device: torch.device) -> bool:
    """Whether bulk copies by tensor descriptor pay: NVIDIA from sm_90 on. Elsewhere they become masked pointer loads.

    True also sees to it that the kernels find memory for the descriptors that they make.
    """
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    triton.set_allocator(_workspace)
    return True


def _workspace(size: int, _alignment: int, _stream: int | None) -> Tensor:
    # 128 bytes a descriptor. torch's allocator aligns to 512 and keeps the block for this stream, graphs included.
    return torch.empty(size, dtype=torch.int8, device="cuda")
