"""Compiles kernels for a GPU that need not be present, and finds what would make them slow there.

This module lists no kernels. Callers pass variants: objects with the fields of `triton_kernels.launch.Variant`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from .machine_code import MachineCode, disassemble, disassembler, read_amd, read_nvidia
from .targets import Target

VERSION: str = triton.__version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """The result of compiling one variant for one target. `problems` is empty if nothing is wrong."""

    variant: str
    arch: str
    registers: int = 0  # per thread; on AMD ordinary plus accumulation registers
    spilled: int = 0  # bytes per thread on NVIDIA, registers on AMD
    shared: int = 0  # bytes per block
    matrix: str = ""  # the matrix instruction found in the assembly
    bulk_copy: bool = False
    warps: int = 0
    code: MachineCode | None = None  # None if there is no disassembler, or the build failed
    problems: tuple[str, ...] = ()


def build(variant: Any, target: Target) -> Build:
    """Compile one variant. An exception of the compiler becomes the only problem of the build."""
    options = dict(variant.options)
    if target.backend == "cuda":
        for amd_only in ("waves_per_eu", "matrix_instr_nonkdim", "kpack"):
            options.pop(amd_only, None)
    names = variant.kernel.arg_names
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    # Keyed by position, as the compiler expects. Pointers and sizes are multiples of 16, as in real launches.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in variant.signature and variant.signature[name][0] in "*i" and name not in variant.unaligned
    }
    if target.backend == "hip":  # tensors under 2 GiB, which a real launch detects from its arguments
        for i, name in enumerate(names):
            if variant.signature.get(name, "").startswith("*"):
                attributes[(i,)] = [*attributes.get((i,), []), ["tt.pointer_range", 32]]
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    source = ASTSource(variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    try:
        compiled = triton.compile(source, target=target.triton_target, options=options)
    except Exception as error:  # the compiler raises many types; each means that this variant cannot ship
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Build(variant=variant.name, arch=target.arch, problems=(f"{type(error).__name__}: {lines[-1][:200]}",))
    return _judge(variant, target, compiled)


def build_all(variants: Iterable[Any], target: Target) -> list[Build]:
    return [build(variant, target) for variant in variants]


def _judge(variant: Any, target: Target, compiled: Any) -> Build:
    text = compiled.asm[target.assembly]
    registers, spilled = (_nvidia if target.backend == "cuda" else _amd)(compiled)
    shared = compiled.metadata.shared
    matrix = next((name for name in target.matrix_instructions if name in text), "")
    bulk = bool(target.bulk_copy) and target.bulk_copy in text
    problems = []
    if spilled:
        problems.append(f"{spilled} {'bytes' if target.backend == 'cuda' else 'registers'} spilled")
    if shared > target.shared_bytes:
        problems.append(f"{shared} bytes of shared memory, the limit is {target.shared_bytes}")
    if variant.matrix and not matrix:
        problems.append(f"no {' or '.join(target.matrix_instructions)}")
    if variant.eight_bit and not re.search(target.eight_bit_instruction, text):
        problems.append(f"no matrix instruction of 8-bit numbers ({target.eight_bit_instruction})")
    if variant.bulk_copy and target.arch in ("sm_90", "gfx942") and not bulk:
        problems.append(f"no {target.bulk_copy}")
    code = read(target, compiled)
    problems += code.hazards if code else ()
    return Build(
        variant=variant.name,
        arch=target.arch,
        registers=registers,
        spilled=spilled,
        shared=shared,
        matrix=matrix,
        bulk_copy=bulk,
        warps=compiled.metadata.num_warps,
        code=code,
        problems=tuple(problems),
    )


def read(target: Target, compiled: Any) -> MachineCode | None:
    """What `machine_code` reads from the compiled kernel; None without a disassembler."""
    if target.backend == "hip":
        return read_amd(compiled.asm["amdgcn"], target.mac_per_cycle)
    tool = disassembler()
    return None if tool is None else read_nvidia(disassemble(compiled.asm["cubin"], tool), target.mac_per_cycle)


def _nvidia(compiled: Any) -> tuple[int, int]:
    """Registers and spilled bytes per thread, from the machine code (PTX has neither)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    return int(match[1]), int(match[2])


def _amd(compiled: Any) -> tuple[int, int]:
    """The number of vector registers, and of spilled vector and scalar registers, from the assembly's metadata."""
    text = compiled.asm["amdgcn"]

    def note(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(match[1]) if match else 0

    return note("vgpr_count"), note("vgpr_spill_count") + note("sgpr_spill_count")
