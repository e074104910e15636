"""On a CPU: how a twin's products are faster, by a table measured on this machine: in which dtype, and which algorithm
wide convolutions take in float32 (see `triton_kernels/winograd.py`).

A processor's feature flags do not predict it: with AMX bfloat16 doubles the speed of a clip, with avx512_bf16 alone it
may halve it (Xeon: 0.56 of float32 in linears and convolutions). So each product, by kind and channels, is timed once
in both dtypes at equal work, a few milliseconds, and the times are kept in the cache folder; a network takes the dtype
in which its products take less time in total, each weighted by an estimate of its work in a clip (`work_of`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..system import cache_folder, torch_state
from ..system.atomic_files import written_whole
from ..system.devices import multiplies_bfloat16
from ..triton_kernels.cpu_convolution import convolve
from ..triton_kernels.winograd import WIDE

LOG = logging.getLogger("reducio_fast")
DTYPES = (torch.float32, torch.bfloat16)
WORK = 1e8  # floating-point operations of a timed product: 0.3 to 3 ms
TURNS = 5
# bfloat16 rounds more, so it is chosen only below this share of float32's time.
GAIN = 0.9
WINOGRAD = "winograd"  # the table's line of a wide convolution by both algorithms

Seconds = dict[str, float]  # by dtype, or by algorithm
Timer = Callable[[Callable[[], object]], float]
_lock = threading.Lock()
_tables: dict[Path, dict[str, Seconds]] = {}


def products_of(network: nn.Module) -> Counter[str]:
    """The kinds of product in a network, and how many layers have each: "linear 192->768", "conv3d 16->16",
    "conv2d 16->16". Of an autoencoder the decoder alone counts: a clip encodes one picture at most."""
    counts: Counter[str] = Counter()
    for layer in getattr(network, "decoder", network).modules():
        if isinstance(layer, nn.Linear):
            counts[f"linear {layer.in_features}->{layer.out_features}"] += 1
        elif isinstance(layer, nn.Conv2d | nn.Conv3d) and layer.kernel_size[-1] == 3:
            counts[f"conv{len(layer.kernel_size)}d {layer.in_channels}->{layer.out_channels}"] += 1
    return counts


def work_of(name: str) -> float:
    """The work of one such layer in a clip, up to a factor common to the network. A level of half the channels has
    about four times the positions, so channels count by their ratio alone."""
    taps, C, K = _sizes(name)
    return taps * max(C, K) / min(C, K)


@torch_state.inference()  # with the threads of a call, by whose number the table is kept
def choose(network: nn.Module, timer: Timer | None = None) -> tuple[torch.dtype, str]:
    """float32 or bfloat16 for the twin of a network in float32, and why.

    timer: measures the seconds of a call, for tests; the table is then not kept.
    """
    if not multiplies_bfloat16(torch.device("cpu")):
        return torch.float32, "this CPU has no bfloat16"
    products = products_of(network)
    table = _measured(list(products), timer)
    weights = {name: count * work_of(name) for name, count in products.items()}
    wide, narrow = (sum(table[name][_name(dtype)] * weight for name, weight in weights.items()) for dtype in DTYPES)
    dtype = torch.bfloat16 if narrow < GAIN * wide else torch.float32
    return dtype, f"its products take {narrow / wide if wide else 1:.2f} of float32's time in bfloat16 on this CPU"


@torch_state.inference()
def prefers_winograd(timer: Timer | None = None) -> tuple[bool, str]:
    """Whether wide convolutions in float32 are faster by Winograd's algorithm than by the library, and why."""
    seconds = _measured([WINOGRAD], timer)[WINOGRAD]
    share = seconds["winograd"] / seconds["library"]
    return share < GAIN, f"by Winograd's algorithm it takes {share:.2f} of the library's time on this CPU"


def _measured(names: list[str], timer: Timer | None) -> dict[str, Seconds]:
    """The table of times, with at least these products; measures those that are missing."""
    if timer is not None:
        return {name: _time(name, timer) for name in names}
    path = table_path()
    with _lock:
        table = _tables.setdefault(path, _read(path))
        missing = [name for name in names if table.get(name, {}).keys() != set(_ways(name))]
        if missing:
            table |= {name: _time(name, _best) for name in missing}
            _write(path, table)
        return dict(table)


def table_path() -> Path:
    """The table's file for this processor, torch and number of threads."""
    features = getattr(torch.cpu, "get_capabilities", dict)()
    key = json.dumps([torch.__version__, torch.get_num_threads(), sorted(features.items(), key=str)], default=str)
    return cache_folder.root() / "dtypes" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _time(name: str, timer: Timer) -> Seconds:
    runs = _convolutions() if name == WINOGRAD else {_name(dtype): _product(name, dtype) for dtype in DTYPES}
    best = dict.fromkeys(runs, float("inf"))
    with torch.inference_mode():
        for run in runs.values():  # warm-up: packs weights and generates code
            run()
        for _ in range(TURNS):  # in turns, so that other work on the machine slows both
            for way, run in runs.items():
                best[way] = min(best[way], timer(run))
    return best


def _ways(name: str) -> tuple[str, ...]:
    """What a line of the table compares."""
    return ("library", "winograd") if name == WINOGRAD else tuple(map(_name, DTYPES))


def _convolutions() -> dict[str, Callable[[], object]]:
    """A convolution of 14 GFLOP by both algorithms, of twice the least width for which Winograd's is considered: there
    the answer is clear (0.45 on an EPYC without AVX-512, 0.8 to 0.9 at the least width)."""
    channels = 2 * WIDE
    video = torch.ones(1, 4, 32, 32, channels).permute(0, 4, 1, 2, 3)
    kernel = torch.ones(channels, 3, 3, 3, channels).permute(0, 4, 1, 2, 3)
    call = functools.partial(convolve, video, kernel, None, (1, 1, 1))
    return {"library": call, "winograd": functools.partial(call, winograd=True)}


def _product(name: str, dtype: torch.dtype) -> Callable[[], object]:
    taps, C, K = _sizes(name)
    if taps == 1:
        rows = max(32, int(WORK / (2 * C * K)))
        x, weight = torch.ones(rows, C, dtype=dtype), torch.ones(K, C, dtype=dtype)
        return lambda: F.linear(x, weight)
    frames = 4 if taps == 27 else 1
    side = max(8, int((WORK / (2 * taps * C * K * frames)) ** 0.5))
    image = torch.ones(1, frames, side, side, C, dtype=dtype).permute(0, 4, 1, 2, 3)
    kernel = torch.ones(K, taps // 9, 3, 3, C, dtype=dtype).permute(0, 4, 1, 2, 3)
    padding = (taps // 27, 1, 1)
    return lambda: convolve(image, kernel, None, padding)


def _sizes(name: str) -> tuple[int, int, int]:
    """Taps of the kernel, and channels of the input and of the output."""
    kind, _, channels = name.partition(" ")
    fan_in, _, fan_out = channels.partition("->")
    return {"linear": 1, "conv2d": 9, "conv3d": 27}[kind], int(fan_in), int(fan_out)


def _best(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(path: Path) -> dict[str, Seconds]:
    """The table of an earlier process; empty if there is none or it is damaged."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        table = {str(name): {way: float(s) for way, s in seconds.items()} for name, seconds in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return {name: seconds for name, seconds in table.items() if all(0 < s < math.inf for s in seconds.values())}


def _write(path: Path, table: dict[str, Seconds]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            part.write_text(json.dumps(table, indent=1, sort_keys=True), encoding="utf-8")
    except Exception as error:  # a full disk or a folder that cannot be written: the next process measures again
        LOG.info("cache: %s not written: %s", path, error)
