"""Measures how much memory a function needs by running it on tensors that have shapes and no contents.

`DryRun` runs the real code on torch's meta device and counts storages as they are allocated and freed. So the forecast
follows every change of that code, without weights and without arithmetic. Rules add the memory that is not visible as a
tensor: the copies that a convolution library makes in its own layout.

Tests compare it with the allocator's record of real runs (`torch.profiler`, whose memory events include allocations
inside operators), not with the process's resident size, which the C library's free lists distort.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..system import control_groups

_T = TypeVar("_T")

META = torch.device("meta")
# Up to this many values N*C*T*H, torch convolves on a CPU by unfolding, which copies the input once per tap. Larger
# inputs and batches use oneDNN (aten/src/ATen/native/Convolution.cpp, use_mkldnn).
UNFOLDED = 20480


class DryRun(TorchDispatchMode):
    """While active, `live` and `peak` count the bytes of all storages allocated inside, in their dtypes.

    Reading a value of a tensor gives 1 or True, so that checks of values pass; `nonzero` returns no index. `unfolding`
    counts convolutions as torch runs them on a CPU; a GPU, and oneDNN on channels-last tensors, do not unfold.
    """

    def __init__(self, unfolding: bool = False) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.unfolding = unfolding
        self._functions = FusedAttention()
        self._known: dict[tuple[Any, ...], tuple[int, Any]] = {}
        self._paused = False

    def __enter__(self) -> DryRun:
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def peak_of(self, function: Callable[..., _T], *args: Any) -> tuple[_T, int]:
        """The function's result, and the greatest number of bytes alive during the call, minus those alive before."""
        before, outer = self.live, self.peak
        self.peak = before
        result = function(*args)
        peak, self.peak = self.peak, max(outer, self.peak)
        return result, peak - before

    def given(self, *networks: nn.Module) -> None:
        """Do not count the weights of these networks: the function does not allocate them."""
        for network in networks:
            for x in (*network.parameters(), *network.buffers()):
                x.untyped_storage()._counted = True  # type: ignore[attr-defined]

    def remember(self, *modules: nn.Module) -> None:
        """Run modules of one class once per set of argument shapes; later calls only return outputs of the same form.

        A network of 28 equal blocks, or a clip of 16 tiles, then costs one run of a block or a tile.
        """
        for module in modules:
            module.forward = self._remembered(type(module), module.forward)

    def opaque(self, function: Callable[..., _T]) -> Callable[..., _T]:
        """`function` as a fused kernel: count only its result, not the intermediate tensors of its plain torch twin."""

        def call(*args: Any, **kwargs: Any) -> _T:
            # Cached by shapes: a decoder calls the same norm with the same size a dozen times, and the twin is slow.
            leaves = tree_leaves((args, tuple(sorted(kwargs.items()))))
            key = (function, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves))
            paused, self._paused = self._paused, True
            try:
                if key in self._known:
                    result = _of_form(self._known[key][1])
                else:
                    result = function(*args, **kwargs)
                    self._known[key] = 0, _form(result)
            finally:
                self._paused = paused
            self._count(result)
            return result

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.nonzero.default:
            return torch.empty((0, args[0].ndim), dtype=torch.int64, device=META)
        out = self._result(func, args, kwargs or {})
        if func is torch.ops.aten.convolution.default and args[0].ndim == 4 and args[0].stride(1) == 1:
            # A real convolution of channels-last images returns channels-last; on the meta device it does not.
            N, K, H, W = out.shape
            out = out.new_empty((N, H, W, K)).permute(0, 3, 1, 2)
        if not self._paused:
            if func is torch.ops.aten.convolution.default:
                self.peak = max(self.peak, self.live + self._inside_convolution(args[0], args[1], out))
            self._count(out)
        return out

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`func(*args, **kwargs)`. An operator that makes new tensors runs once per layout of its arguments, which may
        take torch a millisecond; later calls return tensors of the same form."""
        if func.is_view or func._schema.is_mutable:
            return func(*args, **kwargs)
        key = (func, _layout(args), _layout(tuple(kwargs.items())))
        if key in self._known:
            return _of_form(self._known[key][1])
        out = func(*args, **kwargs)
        if _is_new(out, (args, kwargs)):
            self._known[key] = 0, _form(out)
        return out

    def _count(self, result: Any) -> None:
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device == META:
                storage = x.untyped_storage()
                if not hasattr(storage, "_counted"):
                    storage._counted = True  # type: ignore[attr-defined]
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size

    def _remembered(self, module_class: type, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            key = (module_class, *(tuple(x.shape) for x in tree_leaves(args) if isinstance(x, Tensor)))
            if key not in self._known:
                result, peak = self.peak_of(forward, *args)
                self._known[key] = peak, _form(result)
                return result
            peak, form = self._known[key]
            self.peak = max(self.peak, self.live + peak)
            return _of_form(form)

        return call

    def _inside_convolution(self, x: Tensor, weight: Tensor, out: Tensor) -> int:
        """Peak bytes that a convolution allocates, including its result."""
        result = out.numel() * out.element_size()
        taps = math.prod(weight.shape[2:])
        if self.unfolding and x.dtype == torch.float32 and x.shape[0] == 1 and math.prod(x.shape[:4]) <= UNFOLDED:
            return result + (taps > 1) * taps * x.shape[1] * math.prod(out.shape[2:]) * x.element_size()
        if x.stride(1) == 1 or not x.is_contiguous() or taps == 1:
            return result
        # Channels-first tensors are copied to blocks of 16 channels (oneDNN) or to channels-last (cuDNN's and MIOpen's
        # matrix kernels), convolved and copied back; the first copy is freed before the copy back.
        block = 16 * x.element_size()
        source = x.shape[0] * -(-x.shape[1] // 16) * block * math.prod(x.shape[2:])
        blocked = out.shape[0] * -(-out.shape[1] // 16) * block * math.prod(out.shape[2:])
        return blocked + max(source, result)


@dataclass(frozen=True, slots=True)
class _Form:
    """Shape, strides and dtype of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _layout(value: Any) -> Any:
    """What the form of an operator's result depends on, as a key; of a plain value its type too, since 1 equals 1.0."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(_layout(each) for each in value)
    return type(value), value


def _is_new(result: Any, given: Any) -> bool:
    """Whether the result is tensors on the meta device that share memory neither with `given` nor with each other."""
    leaves = tree_leaves(result)
    if not all(isinstance(x, Tensor) and x.device == META for x in leaves):
        return False
    made = {x.untyped_storage()._cdata for x in leaves}
    return len(made) == len(leaves) and made.isdisjoint(
        x.untyped_storage()._cdata for x in tree_leaves(given) if isinstance(x, Tensor)
    )


def _form(result: Any) -> Any:
    return tree_map_only(Tensor, lambda x: _Form(x.shape, x.stride(), x.dtype), result)


def _of_form(form: Any) -> Any:
    return tree_map_only(_Form, lambda x: torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device=META), form)


class FusedAttention(TorchFunctionMode):
    """Treats attention as fused on the meta device, where torch would allocate all its L x S weights.

    Calls `tell(q, k, v, out)`, if given, for each attention.
    """

    def __init__(self, tell: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        mask = (kwargs or {}).get("attn_mask")
        # SDPA converts a boolean mask to q's dtype; this copy is counted until the return.
        wide = mask.to(q.dtype) if mask is not None and mask.dtype == torch.bool else None  # noqa: F841
        # Strides of [B, L, N, D], as the kernels write it, so that a view as [B, L, N * D] needs no copy.
        shape = (*q.shape[:-3], q.shape[-2], q.shape[-3], v.shape[-1])
        out = q.new_empty(shape).transpose(-3, -2)
        if self._tell is not None:
            self._tell(q, k, v, out)
        return out


def without_weights(value: _T, *networks: nn.Module, keep: tuple[Any, ...] = ()) -> _T:
    """A deep copy of `value` with the networks' weights on the meta device; objects in `keep` are not copied."""
    memo: dict[int, Any] = {id(each): each for each in keep}
    for network in networks:
        for p in network.parameters():
            memo.setdefault(id(p), nn.Parameter(p.detach().to(META), requires_grad=False))
        for b in network.buffers():
            memo.setdefault(id(b), b.detach().to(META))
    return copy.deepcopy(value, memo)


def weight_bytes(*networks: nn.Module) -> int:
    """Bytes of all weights and buffers of the networks; shared ones count once."""
    storages = {}
    for network in networks:
        for x in (*network.parameters(), *network.buffers()):
            storage = x.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None if the system does not report it (a CPU without /proc)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # torch's allocator keeps freed memory and reuses it.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    lines = _read(Path("/proc/meminfo")).splitlines()
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*available, *control_groups.free_bytes()]) if available else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
