"""The report of `reducio-fast env` for bug reports: versions, devices and CPU features.

The report must also work with a broken installation, so a probe that fails yields its error as the value.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .environment_variables import VARIABLES, read

PACKAGES = (
    "torch", "triton", "diffusers", "transformers", "open_clip_torch", "safetensors", "numpy", "pillow",
    "imageio-ffmpeg", "nvidia-ml-py",
)  # fmt: skip
OPTIONAL_PACKAGES = ("flash-attn", "amd-aiter", "xformers", "torchao", "accelerate", "scikit-image", "scikit-learn")
# Repositories with components of full-size models. Each has a file whose presence shows that the hub's cache holds it.
PUBLISHED = {
    "google/flan-t5-xxl": "model.safetensors.index.json",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "open_clip_model.safetensors",
    "stabilityai/sd-vae-ft-ema": "diffusion_pytorch_model.safetensors",
    "PixArt-alpha/PixArt-XL-2-512x512": "model_index.json",
    "PixArt-alpha/PixArt-XL-2-1024-MS": "model_index.json",
    "stabilityai/stable-diffusion-xl-base-1.0": "model_index.json",
}
# CPU features that determine the speed of convolutions and bfloat16 matrix products.
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
ARM_FEATURES = ("asimd", "asimdhp", "sve", "sve2", "bf16", "i8mm")


def describe() -> dict[str, Any]:
    """The report as plain JSON types. Never raises."""
    return {
        "reducio_fast": _version("reducio-fast"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "optional_packages": {name: _version(name) for name in OPTIONAL_PACKAGES},
        "cpu": _try(_cpu),
        "torch_build": _try(_torch_build),
        "devices": _try(_devices),
        "embedded_model": _try(_embedded_model),
        "variables": _try(_variables),
        "hub_cache": _try(_hub_cache),
    }


def _try(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:  # a bug report needs the error message
        return f"unavailable: {type(error).__name__}: {error}"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    known = CPU_FEATURES if platform.machine() in ("x86_64", "AMD64") else ARM_FEATURES
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu_model": model, "cpu_cores": cores, "cpu_features": " ".join(f for f in known if f in flags)}


def _torch_build() -> dict[str, Any]:
    torch = importlib.import_module("torch")
    backend = "miopen" if torch.version.hip else "cudnn"
    return {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        backend: torch.backends.cudnn.version(),  # on ROCm builds MIOpen's version
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
    }


def _devices() -> list[dict[str, Any]]:
    torch = importlib.import_module("torch")
    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        arch = device.gcnArchName if torch.version.hip else f"sm_{device.major}{device.minor}"
        rows.append(
            {
                "name": device.name,
                "arch": arch,
                "memory_gib": round(device.total_memory / 2**30, 1),
                "processors": device.multi_processor_count,
                "driver": None if torch.version.hip else _try(_nvidia_driver),
            }
        )
    return rows


def _nvidia_driver() -> str:
    pynvml = importlib.import_module("pynvml")
    pynvml.nvmlInit()
    try:
        return pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()


def _hub_cache() -> str:
    """The published encoders and first stages that the hub's cache holds; uses no network."""
    hub = importlib.import_module("huggingface_hub")
    cached = [name for name, file in PUBLISHED.items() if isinstance(hub.try_to_load_from_cache(name, file), str)]
    return ", ".join(cached) or "no published encoder or first stage"


def _variables() -> dict[str, str]:
    """The package's environment variables, each with its value or a description of its default."""
    return {v.name: read(v.name) or f"not set: {v.default}" for v in VARIABLES.values()}


def _embedded_model() -> str:
    files = [f for f in (Path(__file__).parents[1] / "models" / "tiny").rglob("*") if f.is_file()]
    return f"{sum(f.stat().st_size for f in files) / 1e6:.1f} MB" if files else "absent"
