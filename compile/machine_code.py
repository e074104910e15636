"""Reads compiled machine code: counts instructions of the matrix loop and of the code after it, finds known hazards.

NVIDIA code is disassembled by nvdisasm, which is in Triton's wheel and on PyPI as nvidia-cuda-nvdisasm. AMD code is the
assembly that Triton's compiler returns. Nothing is executed. A loop is the region of a backward branch without an exit
and without another such loop in it. Of several loops that multiply matrices, the first is counted, which is the one
without masks.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCode:
    """Counts of one kernel, in instructions unless stated otherwise.

    covered: cycles of matrix instructions between a load from memory and the wait for it, the minimum over all loads in
    the loop. in_flight: groups of asynchronous products, or of copies, that the loosest wait of the loop leaves
    running; -1 if there is no such wait."""

    instructions: int  # of the whole kernel
    loop: int = 0  # of one pass of the matrix loop; 0 if there is none
    matrix: int = 0  # matrix instructions among them
    matrix_shape: str = ""  # the most frequent one, such as "64x256x16"
    matrix_cycles: int = 0  # of one warp's matrix instructions, if no other warp uses the matrix unit
    vector: int = 0  # AMD's vector instructions except those of the matrix unit, four cycles each
    transcendental: int = 0  # MUFU; v_exp and similar
    division: int = 0  # instructions that indicate an integer division by a run-time value
    copies: int = 0  # loads from memory: TMA, LDGSTS, buffer loads
    loads: int = 0  # loads from memory through a register on NVIDIA, which therefore wait
    barriers: int = 0
    shared_reads: int = 0
    narrow_reads: int = 0  # of 16 bits each: an operand that had to be transposed
    in_flight: int = -1
    covered: int = 0
    priority: int = 0  # s_setprio: two warps take turns at the matrix unit
    epilogue: int = 0  # after the loop
    epilogue_shuffles: int = 0
    epilogue_barriers: int = 0
    epilogue_copies: int = 0  # bulk stores
    hazards: tuple[str, ...] = ()


# ---- NVIDIA ----------------------------------------------------------------------------------------------------------

_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_SASS_LABEL = re.compile(r"^(\.L_x_\d+):")
_SASS_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_SASS_SHAPE = re.compile(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)")


def disassembler() -> Path | None:
    """nvdisasm: Triton's own, else that of the wheel nvidia-cuda-nvdisasm, else one on the path, else None."""
    places = []
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin"), ("nvidia", "cuda_nvdisasm/bin")):
        spec = importlib.util.find_spec(package)
        places += [Path(root) / inside / "nvdisasm" for root in (spec.submodule_search_locations or ())] if spec else []
    installed = next((place for place in places if place.is_file()), None)
    on_path = shutil.which("nvdisasm")
    return installed or (Path(on_path) if on_path else None)


def disassemble(cubin: bytes, tool: Path) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout


def read_nvidia(text: str, mac_per_cycle: int) -> MachineCode:
    """Counts from nvdisasm's text. mac_per_cycle: of one of an SM's four matrix units, in 16-bit types."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _SASS.search(line):
            code.append((instruction[1], instruction[2]))
    while code and code[-1][0] in ("NOP", "BRA"):  # padding, and the endless branch before it
        code.pop()
    branches = (
        (labels.get(target[1], len(code)), i)
        for i, (name, operands) in enumerate(code)
        if name.startswith("BRA") and (target := _SASS_TARGET.search(operands))
    )
    start, end = _loop(branches, [name.startswith("EXIT") for name, _ in code], [_is_mma(name) for name, _ in code])
    last = max((i for i, (name, _) in enumerate(code) if name.startswith("EXIT")), default=len(code) - 1) + 1
    loop, after = code[start:end], code[end:last] if end else []
    waits = [
        int(m[1], 16)
        for name, operands in loop
        if "DEPBAR.LE" in name and (m := re.match(r".*,\s*0x([0-9a-f]+)", operands))
    ]
    shapes = [(shape, not name.startswith("H")) for name, _ in loop if (shape := _sass_shape(name))]
    return MachineCode(
        instructions=last,
        loop=len(loop),
        matrix=len(shapes),
        matrix_shape=_most([shape for shape, _ in shapes]),
        matrix_cycles=sum(
            _cycles(shape, mac_per_cycle * (4 if shape.startswith("64x") else 1) * (2 if eight_bit else 1))
            for shape, eight_bit in shapes
        ),
        transcendental=_count(loop, "MUFU"),
        division=_count(loop, "MUFU.RCP", "I2F"),
        copies=_count(loop, "UTMALDG", "LDGSTS"),
        loads=_count(loop, "LDG.", "LD."),
        barriers=_count(loop, "BAR."),
        shared_reads=_count(loop, "LDS"),
        narrow_reads=_count(loop, "LDS.U16"),
        in_flight=max(waits, default=-1),
        epilogue=len(after),
        epilogue_shuffles=_count(after, "SHFL"),
        epilogue_barriers=_count(after, "BAR."),
        epilogue_copies=_count(after, "UTMASTG"),
        hazards=tuple(_overwritten_operands(loop)),
    )


def _is_mma(name: str) -> bool:
    return name.startswith(("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "QMMA", "UTCHMMA", "UTCQMMA"))


def _sass_shape(name: str) -> str:
    if shape := _SASS_SHAPE.match(name):
        return "x".join(shape.groups())
    if dense := re.match(r"(?:H|I|Q)MMA\.(16)(8)(\d+)", name):
        return "x".join(dense.groups())
    return "tcgen05" if name.startswith("UTC") and _is_mma(name) else ""


def _overwritten_operands(loop: list[tuple[str, str]]) -> Iterable[str]:
    """Yields writes to registers that a wgmma may still read.

    wgmma reads register operands after it is issued, so they must not change before a wait that covers it. ptxas 12.8
    and 12.9 are known to reuse them too early. The search crosses the back edge once.
    """
    twice = loop + loop
    for i, (name, operands) in enumerate(loop):
        source = re.match(r"\s*R\d+, (R\d+)\b", operands)
        if not re.match(r"[HQI]GMMA", name) or source is None:
            continue
        first = int(source[1][1:])
        registers = range(first, first + 4)
        for later, text in twice[i + 1 : i + 1 + len(loop)]:
            if later.startswith("WARPGROUP.DEPBAR") and re.search(r",\s*0x0\b", text):
                break
            written = re.match(r"\s*R(\d+)", text)
            if written is None or _is_mma(later) or later.startswith(("ST", "RED", "BAR", "WARP", "SYNCS", "R2UR")):
                continue
            width = 4 if ".128" in later else 2 if ".64" in later or "WIDE" in later or later == "CS2R" else 1
            if any(int(written[1]) + k in registers for k in range(width)):
                yield f"{later} writes R{written[1]}, which {name} may still read"


# ---- AMD -------------------------------------------------------------------------------------------------------------

_AMD = re.compile(r"^\t([a-z]\w+)(.*)$")
_AMD_LABEL = re.compile(r"^(\.LBB\d+_\d+):")
_MFMA = re.compile(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_?(\w*)")


def read_amd(text: str, mac_per_cycle: int) -> MachineCode:
    """Counts from the compiler's text. mac_per_cycle: of one of a compute unit's four matrix units, in 16-bit types."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _AMD_LABEL.match(line):
            labels[label[1]] = len(code)
        elif (instruction := _AMD.match(line)) and instruction[1].startswith(("s_", "v_", "ds_", "buffer_", "global_")):
            code.append((instruction[1], instruction[2]))
            if instruction[1] == "s_endpgm":
                break
    branches = (
        (labels.get(operands.split()[0], len(code)), i)
        for i, (name, operands) in enumerate(code)
        if name.startswith(("s_cbranch", "s_branch"))
    )
    start, end = _loop(branches, [name == "s_endpgm" for name, _ in code], ["v_mfma" in name for name, _ in code])
    loop, after = code[start:end], code[end:] if end else []
    shapes = [f"{m[1]}x{m[2]}x{m[3]}" + "_f32" * (m[4] in ("f32", "")) for name, _ in loop if (m := _MFMA.match(name))]

    def cycles(name: str) -> int:
        m = _MFMA.match(name)
        if m is None:
            return 0
        # gfx942's FP8 instruction is twice as fast as its bfloat16 one. gfx950 has it too, at the same 512 per cycle;
        # its instruction that is twice as fast as bfloat16 is another one, f8f6f4.
        rate = 512 if m[4].endswith("_fp8") else mac_per_cycle * 2 if m[4].endswith("f6f4") else mac_per_cycle
        return _cycles(f"{m[1]}x{m[2]}x{m[3]}", rate // (8 if m[4] in ("f32", "") else 1))

    return MachineCode(
        instructions=len(code),
        loop=len(loop),
        matrix=len(shapes),
        matrix_shape=_most(shapes),
        matrix_cycles=sum(cycles(name) for name, _ in loop),
        vector=_count(loop, "v_") - len(shapes),
        transcendental=_count(loop, "v_exp", "v_log", "v_rcp", "v_rsq"),
        division=_count(loop, "v_rcp_iflag", "v_cvt_f32_u32"),
        copies=_count(loop, "buffer_load", "global_load"),
        barriers=_count(loop, "s_barrier"),
        shared_reads=_count(loop, "ds_read"),
        narrow_reads=_count(loop, "ds_read_u16"),
        covered=_covered(loop, [cycles(name) for name, _ in loop]),
        priority=_count(loop, "s_setprio"),
        epilogue=len(after),
        epilogue_barriers=_count(after, "s_barrier"),
        hazards=tuple(_shared_memory_races(loop)),
    )


def _waits_for(operands: str, counter: str) -> int | None:
    match = re.search(rf"{counter}\((\d+)\)", operands)
    return int(match[1]) if match else None


def _covered(loop: list[tuple[str, str]], cycles: list[int]) -> int:
    """Matrix cycles between a memory access and the wait for it: the minimum over two passes. AMD counts stores too."""
    least: int | None = None
    pending: list[int] = []  # issue time of each load in flight
    now = 0
    for (name, operands), spent in zip(loop + loop, cycles + cycles, strict=True):
        if name.startswith(("buffer_load", "global_load", "buffer_store", "global_store")):
            pending.append(now)
        elif name == "s_waitcnt" and (left := _waits_for(operands, "vmcnt")) is not None:
            done, pending = pending[: max(0, len(pending) - left)], pending[max(0, len(pending) - left) :]
            for issued in done:
                least = now - issued if least is None else min(least, now - issued)
        now += spent
    return least or 0


def _shared_memory_races(loop: list[tuple[str, str]]) -> Iterable[str]:
    """Yields barriers that a warp passes with reads of shared memory outstanding, before another warp writes there.

    Triton 3.6 to 3.8 do this on gfx942 in loops of eight warps whose two halves take turns, which gives wrong results.
    The search follows the loop twice and reports each barrier once.
    """
    twice = loop + loop
    outstanding, reported = 0, set[int]()
    for i, (name, operands) in enumerate(twice):
        if name.startswith("ds_read"):
            outstanding += 1
        elif name == "s_waitcnt" and (left := _waits_for(operands, "lgkmcnt")) is not None:
            outstanding = min(outstanding, left)
        elif name == "s_barrier" and outstanding and i % len(loop) not in reported:
            following = (later for later, _ in twice[i + 1 :])
            until = next((k for k, later in enumerate(following) if later == "s_barrier"), len(twice) - i - 1)
            if any(later.startswith("ds_write") for later, _ in twice[i + 1 : i + 1 + until]):
                reported.add(i % len(loop))
                yield f"{outstanding} reads of shared memory are outstanding at a barrier before a write"


# ---- both ------------------------------------------------------------------------------------------------------------


def _loop(branches: Iterable[tuple[int, int]], ends: list[bool], matrix: list[bool]) -> tuple[int, int]:
    """(first, one past the last) instruction of the first innermost matrix loop; (0, 0) if there is none."""
    spans = [
        (to, at + 1) for to, at in branches if to <= at and not any(ends[to : at + 1]) and any(matrix[to : at + 1])
    ]
    innermost = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return min(innermost, default=(0, 0))


def _cycles(shape: str, mac_per_cycle: int) -> int:
    if shape.count("x") != 2:
        return 0
    m, n, k = map(int, shape.split("x"))
    return -(-m * n * k // mac_per_cycle)


def _count(code: list[tuple[str, str]], *prefixes: str) -> int:
    return sum(name.startswith(prefixes) for name, _ in code)


def _most(values: list[str]) -> str:
    return max(values, key=values.count, default="")
