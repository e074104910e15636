"""`reducio-fast bench`: times all ways to make a clip, in turns and in one process, against the machine's peak rates.

Contenders take turns, so that a slow minute of the machine affects them all, and a speed-up is the median of the ratios
within a turn. The fast path is compared with the oracle first: if it is wrong, nothing is timed.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..checkpoints.hub import lasting_name
from ..media.similarity import pooled_psnr
from ..system.atomic_files import written_whole
from ..system.devices import resolve_device
from ..system.errors import ReducioError
from ..system.real_numbers import finite
from ..system.stage_clock import clock
from . import instruments
from .contenders import Contender, DefaultClip, GivenConditions, workload
from .instruments import spread
from .names import CONTENDERS, QUANTISED
from .quantised_decoder import check_contender
from .svd_clip import SVDClip
from .tile import DecodedTile

DEFAULT = CONTENDERS[:3]
Row = dict[str, Any]

# Runs in a fresh process, with the caches named in its environment. Timing starts before this package is imported.
COLD = """
import json, time
start = time.perf_counter()
from reducio_fast.system.devices import resolve_device
from reducio_fast.measurement.contenders import workload
measured = workload({name!r}, {model!r}, {dtype!r}, resolve_device({device!r}))
contender = measured.contender({contender!r})
loaded = time.perf_counter()
contender.run()
print(json.dumps({{"load_s": loaded - start, "first_clip_s": time.perf_counter() - loaded}}))
"""
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "REDUCIO_CACHE_DIR")


def bench(
    name: str = "default",
    model: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    contenders: Sequence[str] | None = None,
    ladder: bool = False,
    pairs: int = 5,
    cold: bool = True,
    note: str | None = None,
    log: Callable[[str], None] = lambda line: None,
    flush: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Measure a workload (`names.WORKLOADS`) and return one JSON-ready row.

    `contenders` is some of CONTENDERS, by default DEFAULT; `ladder` adds the rungs of the ablation.
    `dtype` None is float32 on a CPU, bfloat16 on a GPU, for all contenders. Raises ReducioError if a pair of libraries
    is known to be broken, if the fast path is wrong, and for names that do not exist.

    `flush` gets the unfinished row, with `whole` False, after each first clip and each turn, because time on a GPU may
    run out.
    """
    if broken := instruments.broken_libraries(torch.__version__, torch.backends.cudnn.version()):
        raise ReducioError(f"bench: {broken}")
    chosen = list(DEFAULT if contenders is None else contenders)
    for contender in chosen:
        if contender not in CONTENDERS:
            raise ReducioError(f"bench: contender {contender!r} is unknown; known: {', '.join(CONTENDERS)}")
        if chosen.count(contender) > 1:
            raise ReducioError(f"bench: contender {contender!r} is named twice")
    if not chosen:
        raise ReducioError(f"bench: contenders is empty; known: {', '.join(CONTENDERS)}")
    if pairs < 1:
        raise ReducioError(f"bench: pairs must be at least 1, is {pairs}")
    device = resolve_device(device)
    for contender in chosen:
        check_contender(contender, name, model, device)
    measured = workload(name, model, dtype, device)
    log(measured.what)
    machine = instruments.machine(device)

    rows = measured.parity()
    if set(chosen) & set(QUANTISED) and not isinstance(measured, SVDClip):  # which `check_contender` has refused
        rows += measured.quantised_parity()
    wrong = [row["what"] for row in rows if not row["right"]]
    if wrong:
        raise ReducioError(
            f"bench: nothing is timed, for {len(wrong)} of {len(rows)} comparisons fail, the first: {wrong[0]}"
        )
    log(f"parity: {len(rows)} of {len(rows)} right")
    row: Row = {
        "benchmark": "bench", "workload": name, "what": measured.what, "note": note, "pairs": pairs, "machine": machine,
        "parity": rows, "roof": instruments.roof(device, measured.dtype), "flops": measured.flops,
        "shape": measured.shape,
        "contenders": {}, "ladder": {}, "cold": {}, "whole": False,
    }  # fmt: skip

    def flushed(figures: dict[str, Row], part: str = "contenders") -> None:
        row[part] = figures
        flush(row)

    makers = [functools.partial(measured.contender, contender) for contender in chosen]
    row["contenders"] = compare(makers, chosen, measured, pairs, row["roof"], log, flushed)
    if ladder:
        rungs = measured.rungs()
        names = [rung.name for rung in rungs]
        ready = [functools.partial(_same, rung) for rung in rungs]
        flush_ladder = functools.partial(flushed, part="ladder")
        row["ladder"] = compare(ready, names, measured, pairs, row["roof"], log, flush_ladder)
    if cold:
        for contender in chosen:
            if contender == "compiled":
                continue  # compilation takes minutes, which `first_s` has measured
            log(f"cold: {contender}, in fresh processes")
            row["cold"][contender] = first_clips(name, model, dtype, device, contender)
            flush(row)
    return row | {"whole": True}


def compare(
    makers: Sequence[Callable[[], Contender]],
    names: Sequence[str],
    measured: DefaultClip | GivenConditions | DecodedTile | SVDClip,
    pairs: int,
    roof: Row,
    log: Callable[[str], None],
    flush: Callable[[dict[str, Row]], None] = lambda rows: None,
) -> dict[str, Row]:
    """{contender: figures}, with speed-ups over the first contender. One that cannot be built is skipped, with the
    reason. `flush` gets the figures so far, after each first clip and each turn.

    Clips that come before the timed ones: the first compiles, on a GPU the second captures the graphs that the first
    did not, and the last measures memory.
    """
    rows: dict[str, Row] = {}
    ready: list[Contender] = []
    frames: dict[str, np.ndarray] = {}
    device = measured.device
    for name, make in zip(names, makers, strict=True):
        idle_before = instruments.idle_pool_bytes(device)
        try:
            start = clock(device)
            contender = make()
            built = clock(device)
            contender.run()
            first = clock(device) - built
        except Exception as error:
            if name == "reference" or isinstance(error, ReducioError | torch.OutOfMemoryError):
                raise
            # For example a missing compiler: the others can still be measured.
            lines = str(error).splitlines() or [""]
            rows[name] = {"skipped": f"{type(error).__name__}: {lines[0][:300]}"}
            log(f"{name}: skipped, {rows[name]['skipped']}")
            continue
        if device.type == "cuda":
            contender.run()
        with instruments.Peak(device, idle_before) as peak:
            frames[name], _ = contender.run()
        rows[name] = {
            "what": contender.what,
            "dtype": "mixed" if contender.dtype is None else str(contender.dtype).removeprefix("torch."),
            "build_s": round(built - start, 3),
            "first_s": round(first, 3),
            "peak_gb": round(peak.bytes / 1e9, 3),
            "above_start_gb": round(peak.above / 1e9, 3),
        }
        ready.append(contender)
        log(f"{name}: first clip {first:.2f} s")
        flush(rows)

    if not ready:
        reasons = "; ".join(f"{name}: {row['skipped']}" for name, row in rows.items())
        raise ReducioError(f"bench: no contender can be measured ({reasons})")
    totals: dict[str, list[float]] = {c.name: [] for c in ready}
    stages: dict[str, list[dict[str, float]]] = {c.name: [] for c in ready}
    joules: dict[str, list[float]] = {c.name: [] for c in ready}
    first_name = ready[0].name

    def figures() -> dict[str, Row]:
        """Figures of the turns so far."""
        for contender in ready:
            row, name = rows[contender.name], contender.name
            row["clip_s"] = spread(totals[name])
            row["stages_s"] = {s: spread([turn[s] for turn in stages[name]]) for s in stages[name][0]}
            row["speed_up"] = _ratios(totals[first_name], totals[name])
            row["stages_speed_up"] = {
                s: _ratios([t[s] for t in stages[first_name]], [t[s] for t in stages[name]])
                for s in stages[name][0]
                if s in stages[first_name][0]
            }
            work = measured.flops[contender.algebra]
            row["tflops"] = {s: round(work[s] / row["stages_s"][s]["median"] / 1e12, 4) for s in work}
            # The roof is that of one dtype.
            rates = row["tflops"] if row["dtype"] == roof["dtype"] else {}
            row["share_of_roof"] = {s: round(rate / roof["matmul_tflops"], 4) for s, rate in rates.items()}
            row["psnr_db"] = None if name == first_name else _psnr(frames[first_name], frames[name])
            row["joules"] = round(statistics.mean(joules[name]), 2) if joules[name] else None
        return rows

    with instruments.nvml(device) as counter:
        for turn in range(pairs):
            for contender in ready:
                if counter is None:
                    start = clock(device)
                    _, seconds = contender.run()
                    totals[contender.name].append(clock(device) - start)
                else:
                    with instruments.Energy(*counter) as energy:
                        start = clock(device)
                        _, seconds = contender.run()
                        totals[contender.name].append(clock(device) - start)
                    joules[contender.name] += [] if energy.joules is None else [energy.joules]
                    rows[contender.name]["energy_source"] = energy.source
                stages[contender.name].append(seconds)
            log(f"turn {turn + 1} of {pairs}: " + ", ".join(f"{c.name} {totals[c.name][-1]:.3f} s" for c in ready))
            flush(figures())
    return rows


def first_clips(
    name: str, model: str | os.PathLike[str] | None, dtype: str | None, device: torch.device, contender: str
) -> Row:
    """Time loading and the first clip in two fresh processes: one with empty caches, then one with the caches that the
    first has filled."""
    # The processes start in another folder: from the repository root its folders would shadow packages.
    arguments = {"name": name, "model": None if model is None else lasting_name(model), "dtype": dtype}
    code = COLD.format(**arguments, device=str(device), contender=contender)
    row: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = {variable: os.path.join(folder, variable) for variable in CACHES}
        for state in ("empty_caches", "warm_caches"):
            start = time.perf_counter()
            command, environment = [sys.executable, "-c", code], os.environ | caches
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
            if done.returncode:
                return {"skipped": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
            figures = json.loads(done.stdout.splitlines()[-1])
            figures["process_s"] = time.perf_counter() - start  # from the start of the process to its end
            row[state] = {key: round(value, 3) for key, value in figures.items()}
    return row


def write(row: Row, path: str | os.PathLike[str]) -> None:
    """Write the row as JSON, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(json.dumps(finite(row), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _same(contender: Contender) -> Contender:
    return contender


def _ratios(slow: list[float], quick: list[float]) -> dict[str, float]:
    return spread([s / q for s, q in zip(slow, quick, strict=True)], 3)


def _psnr(a: np.ndarray, b: np.ndarray) -> float | None:
    """PSNR in dB of frames against the first contender's; None if they are equal."""
    return None if np.array_equal(a, b) else round(pooled_psnr(a, b), 2)
