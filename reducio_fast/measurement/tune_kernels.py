"""`reducio-fast bench --tune`: finds launch settings and the plan of this machine's GPU by measurement, as a table.

The hot shapes are those of a 1024x1024 clip of Reducio (a 320-pixel tile of the decoder, a denoising step over 4096
tokens) or of a clip of Stable Video Diffusion. What an earlier run found is kept: see `problems_of` and `write`. The
settings of one kernel and shape class are searched one axis at a time from those in force. A candidate that the
compiler check rejects (registers spilled, more shared memory than a block may have, a race in its machine code) is
never timed. Neither is one whose result differs from the vendor's, because wrong code may well be the fastest. Times
are of graph replays on a cold cache. `search` and `tune` take the clock and both checks as functions, so they are
tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..system import cache_folder, process_pool
from ..system.atomic_files import written_whole
from ..system.devices import resolve_device, triton_missing
from ..system.errors import ReducioError
from ..system.paths import check_output_folder
from . import instruments
from .hot_shapes import Problem, Ways, hot_problems
from .svd_shapes import svd_problems

FAMILIES = {"reducio": hot_problems, "svd": svd_problems}
Settings = dict[str, int]
NOISE = 0.01  # share by which a candidate must be faster to replace the best so far
RUNS = 3  # runs of each candidate to compare with the vendor's result: a race does not show every time
# Tolerance relative to an element's magnitude plus the root mean square: two bfloat16 roundings and another order of
# sums stay below 0.02.
CLOSE = 0.05
THRESHOLD = 0.03  # share by which a vendor's library must be faster than our kernel to replace it in the plan


@dataclass(slots=True)
class Found:
    """The result of a search. Times are in seconds over all problems of the group, weighted by their calls."""

    settings: Settings
    before: float
    after: float
    tried: int
    pruned: int


# ---- the search ------------------------------------------------------------------------------------------------------


def search(
    start: Settings,
    axes: Sequence[Sequence[Settings]],
    cost: Callable[[Settings], float],
    allowed: Callable[[list[Settings]], list[bool]],
    expired: Callable[[], bool],
) -> Found:
    """Coordinate descent: along each axis (partial settings that replace each other) in turn, until a round gains
    nothing or time is up. `start` is measured even if `allowed` rejects it, so the result is never slower."""
    best, least = start, cost(start)
    result = Found(start, least, least, 1, 0)
    seen = {_key(start)}
    gained = True
    while gained and not expired():
        gained = False
        for axis in axes:
            candidates = [c for c in (best | part for part in axis) if _key(c) not in seen]
            seen |= {_key(c) for c in candidates}
            for candidate, good in zip(candidates, allowed(candidates) if candidates else (), strict=True):
                if not good:
                    result.pruned += 1
                    continue
                if expired():
                    break
                seconds = cost(candidate)
                result.tried += 1
                if seconds < least * (1 - NOISE):
                    best, least, gained = candidate, seconds, True
    result.settings, result.after = best, least
    return result


def axes_of(op: str, key: str, hip: bool) -> list[list[Settings]]:
    """The axes to search. Tile and warps are one axis, because neither is good without the other."""
    pieces = [_setting("PIECES", 1, 2, 4)] if op.endswith("conv3d") else []
    if pieces or op in ("temporal_conv", "geglu_linear"):
        tiles = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (256, 64, 8), (256, 128, 8),
                 (128, 256, 8), (64, 256, 8), (256, 64, 4)]  # fmt: skip
        if key == "K<=128":
            tiles = [t for t in tiles if t[1] <= 128]
        axes = [
            _axis(("BLOCK_M", "BLOCK_K", "num_warps"), tiles),
            _setting("BLOCK_C", 32, 64, 128, *((256,) if op == "quantised_conv3d" else ())),
            _setting("num_stages", *((1, 2, 3) if hip else (2, 3, 4, 5))),
            *pieces,
        ]
        amd = [_setting("waves_per_eu", 1, 2, 3), _setting("matrix_instr_nonkdim", 16, 32)]
        return axes + (amd if hip else [])
    if op == "attention":
        tiles = [(64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 32, 8), (128, 64, 4), (128, 64, 8), (128, 128, 8)]
        axes = [_axis(("BLOCK_L", "BLOCK_S", "num_warps"), tiles), _setting("num_stages", 1, 2, 3, 4)]
        return axes + ([_setting("waves_per_eu", 1, 2, 3)] if hip else [])
    warps = _setting("num_warps", 1, 2, 4, 8)
    if op == "group_norm_silu":
        axes = [_setting("ELEMENTS", 1024, 2048, 4096, 8192, 16384), warps]
        return axes + ([_setting("TILES", 1024, 2048, 4096)] if key == "statistics" else [])
    if op == "stream_layer_norm":
        return [_setting("TOKENS", 1, 2, 4, 8), warps]
    if op == "guidance_dpm_step":
        return [_setting("BLOCK_N", 256, 512, 1024, 2048, 4096), warps]
    return [warps]


def problems_of(family: str, arch: str, plan: Collection[str]) -> tuple[list[Problem], list[str]]:
    """(problems of one of FAMILIES, the other families whose problems are among them).

    `plan`: the entries of an earlier run's plan. Where they show that another family was tuned, its problems of the
    shape classes that both have are added, so that the new settings of these classes are the best for both together.
    """
    problems = FAMILIES[family](arch)
    groups, shared = {(p.op, p.key) for p in problems}, list[str]()
    for other in sorted(set(FAMILIES) - {family}):
        others = FAMILIES[other](arch)
        if all(p.plan_entry in plan for p in others):
            problems += [p for p in others if (p.op, p.key) in groups]
            shared.append(other)
    return problems, shared


def tune(
    problems: Sequence[Problem],
    arch: str,
    clock: Callable[[Problem, str], float],
    allowed: Callable[[str, str, tuple[str, ...], list[Settings]], list[bool]],
    agrees: Callable[[Problem], bool],
    limit_s: float = 120,
    hip: bool = False,
    log: Callable[[str], None] = lambda line: None,
    now: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(table, rows): settings by op and shape class with a "plan" of the chosen ways, and one row per group and per
    problem.

    `clock(problem, way)` times a way to compute it ("kernel", "vendor", "flash-attn"; inf if it fails) under the
    settings in force. `allowed(op, key, variants, candidates)` says which candidates the compiler check accepts.
    `agrees(problem)` says whether our kernel computes what the vendor does under the settings in force. The groups with
    the largest cost per clip come first, and each may use half of the remaining time.
    """
    end = now() + limit_s
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.op, problem.key), []).append(problem)
    costs = {group: _total(members, clock) for group, members in groups.items()}
    table: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for (op, key), members in sorted(groups.items(), key=lambda item: -costs[item[0]]):
        stop = now() + (end - now()) / 2

        def cost(entry: Settings, op: str = op, key: str = key, members: list[Problem] = members) -> float:
            with trial(arch, op, key, entry):
                return _total(members, clock) if all(map(agrees, members)) else math.inf

        variants = tuple(dict.fromkeys(m.variant for m in members))
        result = search(
            in_force(op, key, arch),
            axes_of(op, key, hip),
            cost,
            functools.partial(allowed, op, key, variants),
            functools.partial(_passed, now, stop),
        )
        table.setdefault(op, {})[key] = result.settings
        rows.append({
            "op": op, "key": key, "settings": result.settings, "tried": result.tried, "pruned": result.pruned,
            "before_s": result.before, "after_s": result.after,
        })  # fmt: skip
        log(
            f"{op} {key}: {result.before * 1e3:.2f} -> {result.after * 1e3:.2f} ms a clip, {result.tried} tried, "
            f"{result.pruned} not launched"
        )
    plan, plan_rows = choose(problems, arch, table, clock, agrees)
    for row in plan_rows:
        log(f"{row['plan']} ({row['what']}): " + ", ".join(f"{w} {s * 1e6:.0f} us" for w, s in row["seconds"].items()))
    return table | {"plan": plan}, rows + plan_rows


def choose(
    problems: Sequence[Problem],
    arch: str,
    table: dict[str, Any],
    clock: Callable[[Problem, str], float],
    agrees: Callable[[Problem], bool],
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """({class: way}, one row per problem), under the settings just found. The way is our kernel, unless another one is
    faster by THRESHOLD over all problems of a class, or our kernel is wrong."""
    rows, totals = [], dict[str, dict[str, float]]()
    for p in problems:
        with trial(arch, p.op, p.key, table[p.op][p.key]):
            ways = ["kernel", "vendor"]
            if p.op == "attention" and not p.plan.startswith("cross") and importlib.util.find_spec("flash_attn"):
                ways.append("flash-attn")
            seconds = {way: clock(p, way) if way != "kernel" or agrees(p) else math.inf for way in ways}
        for way, duration in seconds.items():
            sums = totals.setdefault(p.plan_entry, {})
            sums[way] = sums.get(way, 0.0) + p.calls * duration
        rows.append({"plan": p.plan_entry, "what": p.what, "calls": p.calls, "seconds": seconds})
    plan = {}
    for name, sums in totals.items():
        other = min((way for way in sums if way != "kernel"), key=sums.__getitem__)
        plan[name] = other if sums[other] < sums["kernel"] * (1 - THRESHOLD) else "kernel"
    return plan, rows


# ---- settings and their compilation ----------------------------------------------------------------------------------


def in_force(op: str, key: str, arch: str) -> Settings:
    from ..triton_kernels.tables import settings

    return settings(op, key, arch)


@contextmanager
def trial(arch: str, op: str, key: str, entry: Settings) -> Iterator[None]:
    """Inside, every launch of that class uses `entry`."""
    from ..triton_kernels.tables import table

    entries = table(arch)[op]
    before = entries.get(key)
    entries[key] = entry
    try:
        yield
    finally:
        if before is None:
            del entries[key]
        else:
            entries[key] = before


def compile_problems(arch: str, op: str, key: str, entry: Settings, variants: tuple[str, ...]) -> list[str]:
    """The problems that compilation finds with these settings; works for an absent GPU too."""
    from ..compile import aot
    from ..compile.targets import TARGETS
    from ..triton_kernels.registry import OPS

    with trial(arch, op, key, entry):
        builds = aot.build_all((v for v in OPS[op].variants(arch) if v.name.startswith(variants)), TARGETS[arch])
    return [problem for build in builds for problem in build.problems]


def compiles(
    pool: Executor, arch: str, op: str, key: str, variants: tuple[str, ...], candidates: list[Settings]
) -> list[bool]:
    """Which candidates the compiler check accepts. For an architecture that `compile-check` lacks it accepts all; a
    launch that fails then counts as infinitely slow."""
    from ..compile.targets import TARGETS

    if arch not in TARGETS:
        return [True] * len(candidates)
    verdicts = [pool.submit(compile_problems, arch, op, key, entry, variants) for entry in candidates]
    return [not verdict.result() for verdict in verdicts]


def write(table: dict[str, Any], arch: str, path: Path) -> None:
    """Write the table in the layout of the shipped ones. Classes that were not measured keep the settings of the table
    that `path` holds, else the shipped ones."""
    from importlib import resources

    shipped = resources.files("reducio_fast.triton_kernels") / "tables" / f"{arch}.json"
    merged = json.loads(shipped.read_text(encoding="utf-8")) if shipped.is_file() else {}
    for newer in (kept(path), table):
        merged |= {op: merged.get(op, {}) | entries for op, entries in newer.items()}
    ops = [
        f"  {json.dumps(op)}: {{\n"
        + ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        + "\n  }"
        for op, entries in merged.items()
    ]
    with written_whole(path) as part:
        part.write_text("{\n" + ",\n".join(ops) + "\n}\n", encoding="utf-8")


def kept(path: Path) -> dict[str, Any]:
    """The table that an earlier run wrote to `path`; {} if there is none, or only a part of one."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {op: dict(entries) for op, entries in table.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def run(
    out: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    limit_s: float = 120,
    log: Callable[[str], None] = lambda line: None,
    family: str = "reducio",
) -> dict[str, Any]:
    """Tune the kernels of one of FAMILIES for this machine's GPU. The table goes to the file or folder `out`, by
    default to the cache folder, where the fast path looks for a table that was tuned on this machine. The search starts
    from the settings that an earlier run wrote there.

    Returns a JSON-ready row. Raises ReducioError if there is no GPU or no Triton, or if `out` cannot be written.
    """
    if out:
        check_output_folder(Path(out))
    device = resolve_device(device)
    if device.type != "cuda":
        raise ReducioError("tune: there is no GPU here, and settings are found by measuring on one")
    if missing := triton_missing():
        raise ReducioError(f"tune: {missing}")
    from ..compile import cache
    from ..fast.launches import precompile_launches, svd_launches
    from ..triton_kernels.tables import add_tables, arch_of

    arch = arch_of(device)
    path = Path(out) if out else cache.folder("tables", cache.Origin.here(arch), cache_folder.root()) / f"{arch}.json"
    path = path / f"{arch}.json" if path.is_dir() else path
    add_tables(path.parent)
    problems, shared = problems_of(family, arch, kept(path).get("plan", ()))
    for other in shared:
        log(f"{other} was tuned here before: shape classes that it shares with {family} are tuned for both")
    if family == "svd":  # on all cores; else each would be compiled alone when it is first timed
        precompile_launches(device, svd_launches(arch))
    ways: dict[Problem, Ways] = {}

    def ways_of(problem: Problem) -> Ways:
        if problem not in ways:
            functions = ways[problem] = problem.make(device)
            functions["expected"] = functools.cache(functions.get("expected", functions["vendor"]))
        return ways[problem]

    def timed(problem: Problem, way: str) -> float:
        try:
            return instruments.kernel_seconds(ways_of(problem)[way], device)
        except Exception:  # such as too much shared memory, or a shape that the vendor rejects: this way cannot win
            return math.inf

    def right(problem: Problem) -> bool:
        try:
            return agree(ways_of(problem))
        except Exception:  # as above
            return False

    with process_pool.spawned() as pool:
        allowed = functools.partial(compiles, pool, arch)
        table, rows = tune(problems, arch, timed, allowed, right, limit_s, torch.version.hip is not None, log)
    write(table, arch, path)
    return {
        "benchmark": "tune", "machine": instruments.machine(device), "arch": arch, "family": family, "shared": shared,
        "table": str(path), "rows": rows,
    }  # fmt: skip


def agree(ways: Ways) -> bool:
    """Whether "kernel" returns what "expected" does, every time, to within CLOSE in each element. Further results, such
    as a convolution's statistics, are not compared."""
    wants = [want.float() for want in _results(ways["expected"]())]
    limits = [(want.abs() + want.square().mean().sqrt()) * CLOSE for want in wants]
    # Not `any > limit`, which is False for NaN.
    return all(
        bool(((got.float() - want).abs() <= limit).all())
        for _ in range(RUNS)
        for got, want, limit in zip(_results(ways["kernel"]()), wants, limits, strict=False)
    )


def _results(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _passed(now: Callable[[], float], stop: float) -> bool:
    return now() >= stop


def _key(entry: Settings) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(entry.items()))


def _axis(names: tuple[str, ...], values: Sequence[tuple[int, ...]]) -> list[Settings]:
    return [dict(zip(names, each, strict=True)) for each in values]


def _setting(name: str, *values: int) -> list[Settings]:
    return [{name: value} for value in values]


def _total(members: Sequence[Problem], clock: Callable[[Problem, str], float]) -> float:
    return sum(p.calls * clock(p, "kernel") for p in members)
