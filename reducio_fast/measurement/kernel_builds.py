"""`reducio-fast compile-check`: compiles every kernel and every table entry for every GPU target, without a GPU.

It checks what a compiler can show without the card: registers, spills, shared memory against the target's limit, and
whether the matrix instruction and the bulk copy that a kernel was written for are there. In the machine code it checks
known hazards, divisions in a loop, and for the hottest kernels counts against committed limits (`machine_limits`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from ..system import process_pool
from ..system.errors import ReducioError


def check(
    archs: Iterable[str] | None = None, ops: Iterable[str] | None = None, only: str = "", jobs: int | None = None
) -> Iterator:
    """Yields a `compile.aot.Build` for each variant on each target, in the order of targets, then kernels.

    `only` keeps the variants whose names contain it: "bf16", "conv3d bf16 128->128".

    Raises ReducioError for an unknown target or kernel, and if Triton is missing or interprets its functions.
    """
    try:
        import triton

        from ..compile.targets import TARGETS
        from ..triton_kernels.registry import OPS
    except ImportError as error:
        raise ReducioError(f"compile-check needs Triton: {error}") from error
    if triton.knobs.runtime.interpret:
        raise ReducioError("compile-check: TRITON_INTERPRET is set, so nothing is compiled; unset it")
    archs, ops = list(TARGETS if archs is None else archs), list(OPS if ops is None else ops)
    for noun, names, known in (("target", archs, TARGETS), ("kernel", ops, OPS)):
        for name in names:
            if name not in known:
                raise ReducioError(f"compile-check: {noun} {name!r} is unknown; known: {', '.join(known)}")
    tasks = [(arch, op, only) for arch in archs for op in ops]
    # Spawned processes: Triton's compiler holds the interpreter's lock, and a forked torch may hang.
    with process_pool.spawned(jobs) as pool:
        for builds in pool.map(_build, *zip(*tasks, strict=True)):
            yield from builds


def _build(arch: str, op: str, only: str) -> list:
    from ..compile import aot
    from ..compile.targets import TARGETS
    from ..triton_kernels.registry import OPS
    from .machine_limits import divides, exceeded

    def judged(build: aot.Build) -> aot.Build:
        problems = (*build.problems, *divides(build), *exceeded(build))
        return dataclasses.replace(build, problems=problems)

    builds = aot.build_all((v for v in OPS[op].variants(arch) if only in v.name), TARGETS[arch])
    return [judged(build) for build in builds]
