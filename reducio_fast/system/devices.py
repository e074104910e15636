"""Resolves the devices and dtypes that a user names, and checks for Triton."""

from __future__ import annotations

import gc
from typing import Any

import torch

from .errors import ReducioError

MINIMUM_TRITON = (3, 6)
CPU_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")  # features of a processor; bf16 is Arm's
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_dtype(dtype: Any, torch_dtype: Any, device: torch.device) -> torch.dtype:
    """The dtype given by either argument; by default float32 on a CPU, bfloat16 elsewhere.

    Raises ReducioError if the two differ or the dtype is not in `DTYPES`.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ReducioError(f"dtype={dtype} and torch_dtype={torch_dtype} differ; give only one of them")
    requested = torch_dtype if dtype is None else dtype
    if requested is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    resolved = DTYPES.get(requested.removeprefix("torch.")) if isinstance(requested, str) else requested
    if not isinstance(resolved, torch.dtype) or resolved not in DTYPES.values():
        raise ReducioError(f"dtype: must be one of {', '.join(DTYPES)}, is {requested!r}")
    return resolved


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16. Without them torch emulates it: on a CPU with AVX2 alone a
    training step of the embedded text-to-image network takes 15 s instead of 1.2 s."""
    if device.type == "cpu":
        features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(features.get(name) for name in CPU_BFLOAT16)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def widened(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Convert a floating-point tensor of less than 16 bits to float32; return any other unchanged. torch stores the
    narrow dtypes but has few operators for them (no `isfinite`, no sum). Raises ReducioError, which names the tensor as
    `name`, for a dtype that torch cannot convert: it packs several values into one element."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize >= 2:
        return tensor
    try:
        return tensor.float()
    except NotImplementedError as error:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ReducioError(f"{name}: is of {dtype}, which torch cannot convert; unpack it to float32") from error


def resolve_device(device: Any) -> torch.device:
    """The given device; by default a GPU if there is one. Raises ReducioError if the device cannot be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ReducioError(f"device: {device!r} cannot be used here ({line})") from error
    if resolved.type == "meta":
        raise ReducioError(f"device: {device!r} cannot be used here (its tensors hold no values)")
    return resolved


def triton_missing() -> str | None:
    """The reason why the kernels cannot be imported, in one line; None if they can."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= MINIMUM_TRITON else f"Triton is {triton.__version__}, the kernels need 3.6"


def free_unused() -> None:
    """Give memory that nothing refers to any more back to the system."""
    gc.collect()  # networks hold cycles, which would keep their memory until some later collection
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
