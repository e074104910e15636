"""Which implementation each module of a fast model gets: decided once, when the model is built, and written down.

The choices are our Triton kernel, the vendor's library through torch ("vendor": cuDNN, MIOpen, torch's own attention),
`flash-attn` where it is installed, or, on a CPU, plain torch ops with the same algebra.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..triton_kernels import conv3d
from ..triton_kernels.launch import FLOATING
from ..triton_kernels.registry import OPS
from ..triton_kernels.tables import arch_of, table
from ..triton_kernels.winograd import WIDE
from . import cpu_products
from .quantisation import Quantisation, eight_bit_type

# Names of attention backends, diffusers' where it has one, and the implementation of each; "auto" leaves it open.
ATTENTION = {"auto": None, "native": "vendor", "flash": "flash-attn", "reducio": "kernel"}
FLASH_ATTENTION_DTYPES = (torch.float16, torch.bfloat16)


def check_attention(word: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError, one line, for a backend that is unknown or not supported on `device` in `dtype`."""
    if not isinstance(word, str) or word not in ATTENTION:
        raise ValueError(f"{word!r} is not known; known are {', '.join(ATTENTION)}")
    if word in ("auto", "native"):
        return
    if device.type != "cuda":
        raise ValueError(f"{word!r} needs a GPU, the pipeline is on {device.type}; auto and native run here")
    if word == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError("'flash' needs the package flash-attn, which is not here; auto, native and reducio are")
    if dtype not in (FLASH_ATTENTION_DTYPES if word == "flash" else FLOATING):
        raise ValueError(f"{word!r} does not take {dtype}; auto and native do")


def default_dtype(device: torch.device, stored: torch.dtype, network: nn.Module) -> tuple[torch.dtype, str]:
    """The dtype in which a network's twin runs if none was asked for, and why.

    On a CPU, for weights stored in float32: the dtype in which its products were measured faster. On a GPU, and for
    weights in any other dtype: that of the weights.
    """
    if device.type == "cpu" and stored == torch.float32:
        return cpu_products.choose(network)
    return stored, "that of the weights"


@dataclass(frozen=True, slots=True)
class Choice:
    """One line of the report: the module's path, the op it runs, what runs it and why."""

    path: str
    op: str
    implementation: str  # "kernel", "vendor", "flash-attn", "torch" or "winograd"
    why: str


@dataclass(slots=True)
class Plan:
    """Picks implementations for models on one device in one dtype; `choices` lists every pick so far.

    `allowed`: the ops that may run our kernel, None for all of them; an ablation leaves some out.
    """

    device: torch.device
    dtype: torch.dtype
    allowed: Collection[str] | None = None
    choices: list[Choice] = field(default_factory=list)
    attention: str = "auto"  # a key of ATTENTION
    quantisation: Quantisation | None = None

    def pick(self, path: str, op: str, shape: str = "") -> Callable[..., Any]:
        """The callable for `op` at module `path`. `shape` is its class in the table, e.g. "128->128" of a convolution.

        A GPU's table names the shapes for which a measurement found another implementation faster than our kernel.
        """
        module = OPS[op]
        implementation, why = self._decide(op, shape)
        self.choices.append(Choice(path, f"{op} {shape}".strip(), implementation, why))
        if implementation == "kernel":
            return getattr(torch.ops.reducio_fast, op)
        if implementation == "winograd":
            return functools.partial(module.twin, winograd=True)
        return flash_attention if implementation == "flash-attn" else module.twin

    def quantised(self, path: str) -> tuple[Tensor, torch.dtype] | None:
        """For a convolution that computes in 8-bit numbers: the largest magnitude of each input channel, and the 8-bit
        dtype. None for any other module."""
        if self.quantisation is None or path not in self.quantisation.largest:
            return None
        return self.quantisation.largest[path], eight_bit_type(self.quantisation.word, self.device)

    def takes_statistics(self, op: str, shape: str) -> bool:
        """Whether a convolution's epilogue computes the statistics, so that the norm's kernel need not."""
        return all(self._decide(*pick)[0] == "kernel" for pick in ((op, shape), ("group_norm_silu", "")))

    def runs_kernel(self, op: str, shape: str) -> bool:
        """Whether `pick` gives our kernel."""
        return self._decide(op, shape)[0] == "kernel"

    def clip_statistics(self) -> Callable[[Tensor], Tensor]:
        """The function from a clip [N, T, H, W, C] to the `partials` of `group_norm_silu`, [N, tiles, 3, C]."""
        kernel = self._decide("group_norm_silu", "")[0] == "kernel"
        return torch.ops.reducio_fast.clip_statistics if kernel else conv3d.statistics

    def library_pads(self, op: str, shape: str) -> bool:
        """Whether a convolution runs on torch ops: they add the border themselves, which costs less than writing it."""
        return self._decide(op, shape)[0] in ("torch", "winograd")

    def _decide(self, op: str, shape: str) -> tuple[str, str]:
        if self.device.type != "cuda":
            if self._wide_on_cpu(op, shape):
                faster, why = cpu_products.prefers_winograd()
                return "winograd" if faster else "torch", why
            return "torch", f"{self.device.type}: the same algebra on torch ops"
        if self.dtype not in FLOATING:
            return "vendor", f"kernels do not take {self.dtype}"
        if self.allowed is not None and op not in self.allowed:
            return "vendor", "its kernel is not allowed"
        name, why = self._wanted(op, shape)
        if name == "flash-attn":
            if shape.startswith("cross"):
                return "kernel", "flash-attn takes no count of keys an item"
            if shape.endswith("frames"):
                return "kernel", "flash-attn takes no mask by frames"
            if self.dtype not in FLASH_ATTENTION_DTYPES:
                return "kernel", f"flash-attn does not take {str(self.dtype).removeprefix('torch.')}"
            if importlib.util.find_spec("flash_attn") is None:
                return "kernel", f"{why} with flash-attn, which is not installed"
        return name, why

    def _wide_on_cpu(self, op: str, shape: str) -> bool:
        """Whether it is a convolution in float32 on a CPU for which Winograd's algorithm may be faster."""
        if self.device.type != "cpu" or self.dtype != torch.float32 or op not in ("conv3d", "upsample_conv3d"):
            return False
        return not shape.endswith("frames") and min(map(int, shape.split("->"))) >= WIDE

    def _wanted(self, op: str, shape: str) -> tuple[str, str]:
        """The requested implementation, else the one measured fastest, else our kernel; and why."""
        asked = ATTENTION[self.attention] if op == "attention" else None
        if asked is not None:
            return asked, f"asked for: {self.attention}"
        arch = arch_of(self.device)
        measured = table(arch).get("plan", {})
        for key in (f"{op} {shape}", op):
            if key in measured:
                return measured[key], f"measured fastest on {arch}"
        return "kernel", f"no faster one was measured on {arch}"


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, key_count: Tensor | None = None, scale: float | None = None, frame: int = 0
) -> Tensor:
    """flash-attn with our op's arguments. It takes no key counts and no masks by frames, so plans avoid it there."""
    if key_count is not None or frame:
        raise ValueError(f"flash-attn takes no key_count ({key_count}) and no frame ({frame})")
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=scale)
