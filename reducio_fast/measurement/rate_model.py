"""A model of the chip: predicts the rate that a kernel should reach from counts of its machine code.

A pass of the loop takes the longer of two times: that of the matrix units and that of the issue slots (one instruction
per cycle on each of four schedulers). It takes their sum if the loop waits until no asynchronous product is running. On
AMD it takes the sum of the matrix units' time, four cycles for each vector instruction of a wave, and the part of a
load's latency that is not covered. The code after the loop takes its issue slots plus a fixed time per barrier, and
counts in full if one block fills a multiprocessor. A tcgen05 instruction (sm_100) does not name its shape, so a pass
gets its share of the products that the result needs. Attention on sm_100 has no prediction: how much of its softmax
runs beside products depends on barriers that the counts do not show. The constants come from a replay of the scheduling
bits of sm_90 code, which they follow to 10%; the other chips use the same constants, because there are no better ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..compile.aot import Build
from ..compile.targets import TARGETS

BARRIER = 150  # cycles that warps wait for each other and for shared memory
PROLOGUE = 3500  # cycles: descriptors or addresses, first loads
EFFICIENCY = 0.83  # of a loop that is limited by the matrix units
LATENCY = 600  # cycles of a load from memory on AMD
EXPOSED = 0.3  # share of prologue and epilogue that a second block on the multiprocessor does not hide


@dataclass(frozen=True, slots=True)
class Chip:
    units: int  # multiprocessors or compute units
    clock: float  # Hz under load
    registers: int  # 32-bit, per unit
    shared: int  # bytes per unit
    warp: int


CHIPS = {
    "sm_80": Chip(108, 1.33e9, 65536, 164 * 1024, 32),
    "sm_90": Chip(132, 1.65e9, 65536, 228 * 1024, 32),
    # B200: 148 multiprocessors, 2.25 PFLOP/s of dense bfloat16 at a boost of 1.85 GHz (NVIDIA's page on HGX B200).
    # Assumed under load: the share of its boost that an H200 keeps.
    "sm_100": Chip(148, 1.54e9, 65536, 228 * 1024, 32),
    "gfx942": Chip(304, 1.55e9, 131072, 64 * 1024, 64),
    "gfx950": Chip(256, 1.9e9, 131072, 160 * 1024, 64),
}


def convolution(C: int, K: int, frames: int, side: int, taps: int, settings: dict[str, int]) -> tuple[float, int, int]:
    """(flops, blocks, passes) of a 3x3 convolution over `frames` of side x side with these launch settings.

    flops: two per multiply-add that the result needs. passes: of the loop, per block of the grid.
    """
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
    """Predicted FLOP/s of a kernel with a matrix loop; None if the model lacks the chip or the cycles of its code."""
    code, chip = build.code, CHIPS.get(build.arch)
    tcgen05 = code is not None and code.matrix_shape == "tcgen05"
    if code is None or chip is None or not (code.matrix_cycles or tcgen05) or (tcgen05 and code.transcendental):
        return None
    schedulers = build.warps / 4
    # wgmma is counted for the four warps of a group, which work on all four matrix units at once.
    matrix = code.matrix_cycles * schedulers
    if tcgen05:
        per_cycle = 4 * TARGETS[build.arch].mac_per_cycle * (2 if "fp8" in build.variant else 1)
        matrix = flops / 2 / (blocks * passes) / per_cycle
    issue = code.loop * schedulers
    if chip.warp == 64:
        pass_cycles = matrix + 4 * code.vector * schedulers + max(0, LATENCY - code.covered * schedulers)
    elif code.matrix_shape.startswith("64x") and code.in_flight == 0:
        pass_cycles = matrix + issue
    else:
        pass_cycles = max(matrix / EFFICIENCY, issue)
    outside = PROLOGUE + code.epilogue * schedulers + code.epilogue_barriers * BARRIER
    at_once = blocks_at_once(build)
    share = 1.0 if at_once == 1 else EXPOSED
    waves = -(-blocks // (chip.units * at_once))
    # Concurrent blocks share the unit: its work is the same in any order of the blocks.
    cycles = waves * at_once * (passes * pass_cycles + share * outside)
    return flops / (cycles / chip.clock)
