"""Compares other image-to-video models with ours: the time per second of video and per megapixel."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from PIL import Image

from ..checkpoints import hub, strict_files
from ..checkpoints.networks import pipeline_networks
from ..pipelines.call.output import ReducioOutput
from ..pipelines.peers.models import PEERS
from ..pipelines.peers.pipeline import RANDOM, RANDOM_TINY, PeerPipeline, find
from ..system import devices
from ..system.errors import ReducioError
from ..system.stage_clock import clock


def bench_row(
    model: str | os.PathLike[str] | None,
    *,
    prompt: str | None = "a red circle moving right on a black background",
    image: Any = None,
    repeats: int = 3,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    progress: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Time one model, a peer or one of ours, at its own published call; returns a row of the comparison.

    A peer named without weights gets random ones of the published size, and a grey image if it needs one. `cold` is the
    first call with everything it compiles and loads. `seconds` is the median of `repeats` further calls, and `stages`
    are its parts. From `seconds` follow `per_video_second`, the seconds per second of video at the model's own frame
    rate, and `per_megapixel`. `peak_memory` in bytes is measured on a GPU, null elsewhere.
    """
    from ..pipelines.reducio.pipeline import ReducioPipeline

    device = devices.resolve_device(device)
    dtype = devices.resolve_dtype(dtype, None, device)
    if isinstance(model, str) and model in PEERS:
        model = f"{model}:{RANDOM}"
    source = find(model)
    pipe: Any
    if source is None:
        folder = model or strict_files.embedded_model()
        pipe = ReducioPipeline.from_pretrained(folder, dtype=dtype, device=device, backend=backend)
        name, weights, networks = "reducio", str(model or "the embedded default"), pipe.parts.networks()
    else:
        pipe = PeerPipeline.from_pretrained(source, dtype, device)
        name, weights, networks = source.peer.name, source.weights, pipeline_networks(pipe.pipeline)
        if pipe.takes_image and image is None:
            image = Image.new("RGB", (512, 512), "grey")
        if not pipe.reads_text:
            prompt = None
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    runs: list[tuple[float, ReducioOutput]] = []
    for _ in range(1 + repeats):
        start = clock(device)
        out = pipe(prompt, image, progress=progress, **kwargs)
        runs.append((clock(device) - start, out))
    warm = sorted(runs[1:] or runs, key=lambda run: run[0])
    seconds, out = statistics.median(seconds for seconds, _ in warm), warm[len(warm) // 2][1]
    frames, height, width = out.frames.shape[:3]
    return {
        "model": name,
        "weights": weights,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for network in networks for p in network.parameters()),
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": out.fps,
        "cold": runs[0][0],
        "seconds": seconds,
        "stages": dict(out.timings),
        **rates(seconds, frames, height, width, out.fps),
        "peak_memory": torch.cuda.max_memory_allocated(device) if cuda else None,
        "versions": {library: metadata.version(library) for library in ("torch", "diffusers", "transformers")},
    }


def named(text: str) -> list[str]:
    """The peers in a comma-separated list. Raises ReducioError for an unknown one, and for a folder or hub id that
    cannot be found."""
    models = text.split(",")
    for model in models:
        if (source := find(model)) is None:
            raise ReducioError(f"peer: {model!r} is unknown; known are {', '.join(PEERS)}, or a folder of one")
        if source.weights not in (RANDOM, RANDOM_TINY):
            strict_files.check_model_folder(hub.find_model(source.weights))
    return models


def compare(
    row: dict[str, Any],
    models: Sequence[str],
    repeats: int,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Rows of one table: our contenders as `bench.bench` has measured them, then each peer.

    Our rows have no `peak_memory`, because several contenders are loaded at once.
    """
    rows = []
    for name, figures in row["contenders"].items():
        if "skipped" not in figures:
            seconds = figures["clip_s"]["median"]
            stages = {stage: spread["median"] for stage, spread in figures["stages_s"].items()}
            rows.append(
                {"model": f"ours, {name}", "weights": row["workload"], "dtype": figures["dtype"], **row["shape"]}
                | {"cold": figures["first_s"], "seconds": seconds, "stages": stages, "peak_memory": None}
                | rates(seconds, **row["shape"])
            )
    for model in models:
        log(f"{model}: loading, then {1 + repeats} clips")
        rows.append(bench_row(model, repeats=repeats, dtype=dtype, device=device))
        log(f"{model}: {rows[-1]['seconds']:.2f} s")
    return rows


def rates(seconds: float, num_frames: int, height: int, width: int, fps: float) -> dict[str, float]:
    """Seconds per second of video and per megapixel: the two measures that compare models with different clips."""
    return {
        "per_video_second": seconds / (num_frames / fps),
        "per_megapixel": seconds / (num_frames * height * width / 1e6),
    }
