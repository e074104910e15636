"""What every kernel file shares: variants to compile ahead of time, launches and their recording, descriptor memory.

Wrappers check their inputs once (`shape_checks`) and kernels trust them. Launch settings are data
(`tables/<arch>.json`), never tuned in a user's call: a GPU without a table gets `default.json` and one log line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
import torch._library.triton as library_triton
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
    eight_bit: bool = False  # and it must multiply 8-bit numbers
    bulk_copy: bool = False  # the hardware's bulk copy must appear on sm_90, buffer loads on gfx942


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch that `recording` recorded instead of running it."""

    kernel: Any  # the jit function
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]  # by the kernel's own names; options such as num_warps too


# Of this thread: the launches of another thread run meanwhile.
_record: ContextVar[list[Launch] | None] = ContextVar("record", default=None)


def triton_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.triton_op` for `reducio_fast::name`, without its search of the function's source for kernels.

    The search finds none here, because `launch` makes each launch, but imports torch._inductor: with torch 2.14 that
    was 2.0 s of the 7.6 s of a process that makes one clip on a CPU. What torch does with the kernels that it finds,
    keying compiled code by their source, `compile.compiled_blocks` does for ours.
    """

    def register(function: Callable[..., Any]) -> Any:
        search = getattr(library_triton, "get_inner_triton_kernels", None)  # None where torch names it otherwise
        library_triton.get_inner_triton_kernels = lambda function: []
        try:
            return torch.library.triton_op(f"reducio_fast::{name}", function, mutates_args={})
        finally:
            library_triton.get_inner_triton_kernels = search

    return register


def interpreted(kernel: Any) -> bool:
    """Whether `kernel` runs in Triton's interpreter (TRITON_INTERPRET=1 at import), hence on CPU tensors."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def launcher(kernel: Any) -> Any:
    """`kernel` ready for `[grid](...)`, visible to torch.compile; the interpreter's functions pass through."""
    if (record := _record.get()) is not None:
        return _Recorder(kernel, record)
    return kernel if interpreted(kernel) else wrap_triton(kernel)


class _Recorder:
    """Replaces a kernel: records each launch instead of running it."""

    def __init__(self, kernel: Any, record: list[Launch]) -> None:
        self.kernel, self.record = kernel, record

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            self.record.append(Launch(self.kernel, grid, dict(zip(names, args, strict=False)) | kwargs))

        return launch


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Context in which every launch is recorded and none is run, with the settings of a GPU of `arch`.

    With tensors of torch's `FakeTensorMode` on "cuda", which have shapes and no data, this lists everything that a
    network would launch on a GPU that is not present. A thread can have one recording at a time.
    """
    if _record.get() is not None:
        raise RuntimeError("launches are being recorded already")
    record: list[Launch] = []
    token = _record.set(record)
    try:
        with pretend(arch):
            yield record
    finally:
        _record.reset(token)


def on_device(launch: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Wraps `launch`: the GPU of its first tensor, alone or in a list, becomes the current device.

    Triton launches on the current device and stream, wherever the tensors are: a model on cuda:1 while cuda:0 is
    current would read another GPU's memory, or run on a stream that nothing waits for.
    """

    @functools.wraps(launch)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first: Any = next(x for x in args if x is not None)  # an optional tensor may be None
        device = (first[0] if isinstance(first, list | tuple) else first).device
        if device.type != "cuda" or not torch.cuda.is_available():  # the latter: fake tensors, see `recording`
            return launch(*args, **kwargs)
        with torch.cuda.device(device):
            return launch(*args, **kwargs)

    return guarded


def use_descriptors(device: torch.device) -> bool:
    """Whether bulk copies by tensor descriptor pay: NVIDIA from sm_90 on. Elsewhere they become masked pointer loads.

    If so, it also calls `descriptor_memory`, so that kernels have memory for the descriptors that they make.
    """
    arch = arch_of(device)
    if not arch.startswith("sm_") or int(arch.removeprefix("sm_")) < 90:
        return False
    descriptor_memory()
    return True


def descriptor_memory() -> None:
    """Sets this thread's allocator for descriptors made in kernels, unless the caller has already set one.

    Triton keeps its allocator in a ContextVar: a new thread has none, and Inductor's cached launchers set one only at
    their first call, so a second thread that runs a compiled block would fail with "no allocator was set".
    """
    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        triton.set_allocator(_workspace)


def _workspace(size: int, _alignment: int, _stream: int | None) -> Tensor:
    # 128 bytes per descriptor, on the current device, which is that of the launch. torch's allocator aligns to 512
    # bytes and keeps the block for this stream, also in graphs.
    return torch.empty(size, dtype=torch.int8, device="cuda")
