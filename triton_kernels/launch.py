"""What every kernel file shares: checks, launch settings per GPU, and the list of what is compiled ahead of time.

Wrappers check their inputs once and kernels trust them. Launch settings are data (`tables/<arch>.json`), never tuned in
a user's call: a GPU without a table of its own gets `default.json` and one log line.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

LOG = logging.getLogger("reducio_fast")
INTERPRETER = "interpreter"  # the table of Triton's interpreter: small blocks, so that small tensors span several

Settings = dict[str, int]  # block sizes by the kernel's own constexpr names, and num_warps, num_stages, ...

# What a launch hands to the compiler rather than to the kernel's own parameters.
OPTIONS = ("num_warps", "num_stages", "waves_per_eu", "matrix_instr_nonkdim", "kpack")

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


@functools.cache
def arch_of(device: torch.device) -> str:
    """Name of a device's table: "sm_90", "gfx942", or the interpreter's for a CPU."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


_tuned_here: list[Path] = []


def add_tables(folder: Path) -> None:
    """Read `<arch>.json` of this folder, tuned on this machine, over the tables that are shipped."""
    if folder not in _tuned_here:
        _tuned_here.append(folder)
        table.cache_clear()


@functools.cache
def table(arch: str) -> dict[str, dict[str, Settings]]:
    """{op: {key: settings}} for `arch`: its own table over the default one, this machine's over both, by entry."""
    folder = resources.files(__package__) / "tables"
    merged = json.loads((folder / "default.json").read_text())
    found = [file for file in (folder / f"{arch}.json", *(f / f"{arch}.json" for f in _tuned_here)) if file.is_file()]
    for file in found:
        try:
            own = json.loads(file.read_text())
            merged |= {op: merged.get(op, {}) | entries for op, entries in own.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:  # a user's file may be cut short
            LOG.warning("launch table %s is ignored: %s", file, error)
    if not found and arch != "default":
        LOG.warning("no launch table for %s: kernels run with default settings", arch)
    return merged


def settings(op: str, key: str, arch: str) -> Settings:
    """Launch settings of `op` for the shape class `key`, or those under "*" where the tables do not list it."""
    entries = table(arch)[op]
    return dict(entries.get(key, entries["*"]))


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


# --- checks: ValueError with the argument's name and both values ------------------------------------------------------


def check_same(op: str, what: str, **values: Any) -> None:
    """The values, e.g. a dimension as each argument has it, are all equal."""
    (first, reference), *others = values.items()
    for name, value in others:
        if value != reference:
            raise ValueError(f"{op}: {name} has {what}={value}, {first} has {what}={reference}")


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """All on one device, all of one floating dtype; absent ones are skipped."""
    given = {name: x for name, x in tensors.items() if x is not None}
    check_same(op, "device", **{name: x.device for name, x in given.items()})
    check_same(op, "dtype", **{name: x.dtype for name, x in given.items()})
    name, x = next(iter(given.items()))
    if x.dtype not in FLOATING:
        raise ValueError(f"{op}: {name} has dtype={x.dtype}, kernels take {', '.join(map(str, FLOATING))}")


def check_contiguous(op: str, **tensors: Tensor | None) -> None:
    """Every tensor is dense in row-major order; absent ones are skipped."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {x.stride()} for shape {tuple(x.shape)}, it must be contiguous")


def check_shape(op: str, name: str, x: Tensor, *shape: int | None) -> None:
    """`x` has this shape; None stands for any size."""
    if x.ndim != len(shape) or any(want not in (None, has) for want, has in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must be ({wanted})")


def check_multiple(op: str, name: str, value: int, of: int) -> None:
    if value % of:
        raise ValueError(f"{op}: {name}={value} is not a multiple of {of}")
