"""Regional compilation: compiles the repeated blocks of a network, each shape separately, around our kernels.

A whole network takes minutes to compile, but its blocks take seconds: every later block reuses the code of the first.
`Regions` compiles a block's `forward` as a function of its weights and arguments, one copy per key: the structure of
the block (which all its siblings share) and its arguments' shapes, dtypes, devices and plain values. Code compiled for
one size is therefore never used for another. Each new size compiles once, nothing is recompiled, and no call checks
guards. With a folder (`store`) code outlives the process, see `artifacts`.

Without guards the key must hold all that the code relies on. The first call of each region in a process verifies this:
it runs both ways and compares. A key beyond `limit`, or one whose compilation fails, runs as plain Python. So does
everything if the machine has no compiler. These calls are counted by reason, with one log line.

Delete this file, `artifacts` and their part of `cache` when torch ships guard-free artifacts of regions, or when a
measurement on a GPU shows a gain below 5%. On two CPU cores the gain is 1.32x (`compile_vs_eager-cpu.json`).
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import types
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import artifacts, gc_pause
from .call_forms import flatten, kinds, rebuild

LOG = logging.getLogger("reducio_fast")

# A clip size has one key in the transformer and, for each tile shape, one per level: 6 + 1 of the decoder, 4 + 1 of the
# content encoder. All 91 buckets fit.
LIMIT = 2048
# Above this relative distance between compiled and plain outputs, the code cannot be that of the block. bfloat16
# rounding stays near a tenth of it; the code of another block exceeds it by far.
TOLERANCE = 0.05
SAMPLES = 1 << 20  # the least number of values to compare of each output

Compile = Callable[[artifacts.Function, Sequence[Tensor], Collection[int]], Callable[..., Sequence[Tensor]]]


@dataclass(frozen=True, slots=True)
class _Block:
    """`structure` is what compiled code relies on; sibling blocks share it. `number` replaces it in keys, since hashing
    it takes longer than the rest of a call. `places` locates the block's own weights, by name, since a module that
    moves to another device gets new ones."""

    structure: Hashable
    number: int
    places: list[tuple[str, dict[str, Any], str]]

    def weights(self) -> list[Tensor]:
        return [home[name] for _, home, name in self.places]


@dataclass(slots=True)
class _Region:
    name: str
    run: Callable[..., Sequence[Tensor]]
    form: Hashable  # of the block's result
    plain: list[Any]  # the result's leaves, with `Tensor` in place of each tensor
    seconds: float  # until its first result
    stored: bool  # loaded from a file, not compiled here
    calls: int = 1

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        outputs = self.run(*tensors)
        if self.form is None:
            return outputs[0]
        following = iter(outputs)
        return rebuild(self.form, (next(following) if leaf is Tensor else leaf for leaf in self.plain))


class Regions:
    """Compiles modules and runs them. Safe to share between threads.

    `compile(fn, tensors, free)` turns a function of tensors into a compiled one (see `artifacts.compile_function`). The
    default needs a compiler on this machine, and saves its code in the folder `store`. `kernels(device)`: what that
    code depends on outside the blocks, as a part of the key of `artifacts.digest`. If `open` is False, nothing new is
    compiled and compiled code stays in use. A warm-up sets it after its deadline.
    """

    def __init__(
        self,
        compile: Compile | None = None,
        limit: int = LIMIT,
        store: Path | None = None,
        kernels: Callable[[torch.device], Hashable] | None = None,
    ) -> None:
        self.limit, self.open, self.store, self.kernels = limit, True, store if compile is None else None, kernels
        self._compile = artifacts.compile_function if compile is None else compile
        self._obstacle = artifacts.obstacle() if compile is None else None
        if self._obstacle is not None:
            LOG.warning("torch.compile: %s; everything runs uncompiled", self._obstacle)
        self._lock = threading.RLock()
        self._regions: dict[Hashable, _Region] = {}
        self._failures: dict[Hashable, str] = {}
        self._misses: Counter[str] = Counter()
        self._structures: dict[Hashable, int] = {}
        self._blocks: weakref.WeakKeyDictionary[nn.Module, _Block] = weakref.WeakKeyDictionary()

    def __call__(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """`module.forward(*args, **kwargs)`; arguments and results are tensors and plain values, or lists and (named)
        tuples of them. Raises what the module raises."""
        return self.run(name, module, args, kwargs)

    def run(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: Sequence[Tensor] = ()
    ) -> Any:
        """As `__call__`. `free`: the arguments whose dimension 1 may have any length, the same for all of them."""
        if self._obstacle is not None:
            return self._run_uncompiled("no compiler", module, args, kwargs)
        if torch.is_grad_enabled():
            return self._run_uncompiled("gradients", module, args, kwargs)
        block = self._blocks.get(module) or self._describe_block(module)
        free = [x for x in free if x.shape[1] > 1]  # the tracer assumes that a length of 1 is broadcast
        tensors, signature = block.weights(), []
        _sign((args, kwargs), {id(x) for x in free}, signature, tensors)
        key = (name, block.number, *_modes(), *signature)
        region = self._regions.get(key)
        if region is None:
            if not self.open:  # checked before the lock, which a late compilation may still hold
                return self._run_uncompiled("not compiled in time", module, args, kwargs)
            with self._lock:
                if key not in self._regions:
                    reason = self._reason_not_to_compile(key)
                    if reason is None:
                        with gc_pause.paused():
                            return self._first_call(name, key, module, block, args, kwargs, free, tensors)
                    return self._run_uncompiled(reason, module, args, kwargs)
                region = self._regions[key]
        region.calls += 1
        return region(tensors)

    def forget(self, module: nn.Module) -> None:
        """Describe the module again at its next call. Call this after a change to it, except of weights in place."""
        self._blocks.pop(module, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Regions:
        """A copied network runs uncompiled: copies are made to be changed, or for runs without data."""
        return Regions(self._compile, limit=0)

    def describe(self) -> dict[str, Any]:
        """Regions, failures and misses, as plain data."""
        with self._lock:
            totals: dict[str, dict[str, Any]] = {}
            for region in self._regions.values():
                total = totals.setdefault(region.name, {"compiled": 0, "loaded": 0, "seconds": 0.0, "calls": 0})
                total["loaded" if region.stored else "compiled"] += 1
                total["seconds"] = round(total["seconds"] + region.seconds, 3)
                total["calls"] += region.calls
            return {
                "limit": self.limit,
                "regions": totals,
                "misses": dict(self._misses),
                "failures": sorted(set(self._failures.values())),
            }

    def _reason_not_to_compile(self, key: Hashable) -> str | None:
        """Why a key is not compiled now; None if it is."""
        if key in self._failures:
            return "compilation failed"
        return "limit" if len(self._regions) >= self.limit else None

    def _first_call(
        self, name: str, key: tuple[Hashable, ...], module: nn.Module, block: _Block, args: tuple[Any, ...],
        kwargs: dict[str, Any], free: Sequence[Tensor], tensors: list[Tensor],
    ) -> Any:  # fmt: skip
        """The result of the first call. The code is compiled or loaded, and compared with the block's plain result."""
        start = time.perf_counter()
        expected = type(module).forward(module, *args, **kwargs)
        plain: list[Any] = []
        shape = flatten(expected, plain)
        right = [leaf for leaf in plain if isinstance(leaf, Tensor)]
        file = None
        if self.store is not None:
            kernels = None if self.kernels is None else self.kernels(tensors[0].device)
            file = self.store / f"{artifacts.digest((name, block.structure, kernels, *key[2:]))}.bin"
        run = None if file is None or not file.is_file() else self._loaded(file, tensors, right)
        stored = run is not None
        try:
            if run is None:
                LOG.info("compiling %s for a new shape", name)
                passed: list[Any] = []
                flatten((args, tuple(kwargs.values())), passed)
                passed = [leaf for leaf in passed if isinstance(leaf, Tensor)]
                free_indices = [len(block.places) + i for i, x in enumerate(passed) if any(x is y for y in free)]
                run = self._compile(_flat(module, block, args, kwargs), tensors, free_indices)
                if (wrong := _difference(run(*tensors), right)) is not None:
                    raise ValueError(f"compiled, it returns {wrong}")
        except Exception as error:  # tracers and compilers raise many types; the plain block has just run without error
            self._failures[key] = f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            LOG.warning("not compiled, runs as it is: %s", self._failures[key])
            self._misses["compilation failed"] += 1
            return expected
        if file is not None and not stored:
            _keep(run, file)
        marked = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in plain]
        region = self._regions[key] = _Region(name, run, shape, marked, 0.0, stored)
        result = region(tensors)
        region.seconds = time.perf_counter() - start
        return result

    def _loaded(self, file: Path, tensors: Sequence[Tensor], right: list[Tensor]) -> Callable[..., Any] | None:
        try:
            run = artifacts.load(file, tensors)
            wrong = _difference(run(*tensors), right)
        except Exception as error:  # a damaged file may raise any type
            wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if wrong is None:
            return run
        LOG.warning("cache: ignored %s, compiled anew: %s", file, wrong)
        return None

    def _run_uncompiled(self, reason: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._misses[reason] += 1
        return type(module).forward(module, *args, **kwargs)

    def _describe_block(self, module: nn.Module) -> _Block:
        parts, places = [], []
        for prefix, part in module.named_modules(prefix="block"):
            for home in (part._parameters, part._buffers):
                places += [(f"{prefix}.{name}", home, name) for name, weight in home.items() if weight is not None]
            parts.append((prefix, type(part), *_attributes(part)))
        structure = (*parts, kinds(home[name] for _, home, name in places))
        with self._lock:
            number = self._structures.setdefault(structure, len(self._structures))
            self._blocks[module] = block = _Block(structure, number, places)
        return block


class Regional(nn.Module):
    """A network whose blocks run compiled through `regions`, or uncompiled if it is None."""

    regions: Regions | None = None

    def block(self, name: str, module: nn.Module, *args: Any, free: Sequence[Tensor] = ()) -> Any:
        return module(*args) if self.regions is None else self.regions.run(name, module, args, {}, free)


def connect(network: nn.Module, regions: Regions | None) -> None:
    """Make every `Regional` part of `network` run its blocks through `regions`."""
    for part in network.modules():
        if isinstance(part, Regional):
            part.regions = regions


def adopt(regions: Regions, name: str, network: nn.Module) -> None:
    """Make the repeated blocks of a foreign network run through `regions`. Its own `forward` calls them as before.

    The blocks: members of the classes that a diffusers model lists for this, else those of `transformer_blocks`.
    Call it again for a network that may have changed since, for example its adapters or attention processors.
    """
    listed = getattr(network, "_repeated_blocks", None) or ()
    blocks = [part for part in network.modules() if type(part).__name__ in listed]
    for block in blocks or getattr(network, "transformer_blocks", ()):
        regions.forget(block)
        block.forward = functools.partial(regions, name, block)


class _Bare(nn.Module):
    """Runs the `forward` of the block's class, even where the instance has another `forward`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


def _flat(module: nn.Module, block: _Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> artifacts.Function:
    """The module's `forward` as a function of its weights and of the tensors among its arguments."""
    names, bare = [name for name, _, _ in block.places], _Bare(module)
    leaves: list[Any] = []
    form = flatten((args, tuple(kwargs.values())), leaves)
    template = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def run(*tensors: Tensor) -> list[Tensor]:
        following = iter(tensors[len(names) :])
        positional, named = rebuild(form, (next(following) if leaf is Tensor else leaf for leaf in template))
        state = dict(zip(names, tensors, strict=False))
        named = dict(zip(kwargs, named, strict=True))
        # Every place is in `state`: tying those that share a weight would leave the tracer's weights in one of them.
        result = torch.func.functional_call(bare, state, positional, named, tie_weights=False)
        outputs: list[Any] = []
        flatten(result, outputs)
        return [output for output in outputs if isinstance(output, Tensor)]

    return run


def _difference(outputs: Sequence[Tensor], right: list[Tensor]) -> str | None:
    """How a compiled block's outputs differ from the right ones; None if they do not. NaN is not a difference."""
    if len(outputs) != len(right):
        return f"{len(outputs)} tensors, not {len(right)}"
    for output, expected in zip(outputs, right, strict=True):
        if (output.shape, output.dtype, output.device) != (expected.shape, expected.dtype, expected.device):
            return f"{tuple(output.shape)} {output.dtype}, not {tuple(expected.shape)} {expected.dtype}"
        if expected.device.type == "meta" or not expected.is_floating_point():
            continue
        sample = slice(None, None, max(1, expected.numel() // SAMPLES))  # a level of a decoder has 400 million values
        compiled, plain = (x.reshape(-1)[sample].double() for x in (output, expected))
        distance, size = (plain - compiled).norm(), plain.norm()
        if float(distance) > TOLERANCE * float(size):
            return f"values that are {float(distance / size):.2f} away from the block's"
    return None


def _keep(run: Any, file: Path) -> None:
    try:
        artifacts.save(run, file)
    except Exception as error:  # a full disk, or Inductor's caches are off: only the next process takes longer
        LOG.info("cache: %s not written: %s", file, (str(error).splitlines() or [""])[0])


def _sign(value: Any, free: Collection[int], signature: list[Hashable], tensors: list[Tensor]) -> None:
    """Append to `signature` what code is specific to: the form of the arguments, the shape, dtype and device of
    tensors, and any other value.

    Tensors are appended to `tensors`, made contiguous, so that a block after a convolution uses the code of its
    siblings. This runs in every call of every block: one list grows, since nested tuples take three times as long.
    """
    if isinstance(value, Tensor):
        shape = value.shape
        signature += ((shape[0], None, *shape[2:]) if id(value) in free else shape, value.dtype, value.device)
        tensors.append(value if value.is_contiguous() else value.contiguous())
    elif isinstance(value, tuple | list):
        signature += (type(value), len(value))
        for item in value:
            _sign(item, free, signature, tensors)
    elif isinstance(value, dict):
        signature += (dict, *value)
        for item in value.values():
            _sign(item, free, signature, tensors)
    else:
        signature += (type(value), value)


def _modes() -> tuple[Hashable, ...]:
    """Global settings of torch that change what a block computes."""
    # With a device: without one, torch 2.10 returns the state of CUDA only.
    casts = (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in ("cpu", "cuda"))
    return torch.is_inference_mode_enabled(), *casts, torch.get_float32_matmul_precision()


# Attributes that torch keeps in each module, weights and submodules included: all others are the module's own.
_TORCH_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEPTH = 4  # of attributes within attributes


def _attributes(module: nn.Module) -> list[Hashable]:
    """All attributes of a module except weights and submodules, and its hooks."""
    attributes = {
        name: value for name, value in vars(module).items() if name not in _TORCH_ATTRIBUTES and not _is_region(value)
    }
    hooks = {name: list(getattr(module, name).values()) for name in _HOOKS if getattr(module, name)}
    return [(name, _plain(value, _DEPTH)) for name, value in sorted((attributes | hooks).items())]


def _is_region(value: Any) -> bool:
    return isinstance(value, functools.partial) and isinstance(value.func, Regions)


def _plain(value: Any, depth: int) -> Hashable:
    """A value that is equal if compiled code may be shared. For a tensor or module in an attribute it is the class."""
    functions = (type, types.FunctionType, types.BuiltinFunctionType, torch._ops.OpOverloadPacket)
    if isinstance(value, (bool, int, float, str, bytes, types.NoneType, torch.dtype, torch.device, *functions)):
        return value
    if depth == 0 or isinstance(value, Tensor | nn.Module | Regions):
        return type(value)
    if isinstance(value, tuple | list | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return (type(value), *(_plain(item, depth - 1) for item in items))
    if isinstance(value, dict):
        return (dict, *((str(name), _plain(item, depth - 1)) for name, item in value.items()))
    if isinstance(value, functools.partial):
        return (type(value), _plain((value.func, value.args, value.keywords), depth - 1))
    if isinstance(value, types.MethodType):
        return (types.MethodType, value.__func__, _plain(value.__self__, depth - 1))
    return (type(value), _plain(getattr(value, "__dict__", {}), depth - 1))
