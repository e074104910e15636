"""bfloat16 around a loss function, with float32 for the convolutions whose gradient oneDNN gets wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..system.devices import multiplies_bfloat16

# On a CPU with AMX, torch 2.14 (oneDNN 3.12) reads uninitialised memory in the weight gradient of a bfloat16 conv3d of
# few frames on large images. With 64 channels, images of 64x64 and a batch of 4 the relative error was 0.24 for 3
# frames (kernel 3x1x1) and 0.18 for 6 (3x3x3), where rounding gives 0.003; 4 frames of 128x128 in a batch of 2, and 8
# of 256x256 alone, crashed the process. No measured case of 16 frames, or of images up to 48x48, was wrong.
FEW_FRAMES = 16
LARGE_IMAGE = 48 * 48


@contextlib.contextmanager
def autocast(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Compute in bfloat16, if `wanted` and if the device does not have to emulate it."""
    enabled = wanted and multiplies_bfloat16(device)
    few_frames = float32_for_few_frames(enabled and device.type == "cpu")
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled), few_frames:
        yield


def float32_for_few_frames(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """A context in which the convolutions described above run, forward and so backward, in float32, if `wanted`."""
    return _FewFramesInFloat32() if wanted else contextlib.nullcontext()


class _FewFramesInFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.conv3d or not _few_frames((args[0] if args else kwargs["input"]).shape):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_float32, args), **{name: _float32(value) for name, value in kwargs.items()})


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _few_frames(shape_BCTHW: torch.Size) -> bool:
    frames, height, width = shape_BCTHW[-3:]
    return frames < FEW_FRAMES and height * width > LARGE_IMAGE
