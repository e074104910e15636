"""Counts and hazards of machine code, on fragments in the syntax of nvdisasm and of AMD's assembler."""

from __future__ import annotations

import dataclasses

import pytest

from reducio_fast.compile.aot import Build
from reducio_fast.compile.machine_code import MachineCode, read_amd, read_nvidia
from reducio_fast.measurement import machine_limits, rate_model


def sass(*lines: str) -> str:
    """Lines as nvdisasm prints them: a label stands alone, an instruction follows its address and ends with ;"""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )


HOPPER = (
    "LDG.E.128 R4, [R2.64]",
    ".L_x_1:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR12+0x30000], R2",
    "@!P0 BRA `(.L_x_2)",
    ".L_x_3:",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "@UP3 UTMALDG.2D [UR12], [UR16]",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P0 BRA `(.L_x_1)",
    "SHFL.BFLY PT, R3, R4, 0x2, 0x1f",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "UTMASTG.2D [UR8], [UR4]",
    "EXIT",
    ".L_x_2:",  # waits out of line: its backward branch is not the loop of the products
    "@!P0 BRA `(.L_x_2)",
    "BRA `(.L_x_3)",
    ".L_x_4:",
    "BRA `(.L_x_4)",
    "NOP",
)


def test_a_hopper_loop() -> None:
    code = read_nvidia(sass(*HOPPER), 512)
    assert (code.loop, code.matrix, code.matrix_shape, code.matrix_cycles) == (8, 2, "64x256x16", 256)
    assert (code.copies, code.loads, code.barriers, code.in_flight, code.division) == (1, 0, 1, 1, 0)
    assert (code.epilogue, code.epilogue_shuffles, code.epilogue_barriers, code.epilogue_copies) == (4, 1, 1, 1)
    assert code.hazards == ()


def test_an_ampere_loop() -> None:
    code = read_nvidia(
        sass(
            ".L_x_1:",
            "HMMA.16816.F32.BF16 R4, R132.reuse, R2, R4",
            "LDGSTS.E.BYPASS.LTC128B.128 [R203], [R204.64], !P3",
            "DEPBAR.LE SB0, 0x2",
            "I2F.U32.RP R7, R8",
            "MUFU.RCP R7, R7",
            "@P0 BRA `(.L_x_1)",
            "EXIT",
        ),
        256,
    )
    assert (code.matrix_shape, code.matrix_cycles, code.copies, code.in_flight, code.division) == (
        "16x8x16",
        8,
        1,
        2,
        2,
    )


def test_products_of_eight_bits_take_half_the_time() -> None:
    """Twice as many numbers in as many cycles; gfx950 runs gfx942's instruction at its own bfloat16 rate, no faster."""
    sass = "\n".join(
        [".L_x_1:"]
        + [f"  /*{16 * i:04x}*/ {text} ;" for i, text in enumerate(
            ("QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR20], R24, gsb0", "@P0 BRA `(.L_x_1)", "EXIT")
        )]
    )  # fmt: skip
    assert read_nvidia(sass, 512).matrix_cycles == 64 * 128 * 32 // (512 * 4 * 2)
    amd = "\n".join(
        [".LBB0_1:", "\tv_mfma_f32_{} a[0:3], v[0:1], v[2:3], a[0:3]", "\ts_cbranch_scc1 .LBB0_1", "\ts_endpgm"]
    )
    assert read_amd(amd.format("16x16x32_fp8_fp8"), 256).matrix_cycles == 16 * 16 * 32 // 512
    assert read_amd(amd.format("16x16x32_fp8_fp8"), 512).matrix_cycles == 16 * 16 * 32 // 512
    assert read_amd(amd.format("16x16x128_f8f6f4"), 512).matrix_cycles == 16 * 16 * 128 // 1024


def test_code_without_products_has_no_loop() -> None:
    code = read_nvidia(sass(".L_x_1:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_1)", "EXIT"), 256)
    assert code.instructions == 3 and code.loop == code.epilogue == code.matrix == 0


@pytest.mark.parametrize(
    ("between", "hazards"),
    [
        (("FADD R97, R1, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x0"), 1),
        (("WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R97, R1, R2"), 0),
        (("WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD R97, R1, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x0"), 1),
        (("FADD R100, R1, R2", "STS.128 [R96], R4", "WARPGROUP.DEPBAR.LE gsb0, 0x0"), 0),
        (("LDS.128 R94, [R1]", "WARPGROUP.DEPBAR.LE gsb0, 0x0"), 1),
    ],
)
def test_registers_of_a_product_under_way(between: tuple[str, ...], hazards: int) -> None:
    """Its four registers, R96 to R99, must not be written before a wait for all products; also over the back edge."""
    product = "HGMMA.64x64x16.F32.BF16 R56, R96, gdesc[UR20].tnspB, R56, gsb0"
    for loop in ((product, *between), (*between, product)):
        assert len(read_nvidia(sass(".L_x_1:", *loop, "@P0 BRA `(.L_x_1)", "EXIT"), 512).hazards) == hazards


def amd(*lines: str) -> str:
    return "\n".join(
        line if line.endswith(":") else f"\t{line}" for line in (".LBB0_1:", *lines, "s_cbranch_scc1 .LBB0_1")
    )


PRODUCT = "v_mfma_f32_16x16x16_bf16 v[2:5], v[70:71], v[80:81], v[2:5]"


def test_an_amd_loop() -> None:
    code = read_amd(
        amd(
            "buffer_load_dwordx4 v[66:69], v1, s[4:7], 0 offen",
            *[PRODUCT] * 10,
            "s_setprio 1",
            "ds_read_u16 v7, v8",
            "v_add_u32_e32 v1, v2, v3",
            "s_waitcnt vmcnt(0)",
            "ds_write_b128 v1, v[66:69]",
            "s_waitcnt lgkmcnt(0)",
            "s_barrier",
        )
        + "\n\tds_read_b128 v[1:4], v5\n\ts_endpgm\n",
        256,
    )
    assert (code.matrix, code.matrix_shape, code.matrix_cycles, code.covered) == (10, "16x16x16", 160, 160)
    assert (code.priority, code.narrow_reads, code.shared_reads, code.vector, code.copies) == (1, 1, 1, 1, 1)
    assert code.epilogue == 2 and code.hazards == ()


@pytest.mark.parametrize(("wait", "races"), [("lgkmcnt(0)", 0), ("lgkmcnt(1)", 1), ("vmcnt(0)", 1)])
def test_reads_that_a_barrier_leaves_behind(wait: str, races: int) -> None:
    """Another wave writes to shared memory after the barrier, where this one still reads."""
    loop = (PRODUCT, "ds_read_b128 v[1:4], v5", "ds_read_b128 v[6:9], v5", f"s_waitcnt {wait}", "s_barrier")
    code = read_amd(amd(*loop, "ds_write_b128 v5, v[1:4]", "s_waitcnt lgkmcnt(0)", "s_barrier") + "\n\ts_endpgm\n", 256)
    assert len(code.hazards) == races
    only_reads = read_amd(amd(*loop, "s_waitcnt lgkmcnt(0)") + "\n\ts_endpgm\n", 256)
    assert only_reads.hazards == ()


def build(**changes: object) -> Build:
    code = MachineCode(
        instructions=3493, loop=123, matrix=8, matrix_shape="64x128x16", matrix_cycles=512, copies=2, barriers=4,
        in_flight=1, epilogue=2869, epilogue_shuffles=392, epilogue_barriers=82,
    )  # fmt: skip
    whole = Build(
        variant="conv3d bf16 128->128 k3 residual stats", arch="sm_90", registers=229, shared=196640, warps=8, code=code
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def test_limits_name_what_is_exceeded() -> None:
    """Each committed limit is about a count that exists; a build beyond it is reported by name and both values."""
    known = set(machine_limits.counts(build()))
    oldest, *newer = machine_limits.limits().values()
    for targets in (oldest, *newer):
        for target, entries in targets.items():
            for variant, entry in entries.items():
                assert set(entry) <= {"at most", "at least", "measured"}, (target, variant)
                assert set(entry.get("at most", {})) | set(entry.get("at least", {})) <= known, (target, variant)
    assert all({t: set(e) for t, e in other.items()} == {t: set(e) for t, e in oldest.items()} for other in newer)
    code = build().code
    assert code is not None
    worse = build(registers=9999, code=dataclasses.replace(code, in_flight=0, division=3))
    messages = machine_limits.exceeded(worse, "3.8.0")
    assert any(line.startswith("registers: 9999, the limit is ") for line in messages)
    assert "in_flight: 0, it must be 1 or more" in messages
    assert machine_limits.divides(worse) == ["3 instructions of an integer division in the loop"]
    assert machine_limits.exceeded(build(code=None), "3.8.0") == machine_limits.exceeded(worse, "2.0.0") == []


def test_other_compilers_are_not_held() -> None:
    assert machine_limits.held("3.6.0") and machine_limits.held("3.8.1") and not machine_limits.held("2.0.0")


def test_the_model_of_the_chip() -> None:
    """A layer of 128 channels on an H200 runs at 538 TFLOP/s in the simulation of its machine code. Less work outside
    of the loop is faster; a second block on the multiprocessor hides some of it; drained products do not overlap."""
    shape = rate_model.convolution(128, 128, 16, 320, 27, {"BLOCK_M": 256, "BLOCK_K": 128, "BLOCK_C": 64})
    assert shape[1:] == (6481, 54)
    now = rate_model.rate(build(), *shape)
    assert now == pytest.approx(538e12, rel=0.05)
    code = build().code
    assert code is not None
    short = dataclasses.replace(code, epilogue=1405, epilogue_barriers=16)
    assert rate_model.rate(build(code=short), *shape) > 1.1 * now
    assert rate_model.blocks_at_once(build()) == 1
    assert rate_model.rate(build(registers=120, shared=90000), *shape) > now
    assert rate_model.rate(build(code=dataclasses.replace(code, in_flight=0)), *shape) < now
    assert rate_model.rate(build(arch="sm_75"), *shape) is None
    assert rate_model.rate(build(code=None), *shape) is None


def test_the_model_of_tcgen05() -> None:
    """Its instruction names no shape: the rate follows from the products of a pass, twice as many in FP8. It stays
    below the dense peak of a B200 under load, 1.87 PFLOP/s; attention has no prediction."""
    code = MachineCode(
        instructions=4000, loop=135, matrix=4, matrix_shape="tcgen05", copies=2, epilogue=3603, epilogue_barriers=138
    )
    wide = build(arch="sm_100", variant="conv3d bf16 256->256", registers=82, shared=196656, code=code)
    shape = rate_model.convolution(256, 256, 16, 160, 27, {"BLOCK_M": 128, "BLOCK_K": 256, "BLOCK_C": 64})
    now = rate_model.rate(wide, *shape)
    assert now is not None and 0.3e15 < now < 1.87e15
    in_fp8 = rate_model.rate(dataclasses.replace(wide, variant="quantised_conv3d fp8e4nv 256->256"), *shape)
    assert now < in_fp8 < 2 * now
    softmax = dataclasses.replace(code, transcendental=64)
    assert rate_model.rate(dataclasses.replace(wide, code=softmax), *shape) is None
    assert machine_limits.counts(wide)["blocks"] == 1
