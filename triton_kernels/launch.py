"""What every kernel file shares: checks, launch settings per GPU, and the list of what is compiled ahead of time.

Wrappers check their inputs once and kernels trust them. Launch settings are data (`tables/<arch>.json`), never tuned in
a user's call: a GPU without a table of its own gets `default.json` and one log line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton
from triton.runtime import _allocation

from .tables import arch_of, pretend

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.uint8: "u8",
    torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e4m3fnuz: "fp8e4b8",
}  # fmt: skip
FLOATING = (torch.float32, torch.float16, torch.bfloat16)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


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
    eight_bit: bool = False  # and it must be one of 8-bit numbers
    bulk_copy: bool = False  # the hardware's bulk copy must appear on sm_90, buffer loads on gfx942


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch that `recording` saw in place of a GPU."""

    kernel: Any  # the jit function
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]  # by the kernel's own names; options such as num_warps too


_record: list[Launch] | None = None


def interpreted(kernel: Any) -> bool:
    """Whether `kernel` runs in Triton's interpreter (TRITON_INTERPRET=1 at import), hence on CPU tensors."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def launcher(kernel: Any) -> Any:
    """`kernel` ready for `[grid](...)`, visible to torch.compile; the interpreter's functions pass through."""
    if _record is not None:
        return _Recorder(kernel, _record)
    return kernel if interpreted(kernel) else wrap_triton(kernel)


class _Recorder:
    """Stands for a kernel: a launch is written down."""

    def __init__(self, kernel: Any, record: list[Launch]) -> None:
        self.kernel, self.record = kernel, record

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            self.record.append(Launch(self.kernel, grid, dict(zip(names, args, strict=False)) | kwargs))

        return launch


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Within it every launch is written down and none is made, with the settings of a GPU of `arch`.

    With tensors of torch's `FakeTensorMode` on "cuda", which have shapes and no data, this shows all that a network
    would launch on a GPU that is not here. One at a time in a process.
    """
    global _record
    if _record is not None:
        raise RuntimeError("launches are being recorded already")
    _record = record = []
    try:
        with pretend(arch):
            yield record
    finally:
        _record = None


def on_device(launch: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`launch` with the GPU of its first tensor, alone or in a list, as the current one.

    Triton launches on the current device and stream, wherever the tensors are: a model on cuda:1 while cuda:0 is
    current would read another GPU's memory, or run on a stream that nothing waits for.
    """

    @functools.wraps(launch)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first: Any = next(x for x in args if x is not None)  # an optional one may be left out
        device = (first[0] if isinstance(first, list | tuple) else first).device
        if device.type != "cuda" or not torch.cuda.is_available():  # the latter: tensors without data, see `recording`
            return launch(*args, **kwargs)
        with torch.cuda.device(device):
            return launch(*args, **kwargs)

    return guarded


def use_descriptors(device: torch.device) -> bool:
    """Whether bulk copies by tensor descriptor pay: NVIDIA from sm_90 on. Elsewhere they become masked pointer loads.

    True also sees to it that the kernels find memory for the descriptors that they make: see `descriptor_memory`.
    """
    arch = arch_of(device)
    if not arch.startswith("sm_") or int(arch.removeprefix("sm_")) < 90:
        return False
    descriptor_memory()
    return True


def descriptor_memory() -> None:
    """Gives this thread memory for descriptors made in kernels, unless the caller has set an allocator of their own.

    Triton keeps its allocator in a ContextVar: a new thread has none, and Inductor's cached launchers set one at their
    first call alone, so a second thread that runs a compiled block would fail with "no allocator was set".
    """
    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        triton.set_allocator(_workspace)


def _workspace(size: int, _alignment: int, _stream: int | None) -> Tensor:
    # 128 bytes a descriptor, on the current device, which is the launch's. torch's allocator aligns to 512 and keeps
    # the block for this stream, graphs included.
    return torch.empty(size, dtype=torch.int8, device="cuda")
