"""Counts the work of a network: floating-point operations, bytes moved, kernels, and live memory.

The code itself runs, on tensors of the meta device, so nothing is computed and no weights are needed. Counts are those
of torch's operators as they are called: a kernel is an operator that reads or writes elements, and it is assumed to
read each argument from memory once and to write each result once; arguments that show the same memory, such as a frame
and its neighbours in one buffer, are read once together. Caches make the true traffic smaller, layout copies inside a
library larger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ..memory.dry_run import DryRun, FusedAttention

_T = TypeVar("_T")

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_OVERWRITES = ("copy_", "fill_", "zero_")  # the argument they change is not read


@dataclass(frozen=True, slots=True)
class Work:
    """flops: two per multiply-add, of products, convolutions and attention; norms and activations are not counted.
    moved: bytes read and written. kernels: calls of operators that move any. live: the most bytes alive at once besides
    weights and arguments. operators: bytes moved by each kind."""

    flops: float
    moved: int
    kernels: int
    live: int
    operators: dict[str, int]


def count(run: Callable[[WorkCounter], Callable[[], Any]]) -> Work:
    """`run(counter)` prepares networks and arguments on the meta device and returns the call that is counted."""
    counter = WorkCounter()
    with torch.no_grad(), counter:
        call = run(counter)
        counter.flops, counter.moved, counter.kernels = 0.0, Counter[str](), 0
        _, live = counter.peak_of(call)
    return Work(counter.flops, counter.moved.total(), counter.kernels, live, dict(counter.moved.most_common()))


class WorkCounter(DryRun):
    """Counts while it is active; see `Work`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.moved, self.kernels = 0.0, Counter[str](), 0
        self._functions = FusedAttention(self._attend)

    def opaque(self, function: Callable[..., _T]) -> Callable[..., _T]:
        """`function` as one kernel: it moves its arguments and what it returns, whatever its twin makes on the way."""
        name = function.__module__.rpartition(".")[2]

        def call(*args: Any, **kwargs: Any) -> _T:
            paused, self._paused = self._paused, True
            try:
                result = function(*args, **kwargs)
            finally:
                self._paused = paused
            self._count(result)
            self._move(name, (args, kwargs), result)
            return result

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        # The registry lacks in-place products: `addmm_` is looked up as `addmm`.
        if formula := flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), func.overloadpacket)):
            self.flops += formula(*args, **kwargs, out_val=out)
        if not self._paused and name not in _ALLOCATIONS and name != "_local_scalar_dense":
            changed = [
                value
                for argument, value in zip(func._schema.arguments, (*args, *kwargs.values()), strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            read = (args, {key: value for key, value in kwargs.items() if key != "out"})
            if name in _OVERWRITES:
                read = (args[1:], kwargs)
            if changed or "out" in kwargs:
                self._move(name, read, kwargs.get("out", changed))
            elif not _is_view(args, out):
                self._move(name, read, out)
        return out

    def _move(self, name: str, read: Any, written: Any) -> None:
        tensors = {id(x): x for x in tree_leaves(read) if isinstance(x, Tensor)}
        results = [x for x in tree_leaves(written) if isinstance(x, Tensor)]
        by_storage: dict[int, list[Tensor]] = {}
        for x in tensors.values():
            by_storage.setdefault(x.untyped_storage()._cdata, []).append(x)
        self.moved[name] += sum(map(_size_together, by_storage.values())) + sum(map(_size, results))
        self.kernels += 1

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        self.flops += sdpa_flop_count(
            *(x.expand(*out.shape[:-2], *x.shape[-2:]).flatten(0, -4).shape for x in (q, k, v))
        )
        if not self._paused:
            self._move("scaled_dot_product_attention", (q, k, v), out)


def _size(x: Tensor) -> int:
    """Bytes of the elements that `x` shows; an expanded axis (stride 0) counts once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= 1 if stride == 0 else size
    return elements * x.element_size()


def _size_together(views: list[Tensor]) -> int:
    """Bytes that views of one storage show, at most the range from the first byte to the last."""
    starts = [int(x.storage_offset()) * x.element_size() for x in views]
    ends = [
        start
        + (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()
        for start, x in zip(starts, views, strict=True)
    ]
    return min(sum(map(_size, views)), max(ends) - min(starts))


def _is_view(args: Any, out: Any) -> bool:
    """Whether all results are views of an argument's memory, so that nothing was moved."""
    storages = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    return all(x.untyped_storage()._cdata in storages for x in results)
