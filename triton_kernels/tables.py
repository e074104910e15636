"""Launch settings per GPU: data (`tables/<arch>.json`), never tuned in a user's call."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import resources
from pathlib import Path
from typing import Any

import torch

LOG = logging.getLogger("reducio_fast")
INTERPRETER = "interpreter"  # the table of Triton's interpreter: small blocks, so that small tensors span several

Settings = dict[str, int]  # block sizes by the kernel's own constexpr names, and num_warps, num_stages, ...

# Settings that go to the compiler, not to parameters of the kernel.
OPTIONS = ("num_warps", "num_stages", "waves_per_eu", "matrix_instr_nonkdim", "kpack")


# What the "plan" of a tuned table may name for a shape.
IMPLEMENTATIONS = ("kernel", "vendor", "flash-attn")

# Architectures without a table of their own use that of a relative with the same matrix instructions. sm_80's table has
# no blocks that need more shared memory than sm_86 and sm_89 have (99 KB).
RELATIVES = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_103": "sm_100"}

_pretended: ContextVar[str | None] = ContextVar("pretended", default=None)


@contextmanager
def pretend(arch: str) -> Iterator[None]:
    """Context in which, for this thread, every GPU counts as one of `arch`, to inspect launches without that GPU."""
    token = _pretended.set(arch)
    try:
        yield
    finally:
        _pretended.reset(token)


def arch_of(device: torch.device) -> str:
    """Name of a device's table: "sm_90", "gfx942", or the interpreter's for a CPU."""
    if device.type != "cuda":
        return INTERPRETER
    # A device without an index is the current one, which can change, so results are cached by index.
    return _pretended.get() or _arch_of(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _arch_of(device: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


_tuned_here: list[Path] = []


def add_tables(folder: Path) -> None:
    """Adds a folder whose `<arch>.json`, tuned on this machine, overrides the shipped tables."""
    if folder not in _tuned_here:
        _tuned_here.append(folder)
        table.cache_clear()


@functools.cache
def table(arch: str) -> dict[str, dict[str, Settings]]:
    """{op: {key: settings}} for `arch`: the default table, overridden by entry by its own, then by this machine's."""
    folder = resources.files(__package__) / "tables"
    merged = json.loads((folder / "default.json").read_text(encoding="utf-8"))
    shipped = folder / f"{arch}.json"
    if not shipped.is_file():
        shipped = folder / f"{RELATIVES.get(arch, arch)}.json"
    files = [file for file in (shipped, *(f / f"{arch}.json" for f in _tuned_here)) if file.is_file()]
    for file in files:
        try:
            own_table = json.loads(file.read_text(encoding="utf-8"))
            for op, entries in own_table.items():
                _check_entries(op, entries)
            merged |= {op: merged.get(op, {}) | entries for op, entries in own_table.items()}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:  # it may be cut short
            LOG.warning("launch table %s is ignored: %s", file, error)
    if not files and arch != "default":
        LOG.warning("no launch table for %s: kernels run with default settings", arch)
    return merged


def _check_entries(op: str, entries: dict[str, Any]) -> None:
    """Raises ValueError, or what a wrong type raises, for entries of `op` that no launch or plan could follow."""
    for key, entry in entries.items():
        if op == "plan":
            if entry not in IMPLEMENTATIONS:
                raise ValueError(f"plan: {key}: {entry!r:.60} is none of {', '.join(IMPLEMENTATIONS)}")
            continue
        if any(type(value) is not int or value < 0 for value in entry.values()):
            raise ValueError(f"{op}: {key}: its values must be whole numbers from 0")


def settings(op: str, key: str, arch: str) -> Settings:
    """Launch settings of `op` for the shape class `key`, or those under "*" where the tables do not list it."""
    entries = table(arch)[op]
    return dict(entries.get(key, entries["*"]))
