"""Bounded capture and replay of CUDA and HIP graphs: one launch in place of the hundreds that a function makes.

`Graphs` decides which calls are captured, which run eagerly and why. A separate function captures (`capture_graph` on a
GPU), so every rule here is tested without a GPU. The rules:

- a graph serves one key: the name of a function, its arguments' shapes, strides, dtypes, device and stream, and every
  argument that is not a tensor. A call with another key is a miss;
- a miss runs eagerly and is counted by its reason. A new key runs eagerly once and is captured at its second call, so
  one-off shapes cost nothing. A key past `limit` runs eagerly too. So does a key whose capture has failed: it is not
  tried again;
- inputs are copied into buffers that the graph reads, unless the buffer already holds the same tensor, unchanged;
- tensors that stay the same over many calls, such as a clip's keys and values, may be put into buffers that graphs read
  in place (`lend`). Then there is one copy of them, not one for the caller and one for each graph;
- results are copies, safe to keep: another thread's call may replay the graph at any time;
- all graphs of a stream use one memory pool, where their intermediates overlap: no more than the largest graph needs,
  plus every graph's inputs and outputs. These are limited in bytes: beyond the limit, the least recently used graph is
  dropped. If memory runs out, all graphs are dropped, and the call runs again without them;
- a graph reads weights at their addresses during capture: after moving or rewriting weights, call `reset`.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .call_forms import flatten, kinds, rebuild

LOG = logging.getLogger("reducio_fast")

# At 1024x1024 a clip has 13 keys: one denoising step, four tile shapes to encode, and the same four to decode at up to
# two batch sizes. Two clip sizes in turn fit.
LIMIT = 32
# At the limit a key replaces the least used graph once it has been called this many times as often. So a server's first
# keys do not block its most frequent ones, and keys that take turns do not evict each other.
OFTEN = 2
SHARE = 8  # the inputs and outputs of all graphs may take 1 / SHARE of a GPU's memory
REMEMBERED = 1024  # cap on remembered keys, so a server's memory does not grow with the number of sizes

_one_capture_at_a_time = threading.Lock()  # CUDA allows one capture at a time in a process


@dataclass(slots=True, eq=False)
class Pool:
    """Memory of the graphs captured from one stream. Only the capture function reads it."""

    handle: Any = None
    stream: Any = None


Capture = Callable[[Callable[..., Any], list[Tensor], Pool], tuple[Callable[[], Any], Any]]


def capture_graph(fn: Callable[..., Any], inputs: list[Tensor], pool: Pool) -> tuple[Callable[[], Any], Any]:
    """Records `fn(*inputs)` on the GPU of the inputs: (replay, its outputs, which every replay overwrites)."""
    with _one_capture_at_a_time, torch.cuda.device(inputs[0].device):
        current = torch.cuda.current_stream()
        if pool.handle is None:
            pool.handle, pool.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        try:
            # This run compiles and loads kernels and makes library handles and workspaces, none of which a capture
            # allows. It uses the capture's own stream, since handles and workspaces belong to a stream.
            pool.stream.wait_stream(current)
            with torch.cuda.stream(pool.stream):
                fn(*inputs)
            graph = torch.cuda.CUDAGraph()
            # thread_local: an allocation in another thread does not make the capture fail. Triton's descriptors are
            # allocated during the capture by torch, hence in the pool, and stay with the graph.
            with torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local"):
                outputs = fn(*inputs)
        finally:
            torch.cuda.set_stream(current)  # torch.cuda.graph leaves its own stream set if a capture cannot be ended
        return graph.replay, outputs


def pool_bytes(pool: Pool) -> int:
    """Device memory that the pool has reserved."""
    if pool.handle is None:
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s.get("segment_pool_id", ())) == tuple(pool.handle))


@dataclass(slots=True)
class _Graph:
    """One captured function. `held[i]` is the tensor, and its version, that `inputs[i]` is a copy of."""

    name: str
    replay: Callable[[], Any]
    inputs: list[Tensor]
    held: list[tuple[weakref.ref[Tensor], int] | None]
    outputs: Any
    pool: Pool
    hits: int = 0
    used: int = 0  # time of the last replay, counted in replays of all graphs


@dataclass(slots=True)
class _Lent:
    """Buffers that graphs read in place, and the owner of their contents."""

    buffers: list[Tensor]
    owner: weakref.ref[Any]


class Graphs:
    """Calls functions, through graphs where there is one. Safe to share between threads.

    `limit`: the largest number of graphs; at the limit a more frequent key replaces the least used graph.
    `limit_bytes`: the limit of all graphs' inputs and outputs; None is an eighth of the GPU's memory, and no limit
    elsewhere. `sightings`: how often a key runs eagerly before it is captured; it is 0 during a warm-up.
    """

    def __init__(
        self,
        capture: Capture = capture_graph,
        limit: int = LIMIT,
        sightings: int = 1,
        limit_bytes: int | None = None,
    ) -> None:
        self.limit, self.sightings, self.limit_bytes = limit, sightings, limit_bytes
        self._capture = capture
        self._lock = threading.RLock()
        self._capturing = False
        self._graphs: dict[tuple[Any, ...], _Graph] = {}  # by (name, place, form, kinds)
        self._pools: dict[Hashable, Pool] = {}
        self._seen: dict[tuple[Any, ...], int | str] = {}  # sightings, or why the capture failed
        self._lent: dict[tuple[Any, ...], _Lent] = {}  # by (name, place, kinds)
        self._misses: Counter[str] = Counter()
        self._hits, self._resets = 0, 0

    def __call__(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)`. Arguments and results are tensors and plain values, or lists and (named) tuples of them.

        `name` identifies `fn` and all that it reads besides its arguments: one name per function and model. `fn` must
        not read a number back from the device, nor write to its arguments. Its Python code, counters included, runs at
        captures and misses only. Raises what `fn` raises.
        """
        leaves: list[Any] = []
        form = flatten(args, leaves)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        reason, graph = _unfit(tensors), None
        if reason is None:
            place = _place(tensors[0])
            key = (name, place, form, kinds(leaves))
            with self._lock:
                if self._capturing:  # an inner call becomes part of the outer graph
                    return fn(*args)
                graph = self._graphs.get(key)
                if graph is None:
                    reason = self._reason_not_to_capture(key) or self._record(key, fn, leaves)
                    graph = self._graphs.get(key)
                if graph is not None and self._reads_other_lent(graph, tensors):
                    reason, graph = "lent to another", None
                if graph is not None:
                    return self._replay(graph, tensors)
        return self._eagerly(reason, fn, args)

    def lend(self, name: str, tensors: list[Tensor], owner: Any) -> list[Tensor]:
        """`tensors` in buffers that graphs of `name` read in place, for as long as `owner` lives and does not write.

        The next owner's tensors are copied into the same buffers. While an earlier owner is alive, or if torch does not
        track writes (inference mode), `tensors` themselves are returned: a graph then has copies, or its call runs
        eagerly.
        """
        if not tensors or any(x.is_inference() for x in tensors) or _unfit(tensors) is not None:
            return tensors
        key = (name, _place(tensors[0]), kinds(tensors))
        with self._lock:
            lent = self._lent.get(key)
            if lent is None:
                self._forget_unread()
                self._lent[key] = _Lent(list(tensors), weakref.ref(owner))
                return tensors
            if lent.owner() not in (None, owner):
                return tensors
            for buffer, x in zip(lent.buffers, tensors, strict=True):
                buffer.copy_(x)
            lent.owner = weakref.ref(owner)
            return list(lent.buffers)

    def reset(self, names: Collection[str] | None = None) -> None:
        """Forget the graphs of these functions (None: of all), their sightings and failures. Call it when weights have
        changed, or when memory is needed."""
        with self._lock:
            self._release(names)
            self._seen = {} if names is None else {k: state for k, state in self._seen.items() if k[0] not in names}

    def describe(self) -> dict[str, Any]:
        """Graphs, hits, misses by reason and pool sizes, as plain data; sizes in bytes."""
        with self._lock:
            return {
                "limit": self.limit,
                "lent_bytes": sum(_bytes(x) for lent in self._lent.values() for x in lent.buffers),
                "hits": self._hits,
                "misses": dict(self._misses),
                "resets": self._resets,
                "remembered": len(self._seen),
                "pool_bytes": sum(map(pool_bytes, {graph.pool for graph in self._graphs.values()})),
                "graphs": [
                    {
                        "name": graph.name,
                        "hits": graph.hits,
                        "inputs": dict(Counter(_text(x) for x in graph.inputs)),
                        "buffer_bytes": _buffer_bytes(graph),
                    }
                    for graph in self._graphs.values()
                ],
                "failures": sorted({state for state in self._seen.values() if isinstance(state, str)}),
            }

    # ---- with the lock held -----------------------------------------------------------------------------------------

    def _reason_not_to_capture(self, key: Hashable) -> str | None:
        """Why a key without a graph is not captured now; None if it is."""
        state = self._seen.get(key, 0)
        if isinstance(state, str):
            return "capture failed"
        if state < self.sightings:
            self._note(key, state + 1)
            return "first sight"
        if len(self._graphs) >= self.limit:
            rarest = min(self._graphs, key=lambda key: self._graphs[key].hits)
            if state < OFTEN * self._graphs[rarest].hits:
                self._note(key, state + 1)
                return "limit"
            self._end([rarest])
            self._seen.pop(rarest, None)
        return None

    def _note(self, key: Hashable, state: int | str) -> None:
        self._seen[key] = state
        if len(self._seen) > REMEMBERED:
            self._seen.pop(next(iter(self._seen)))

    def _record(self, key: tuple[Any, ...], fn: Callable[..., Any], leaves: list[Any]) -> str | None:
        """Capture, or return why there is no graph, with one log line. Other graphs stay, unless memory ran out."""
        name, place, form, _ = key
        # Without the tensors: a capture function that keeps `flat` must not keep them alive.
        plain = [None if isinstance(x, Tensor) else x for x in leaves]
        where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

        def flat(*tensors: Tensor) -> Any:
            filled = plain.copy()
            for i, tensor in zip(where, tensors, strict=True):
                filled[i] = tensor
            return fn(*rebuild(form, iter(filled)))

        self._capturing = True
        try:
            lent_ids = self._lent_ids()
            inputs = [leaves[i] if id(leaves[i]) in lent_ids else leaves[i].detach().clone() for i in where]
            pool = self._pools.setdefault(place, Pool())
            replay, outputs = self._capture(flat, inputs, pool)
        except Exception as error:  # of any type: the same call without a graph may still succeed
            failure = f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            LOG.warning("no graph of %s; it runs without", failure)
            self._note(key, failure)
            self._pools.pop(place, None)  # where a capture did not end, its pool may take no other (pytorch #180395)
            if isinstance(error, torch.OutOfMemoryError):
                self._release()
            return "capture failed"
        finally:
            self._capturing = False
        held = [_version(leaves[i]) for i in where]
        self._graphs[key] = _Graph(name, replay, inputs, held, outputs, pool, used=self._hits)
        self._keep_within_bytes(key)
        return None

    def _lent_ids(self) -> set[int]:
        return {id(x) for lent in self._lent.values() for x in lent.buffers}

    def _reads_other_lent(self, graph: _Graph, tensors: list[Tensor]) -> bool:
        """Whether the graph reads a lent buffer in place that is not among `tensors`, so they must not be copied in."""
        lent_ids = self._lent_ids()
        return any(x is not tensor and id(x) in lent_ids for x, tensor in zip(graph.inputs, tensors, strict=True))

    def _forget_unread(self) -> None:
        """Release lent buffers whose owner is gone and that no graph reads."""
        read = {id(x) for graph in self._graphs.values() for x in graph.inputs}
        self._lent = {
            key: lent
            for key, lent in self._lent.items()
            if lent.owner() is not None or any(id(x) in read for x in lent.buffers)
        }

    def _keep_within_bytes(self, newest: tuple[Any, ...]) -> None:
        """Drop the least recently used graphs until the others, including the newest, fit."""
        device = newest[1][0]
        limit_bytes = self.limit_bytes
        if limit_bytes is None:
            if device.type != "cuda":
                return
            limit_bytes = torch.cuda.get_device_properties(device).total_memory // SHARE
        total = sum(map(_buffer_bytes, self._graphs.values()))
        ended = []
        for key in sorted(self._graphs, key=lambda key: self._graphs[key].used):
            if total <= limit_bytes or key == newest:
                break
            total -= _buffer_bytes(self._graphs[key])
            ended.append(key)
            self._seen.pop(key, None)
        self._end(ended)

    def _replay(self, graph: _Graph, tensors: list[Tensor]) -> Any:
        for i, tensor in enumerate(tensors):
            # A clip's condition is the same in all steps: at full size 361 MB of keys and values are not copied again.
            # The objects are compared, since another tensor may have the same address by now.
            if graph.inputs[i] is tensor:  # lent
                continue
            held, version = graph.held[i], _version(tensor)
            if held is None or version is None or held[0]() is not tensor or held[1] != version[1]:
                graph.inputs[i].copy_(tensor)
                graph.held[i] = version
        graph.replay()
        graph.hits += 1
        self._hits += 1
        graph.used = self._hits
        leaves: list[Any] = []
        form = flatten(graph.outputs, leaves)
        copies = (x.clone() if isinstance(x, Tensor) else x for x in leaves)
        return rebuild(form, copies)

    def _release(self, names: Collection[str] | None = None) -> None:
        ended = [key for key in self._graphs if names is None or key[0] in names]
        self._resets += bool(ended)
        self._lent = {key: lent for key, lent in self._lent.items() if names is not None and key[0] not in names}
        self._end(ended)

    def _end(self, ended: list[tuple[Any, ...]]) -> None:
        for device in {place[0] for _, place, *_ in ended}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # a graph that still runs must not be freed
        for key in ended:
            del self._graphs[key]
        self._forget_unread()
        # A pool lives as long as one of its graphs; the next capture then needs a new one.
        places = {key[1] for key in self._graphs}
        self._pools = {place: pool for place, pool in self._pools.items() if place in places}

    # ---- without the lock -------------------------------------------------------------------------------------------

    def _eagerly(self, reason: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with self._lock:
            self._misses[reason] += 1
        try:
            return fn(*args)
        except torch.OutOfMemoryError:
            with self._lock:
                if not self._graphs:
                    raise
                self._misses["out of memory"] += 1
                self._release()
        return fn(*args)  # outside `except`, where the exception still holds what the first try allocated


def _unfit(tensors: list[Tensor]) -> str | None:
    """Why a call with these arguments cannot have a graph; None if it can."""
    if not tensors:
        return "no tensor"
    if len({x.device for x in tensors}) > 1:
        return "several devices"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "gradient"
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "inside another capture"
    return None


def _place(x: Tensor) -> Hashable:
    """Device and stream: two streams share no buffers, so neither has to wait for the other."""
    return (x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)


def _version(x: Tensor) -> tuple[weakref.ref[Tensor], int] | None:
    """The tensor and its version counter, which shows later writes; None for inference tensors, which have none."""
    return None if x.is_inference() else (weakref.ref(x), x._version)


def _buffer_bytes(graph: _Graph) -> int:
    """Bytes of the graph's inputs, including those it reads in place, and of its outputs."""
    leaves: list[Any] = []
    flatten(graph.outputs, leaves)
    return sum(_bytes(x) for x in (*graph.inputs, *leaves) if isinstance(x, Tensor))


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _text(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {'x'.join(map(str, x.shape)) or 'scalar'}"
