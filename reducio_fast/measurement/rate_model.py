"""A model of the chip: from counts of a kernel's machine code to the rate that it should reach. A prediction, no more.

A pass of the loop takes what is scarcer, matrix units or issue slots (one instruction a cycle on each of four
schedulers); both, one after the other, where asynchronous products are waited for until none is left, and on AMD, where
a wave's vector instructions take four cycles each and what of a load's latency is not covered comes on top. What
follows the loop is issue slots plus a fixed price a barrier; it is exposed where one block fills a multiprocessor. The
constants come from a replay of the scheduling bits of sm_90 code, which they follow to 10%; the other chips share them
for want of better ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..compile.aot import Build

BARRIER = 150  # cycles that warps wait for each other and for shared memory
PROLOGUE = 3500  # cycles: descriptors or addresses, first loads
EFFICIENCY = 0.83  # of a loop whose matrix units are the scarcest
LATENCY = 600  # cycles of a load from memory on AMD
EXPOSED = 0.3  # share of prologue and epilogue that a second block on the multiprocessor does not hide


@dataclass(frozen=True, slots=True)
class Chip:
    units: int  # multiprocessors or compute units
    clock: float  # Hz under load
    registers: int  # 32-bit, of a unit
    shared: int  # bytes of a unit
    warp: int


CHIPS = {
    "sm_80": Chip(108, 1.33e9, 65536, 164 * 1024, 32),
    "sm_90": Chip(132, 1.65e9, 65536, 228 * 1024, 32),
    "gfx942": Chip(304, 1.55e9, 131072, 64 * 1024, 64),
    "gfx950": Chip(256, 1.9e9, 131072, 160 * 1024, 64),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A call whose kernel `compile-check` builds. `passes(build)`: of the loop, a block of the grid."""

    variant: str
    what: str
    flops: float  # two a multiply-add, those that the result needs
    blocks: int
    passes: int


def convolution(C: int, K: int, frames: int, side: int, taps: int, settings: dict[str, int]) -> tuple[float, int, int]:
    """(flops, blocks, passes) of a 3x3 convolution over `frames` of side x side with these launch settings."""
    positions = frames * (side + 2) ** 2
    blocks = -(-positions // settings["BLOCK_M"]) * -(-K // settings["BLOCK_K"])
    return 2.0 * frames * side * side * C * K * taps, blocks, taps * -(-C // settings["BLOCK_C"])


def attention(B: int, L: int, S: int, N: int, D: int, settings: dict[str, int]) -> tuple[float, int, int]:
    blocks = B * N * -(-L // settings["BLOCK_L"])
    return 4.0 * B * N * L * S * D, blocks, -(-S // settings["BLOCK_S"])


def blocks_at_once(build: Build) -> int:
    """Blocks that one multiprocessor holds, by registers, shared memory and warps."""
    chip = CHIPS[build.arch]
    by_registers = chip.registers // max(1, build.registers * build.warps * chip.warp)
    by_shared = chip.shared // (build.shared + 1024) if build.shared else 32
    return max(1, min(by_registers, by_shared, (64 if chip.warp == 32 else 32) // build.warps))


def rate(build: Build, flops: float, blocks: int, passes: int) -> float | None:
    """Predicted FLOP/s of a kernel with a matrix loop; None where the model does not know the chip or its code."""
    code, chip = build.code, CHIPS.get(build.arch)
    if code is None or chip is None or not code.matrix_cycles:
        return None
    schedulers = build.warps / 4
    # wgmma is counted for the four warps of a group, which work on all four matrix units at once.
    matrix = code.matrix_cycles * schedulers
    issue = code.loop * schedulers
    if chip.warp == 64:
        a_pass = matrix + 4 * code.vector * schedulers + max(0, LATENCY - code.covered * schedulers)
    elif code.matrix_shape.startswith("64x") and code.in_flight == 0:
        a_pass = matrix + issue
    else:
        a_pass = max(matrix / EFFICIENCY, issue)
    outside = PROLOGUE + code.epilogue * schedulers + code.epilogue_barriers * BARRIER
    at_once = blocks_at_once(build)
    share = 1.0 if at_once == 1 else EXPOSED
    waves = -(-blocks // (chip.units * at_once))
    # Blocks side by side share the unit: its work is the same, whichever is first.
    cycles = waves * at_once * (passes * a_pass + share * outside)
    return flops / (cycles / chip.clock)
