"""The GPUs that kernels are built for, and what each of them allows: limits of one thread block, instruction names."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One GPU architecture. Sources: CUDA programming guide (compute capabilities), AMD CDNA3 and CDNA4 ISA guides."""

    arch: str  # as launch tables name it
    gpu: str  # a card that has it
    backend: str
    triton_arch: int | str
    warp_size: int
    shared_bytes: int  # the most that one block may use
    # TMA on NVIDIA; buffer instructions on AMD, whose bounds the hardware checks; empty where there is neither.
    bulk_copy: str
    matrix_instructions: tuple[str, ...]  # any one of these in the assembly proves that matrix units are used
    eight_bit_instruction: str  # the same for 8-bit numbers, as a regular expression
    mac_per_cycle: int  # 16-bit multiply-adds of one matrix unit; a multiprocessor (compute unit) has four

    @property
    def triton_target(self) -> GPUTarget:
        return GPUTarget(self.backend, self.triton_arch, self.warp_size)

    @property
    def assembly(self) -> str:
        """Key of the readable assembly in the output of Triton's compiler."""
        return "ptx" if self.backend == "cuda" else "amdgcn"


TARGETS: dict[str, Target] = {
    target.arch: target
    for target in (
        Target(arch="sm_80", gpu="A100", backend="cuda", triton_arch=80, warp_size=32,
               shared_bytes=163 * 1024, bulk_copy="",
               matrix_instructions=("mma.sync",), eight_bit_instruction=r"mma\.sync\S+\.s8\.s8",
               mac_per_cycle=256),
        Target(arch="sm_90", gpu="H100, H200", backend="cuda", triton_arch=90, warp_size=32,
               shared_bytes=227 * 1024, bulk_copy="cp.async.bulk.tensor",
               matrix_instructions=("wgmma.mma_async",), eight_bit_instruction=r"wgmma\.mma_async\S+\.e4m3\.e4m3",
               mac_per_cycle=512),
        Target(arch="sm_100", gpu="B200", backend="cuda", triton_arch=100, warp_size=32,
               shared_bytes=227 * 1024, bulk_copy="cp.async.bulk.tensor",
               matrix_instructions=("tcgen05.mma",), eight_bit_instruction=r"tcgen05\.mma\S+kind::f8f6f4",
               mac_per_cycle=1024),
        Target(arch="gfx942", gpu="MI300X", backend="hip", triton_arch="gfx942", warp_size=64,
               shared_bytes=64 * 1024, bulk_copy="buffer_load",
               matrix_instructions=("v_mfma",), eight_bit_instruction=r"v_mfma\w+_fp8_fp8",
               mac_per_cycle=256),
        Target(arch="gfx950", gpu="MI350X", backend="hip", triton_arch="gfx950", warp_size=64,
               shared_bytes=160 * 1024, bulk_copy="buffer_load",
               matrix_instructions=("v_mfma",), eight_bit_instruction=r"v_mfma\w+_f8f6f4",
               mac_per_cycle=512),
    )
}  # fmt: skip
