"""bfloat16 around a loss function, with float32 for the convolutions whose gradient oneDNN gets wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..system.devices import multiplies_bfloat16

# On a CPU with AMX, torch 2.14 (oneDNN 3.12) reads memory that nobody wrote in the weight gradient of a bfloat16 conv3d
# of few frames on large images. With 64 channels and a batch of 4 its relative error is 0.24 for 3 frames of 64x64,
# 0.18 for 6 and 0.003, the rounding, for 7; a batch of 2 with 4 frames of 128x128, or one of 8 frames of 256x256,
# crashes. No case of 16 frames, or of images up to 48x48, was wrong.
FEW_FRAMES = 16
LARGE_IMAGE = 48 * 48


@contextlib.contextmanager
def autocast(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Compute in bfloat16, if `wanted` and if the device does not have to emulate it."""
    enabled = wanted and multiplies_bfloat16(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled), contextlib.ExitStack() as stack:
        if enabled and device.type == "cpu":
            stack.enter_context(_FewFramesInFloat32())
        yield


class _FewFramesInFloat32(TorchFunctionMode):
    """Runs the convolutions described above, forward and so backward, in float32."""

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
