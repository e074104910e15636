"""Regional torch.compile: the repeated blocks of a network, each shape on its own, around our kernels.

A whole network takes minutes to compile where its blocks take seconds: block two and all that follow find the code of
block one. `Regions` compiles a block's `forward` with `fullgraph=True`, and keeps one compiled copy for each key: the
structure of the block (which all its siblings share) and its arguments' shapes, strides, dtypes and plain values. What
was compiled for one size therefore never meets another: walking through sizes compiles each once, recompiles nothing,
and no guard of one size is tried for another. torch's own limit of eight shapes a function does not apply, since a copy
has a code object, hence a cache, of its own.

A key beyond `limit`, or one whose compilation fails, runs as plain Python, and so does everything where the machine has
no compiler: counted by reason, with one log line.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import types
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .graphs import flatten, kinds

LOG = logging.getLogger("reducio_fast")

# A size of clip has two keys in the transformer (the first block's batch is one half of the others') and, for each
# shape of tile, one a level: 6 + 1 of the decoder, 4 + 1 of the content encoder. All 91 buckets fit.
LIMIT = 2048

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def inductor(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for the shapes of the first call. No autotuning, which multiplies the wait; graphs are our own."""
    return torch.compile(fn, fullgraph=True, dynamic=False)


def obstacle() -> str | None:
    """Why Inductor cannot work on this machine, or None."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError as error:
        return str(error)
    try:
        get_cpp_compiler()
    except Exception as error:
        return f"no C++ compiler ({(str(error).splitlines() or [''])[0]})"
    return None


@dataclass(slots=True)
class _Region:
    name: str
    run: Callable[..., Any]
    seconds: float  # of the first call, nearly all of it compilation
    calls: int = 1


class Regions:
    """Runs modules compiled. Safe to share between threads.

    `compile` turns a function into a compiled one; the default needs a compiler on this machine. `open` False compiles
    nothing new: what is compiled stays in use. A warm-up whose deadline has passed sets it.
    """

    def __init__(self, compile: Compile | None = None, limit: int = LIMIT) -> None:
        self.limit, self.open = limit, True
        self._compile = inductor if compile is None else compile
        self._obstacle = obstacle() if compile is None else None
        if self._obstacle is not None:
            LOG.warning("torch.compile: %s; everything runs uncompiled", self._obstacle)
        self._lock = threading.RLock()
        self._regions: dict[Hashable, _Region] = {}
        self._failures: dict[Hashable, str] = {}
        self._misses: Counter[str] = Counter()
        self._structures: weakref.WeakKeyDictionary[nn.Module, Hashable] = weakref.WeakKeyDictionary()

    def __call__(self, name: str, module: nn.Module, *args: Any, **words: Any) -> Any:
        """`module.forward(*args, **words)`; arguments are tensors and plain values, or lists and (named) tuples of
        them. Raises what the module raises."""
        if self._obstacle is not None:
            return self._plainly("no compiler", module, args, words)
        leaves: list[Any] = []
        form = flatten((args, tuple(words), tuple(words.values())), leaves)
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        key = (name, self._structure(module), form, kinds(leaves), modes)
        region = self._regions.get(key)
        if region is None:
            if not self.open:  # before the lock, which a compilation that came too late may still hold
                return self._plainly("not compiled in time", module, args, words)
            with self._lock:
                if key not in self._regions:
                    reason = self._closed(key)
                    if reason is None:
                        return self._first(name, key, module, args, words)
                    return self._plainly(reason, module, args, words)
                region = self._regions[key]
        region.calls += 1
        return region.run(module, *args, **words)

    def describe(self) -> dict[str, Any]:
        """Everything it knows, as plain data."""
        with self._lock:
            totals: dict[str, dict[str, Any]] = {}
            for region in self._regions.values():
                total = totals.setdefault(region.name, {"compiled": 0, "seconds": 0.0, "calls": 0})
                total["compiled"] += 1
                total["seconds"] = round(total["seconds"] + region.seconds, 3)
                total["calls"] += region.calls
            return {
                "limit": self.limit,
                "regions": totals,
                "misses": dict(self._misses),
                "failures": sorted(set(self._failures.values())),
            }

    def _closed(self, key: Hashable) -> str | None:
        """Why a key that is not compiled is not to be compiled now."""
        if key in self._failures:
            return "compilation failed"
        return "limit" if len(self._regions) >= self.limit else None

    def _first(self, name: str, key: Hashable, module: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> Any:
        LOG.info("compiling %s for a new shape", name)
        start = time.perf_counter()
        run = self._compile(_copy(type(module).forward))
        try:
            result = run(module, *args, **words)
        except Exception as error:  # the compiler's, or the module's own, which then comes again below
            self._failures[key] = f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            LOG.warning("not compiled, runs as it is: %s", self._failures[key])
        else:
            self._regions[key] = _Region(name, run, time.perf_counter() - start)
            return result
        return self._plainly("compilation failed", module, args, words)

    def _plainly(self, reason: str, module: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> Any:
        self._misses[reason] += 1
        return type(module).forward(module, *args, **words)

    def _structure(self, module: nn.Module) -> Hashable:
        """What a compiled copy relies on, and siblings share: classes, plain attributes, shapes of weights."""
        if module not in self._structures:
            self._structures[module] = tuple(
                (name, type(part), *_attributes(part), *kinds(part.parameters(recurse=False)))
                for name, part in module.named_modules()
            )
        return self._structures[module]


class Regional(nn.Module):
    """A network of blocks, which `regions` runs compiled; None: as they are."""

    regions: Regions | None = None

    def block(self, name: str, module: nn.Module, *args: Any) -> Any:
        return module(*args) if self.regions is None else self.regions(name, module, *args)


def connect(network: nn.Module, regions: Regions | None) -> None:
    """Every part of `network` that is made of blocks runs them through `regions`."""
    for part in network.modules():
        if isinstance(part, Regional):
            part.regions = regions


def adopt(regions: Regions, name: str, network: nn.Module) -> None:
    """The repeated blocks of a foreign network run through `regions`, called as before by its own `forward`.

    Which they are: the classes that a diffusers model lists for this purpose, else the members of `transformer_blocks`.
    """
    listed = getattr(network, "_repeated_blocks", None) or ()
    blocks = [part for part in network.modules() if type(part).__name__ in listed]
    for block in blocks or getattr(network, "transformer_blocks", ()):
        block.forward = functools.partial(regions, name, block)


def _attributes(module: nn.Module) -> list[Hashable]:
    """Numbers, words, tuples of them, and the functions picked for its ops."""
    plain = (int, float, str, types.NoneType, types.FunctionType, torch.dtype, torch._ops.OpOverloadPacket)
    found = []
    for name, value in vars(module).items():
        items = value if isinstance(value, tuple) else (value,)
        if all(isinstance(item, plain) for item in items):
            found.append((name, value))
    return found


def _copy(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function again, over a code object of its own: torch keeps what it compiles with the code object."""
    fresh = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    fresh.__kwdefaults__ = forward.__kwdefaults__
    return fresh
