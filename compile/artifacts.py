"""Compiles a function of tensors with Inductor ahead of its calls, into a file that the next process loads.

`torch.compile` traces a function again in every process before it can look up its code, which takes half a second per
block, and it checks all guards in each call. Here `torch.export` traces the function once, without graph breaks.
Inductor compiles the graph for these shapes alone (`torch._inductor.standalone_compile`, which vLLM uses). The file's
name is a digest of all that the code depends on (`digest`). The next process loads a block in milliseconds, once
Inductor is imported.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .whole_files import written_whole

Function = Callable[..., Sequence[Tensor]]


def obstacle() -> str | None:
    """Why Inductor cannot compile on this machine, or None."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError as error:
        return str(error)
    try:
        get_cpp_compiler()
    except Exception as error:
        return f"no C++ compiler ({(str(error).splitlines() or [''])[0]})"
    return None


def trace(fn: Function, tensors: Sequence[Tensor], free: Collection[int] = ()) -> torch.fx.GraphModule:
    """Trace `fn`, which takes and returns tensors, into one graph for tensors like these.

    `free`: indices of tensors whose dimension 1 may have any length, which is the same for all of them in one call.
    Raises what the tracer raises, for example if `fn` branches on values. Raises ValueError if `fn` reads a tensor that
    is not an argument, because its values would be compiled in.
    """
    length = torch.export.Dim("length", min=2)
    shapes = tuple({1: length} if i in free else None for i in range(len(tensors)))
    with torch.no_grad():
        program = torch.export.export(_Traced(fn), tuple(tensors), dynamic_shapes=(shapes,), strict=False)
    if captured := [*program.constants, *program.state_dict]:
        raise ValueError(f"reads tensors that are neither arguments nor weights: {', '.join(captured)}")
    return program.graph_module


def compile_function(fn: Function, tensors: Sequence[Tensor], free: Collection[int] = ()) -> Any:
    """Trace and compile `fn` into a `torch._inductor.CompiledArtifact`. Raises what tracer and compiler raise."""
    import torch._inductor

    module = trace(fn, tensors, free)
    if _on_cpu(tensors):
        _split_bias(module)
    for node in module.graph.nodes:
        if "val" in node.meta:  # torch 2.10 looks for the tracer's fake tensors under dynamo's name for them
            node.meta["example_value"] = node.meta["val"]
    with torch.no_grad(), _settings(tensors):
        return torch._inductor.standalone_compile(module, list(tensors), aot=True)


def save(artifact: Any, path: Path) -> None:
    """Write the file, whole or not at all. Raises OSError, and RuntimeError if Inductor's caches are off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        artifact.save(path=str(temporary), format="binary")


def load(path: Path, tensors: Sequence[Tensor]) -> Any:
    """Load what `save` wrote here, or with the same versions on a similar machine. Raises what a bad file raises."""
    import torch._inductor

    with _settings(tensors):
        return torch._inductor.CompiledArtifact.load(path=str(path), format="binary")


def digest(key: Hashable) -> str:
    """The name of the file for a key of plain values, classes and functions, equal in every process.

    The digest includes the source of the key's classes and functions, so that changed source does not find old code. An
    op of torch does not lead to its source: the key needs a function of its module too (see `Regions.kernels`).
    """
    modules: set[str] = set()
    text = _text(key, modules)
    sources = [f"{name} {source_digest(name)}" for name in sorted(modules | {__name__})]
    threads = torch.get_num_threads()  # Inductor divides its loops among this many threads
    return hashlib.sha256("\n".join([text, *sources, f"threads {threads}"]).encode()).hexdigest()[:32]


class _Traced(nn.Module):
    """torch.export takes a module only; it does not see `fn` as a module, so the graph holds no weights."""

    def __init__(self, fn: Function) -> None:
        super().__init__()
        self.fn = (fn,)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.fn[0](*tensors))


def _settings(tensors: Sequence[Tensor]) -> Any:
    """Inductor's settings, the same for compiling and for loading.

    On a CPU the calls between kernels are C++ too, because Python there takes a tenth of a small block's time.
    Precompiled headers are off: they take 7 s to make, more than the few files here save with them. Inductor's test
    program for each instruction set is off: it takes 6 s on two cores. If a compiler is too old for an instruction set,
    the compilation fails instead, and the block runs uncompiled.
    """
    import torch._inductor.config as config

    chosen: dict[str, Any] = {}
    if _on_cpu(tensors):
        chosen = {
            "cpp_wrapper": True,
            "cpp_cache_precompile_headers": False,
            "cpp.vec_isa_ok": True,
            "cpp.use_decompose_tanh": True,
        }
    return config.patch(chosen)


def _on_cpu(tensors: Sequence[Tensor]) -> bool:
    return all(x.device.type == "cpu" for x in tensors)


def _split_bias(module: torch.fx.GraphModule) -> None:
    """linear(x, w, b) -> linear(x, w) + b. On a GPU Inductor does so where it is faster. On a CPU it keeps `addmm`,
    which first broadcasts the bias to the output: in bfloat16, 128 x 192 by 192 x 192 takes 31 us with `addmm` and
    24 us without.
    """
    aten = torch.ops.aten
    for node in module.graph.find_nodes(op="call_function", target=aten.linear.default):
        if len(node.args) == 3 and isinstance(bias := node.args[2], torch.fx.Node):
            node.args = node.args[:2]
            with module.graph.inserting_after(node):
                total = module.graph.call_function(aten.add.Tensor, (node, bias))
            total.meta = dict(node.meta)
            node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
    module.recompile()


def _text(value: Any, modules: set[str]) -> str:
    """Text of a value, equal in every process for equal values; collects the modules of classes and functions."""
    if isinstance(value, tuple):
        return f"({', '.join(_text(item, modules) for item in value)})"
    if isinstance(value, type) or callable(value) and hasattr(value, "__qualname__"):
        modules.add(value.__module__)
        return f"{value.__module__}.{value.__qualname__}"
    return str(value) if isinstance(value, torch._ops.OpOverloadPacket) else repr(value)


@functools.cache
def source_digest(module: str) -> str:
    """A digest of a module's file and its neighbours in the folder, and of the version of its distribution."""
    digest_so_far = hashlib.sha256()
    place = getattr(sys.modules.get(module), "__file__", None)
    for file in [] if place is None else sorted(Path(place).parent.glob("*.py")):
        digest_so_far.update(file.read_bytes())
    # Python's own modules, and packages that are installed under another name, have no distribution.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        digest_so_far.update(importlib.metadata.version(module.partition(".")[0]).encode())
    return digest_so_far.hexdigest()[:16]
