"""What runs a model's networks: the implementation of each, the device it runs on, the clock that times its stage."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints import calibration_file
from ...media import aspect_buckets
from ...memory.dry_run import DryRun, weight_bytes
from ...memory.offload import Offload
from ...reference.data_prediction import DataHook
from ...reference.sampler import NO_SHORTCUTS, Callback, Shortcuts
from ...system import devices
from ...system.errors import ReducioError, first_line, is_out_of_memory
from ...system.stage_clock import annotate, clock
from ..call import validation
from .components import Components
from .plain_engine import PlainEngine
from .schedules import unfollowed_by_twins

LOG = logging.getLogger("reducio_fast")


_executors: weakref.WeakSet[Executor] = weakref.WeakSet()
_working: set[Executor] = set()


def clips_in_progress() -> bool:
    """Whether a thread of this process makes a clip."""
    return bool(_working)


def _renew_locks() -> None:
    _working.clear()
    for executor in _executors:
        executor.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class Executor:
    """Runs the networks of `components`.

    `engine` gives the implementation of each: `fast.engine.Engine`, or `PlainEngine` for the reference. Every call
    checks again what keeps a network from running as its twin, since users change schedulers, hooks, adapters and
    modules at any time. With backend "auto" such a network runs as it is, and `report` says why. Raises ReducioError
    where backend "fast" cannot run the model, and for values of `backend` and `compile` that do not exist or cannot be
    combined.
    """

    def __init__(
        self, components: Components, backend: str = "auto", compile: bool | None = None, engine: Any = None
    ) -> None:
        self.components, self.asked = components, backend
        chosen, self._reason = validation.resolve_backend(backend)
        validation.check_compile(compile, chosen, self._reason)
        # Networks, scheduler and twins are shared between calls: a second thread waits for the clips of the first.
        self.lock = threading.RLock()
        _executors.add(self)
        self.warned_sizes: set[tuple[int, int]] = set()
        self.offload: Offload | None = None
        self.ranks: Any = None  # of `fast.parallel`: processes that make each clip together
        self._placed: dict[int, Any] = {}  # id of a network -> its implementation, while offloading has moved weights
        self.adoptions: dict[str, Any] = {}  # of `FirstStage`: component -> diffusers' network and ours
        self._plain = PlainEngine()
        self.engine: Any = self._plain if engine is None else engine
        self._obstacles: dict[str, str] = {}  # component -> why it runs as it is, in the running call
        self._unfollowed: str | None = None  # why the reference's sampler steps the scheduler
        if engine is None and chosen == "fast":
            from ...fast.engine import Engine, code_folder

            self.engine = Engine(compile, store=code_folder(self.device))
            self.check()

    def renew_lock(self) -> None:
        """Renew the lock in a forked child process, which lacks the parent's thread that may hold it."""
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what was chosen. Locks, twins and graphs belong to this process and these weights."""
        engine = self.engine
        return {
            "components": self.components,
            "backend": self.asked,
            "compile": getattr(engine, "compile", None),
            "attention": engine.attention,
            "free_dtype": engine.free_dtype,
            "quantisation": engine.quantisation,
            "offload": self.offload,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Executor.__init__(self, state["components"], state["backend"], state["compile"])
        self.engine.attention, self.offload = state["attention"], state["offload"]
        self.choose_dtype(state["free_dtype"])
        if state["quantisation"] is not None and self.engine.name == "fast":
            self.engine.quantisation = state["quantisation"]

    def look(self) -> None:
        """Find out which networks can run as their twins, as they are now."""
        if self.engine.name != "fast":
            return
        from ...fast.twins import missing_twin

        missing = {name: missing_twin(self.components[name]) for name in self._twinned}
        obstacles = {name: f"{name} {reason}" for name, reason in missing.items() if reason is not None}
        has_scheduler = "scheduler" in self.components.layout.names
        unfollowed = unfollowed_by_twins(self.components.scheduler, 2) if has_scheduler else None
        if unfollowed is not None and unfollowed != self._unfollowed:
            LOG.info("the reference's sampler steps: %s", unfollowed)
        self._unfollowed = unfollowed
        for name, reason in obstacles.items():
            if self._obstacles.get(name) != reason:
                LOG.info("%s runs on the reference: %s", name, reason)
        self._obstacles = obstacles

    def check(self) -> None:
        """Raise ReducioError where backend "fast" was asked for and a network cannot run as its twin."""
        self.refresh()
        if self.asked == "fast" and self._obstacles:
            raise ReducioError(f"backend: 'fast' cannot run this model: {next(iter(self._obstacles.values()))}")

    @property
    def _twinned(self) -> tuple[str, ...]:
        layout = self.components.layout
        return tuple(dict.fromkeys((layout.denoiser, layout.decoder)))

    def backend_of(self, name: str) -> str:
        """What runs the component `name`: "fast" or "reference"."""
        return "reference" if name in self._obstacles else self.engine.name

    @property
    def backend(self) -> str:
        """What runs the model: "fast" where every network that has a twin runs as it, else "reference"."""
        self.refresh()
        return "reference" if self._obstacles else self.engine.name

    @property
    def report(self) -> dict[str, str]:
        """For the denoiser and the decoder, what runs it and why."""
        self.refresh()
        return {name: self._line(name) for name in self._twinned}

    def refresh(self) -> None:
        """`look`, except during a call, which continues as it began."""
        if self not in _working:
            self.look()

    def reason_without_cache(self) -> str | None:
        """Why a step computes all blocks, or None: the block cache is part of the fast twin and its sampler."""
        self.refresh()
        name = self.components.layout.denoiser
        if self.backend_of(name) != "fast":
            return self._line(name)
        if self.ranks is not None:
            return "several processes make the clip, which would have to agree on each step's cache"
        return None if self._unfollowed is None else f"scheduler: {self._unfollowed}"

    def _line(self, name: str) -> str:
        if self.engine.name != "fast":
            return f"reference: {self._reason}"
        if name in self._obstacles:
            return f"reference: {self._obstacles[name]}"
        dtype, why = self.engine.chosen_dtype(self.device, self.components[name])
        line = f"fast: {self._reason}; in {str(dtype).removeprefix('torch.')}: {why}"
        if name == self.components.layout.denoiser and self._unfollowed is not None:
            line += f"; the reference's sampler steps: {self._unfollowed}"
        if name == self.components.layout.decoder and self.engine.quantisation is not None:
            line += f"; {self.engine.quantisation.described(self.components[name], self.device)}"
        return line

    # ---- device and dtype ----

    @property
    def device(self) -> torch.device:
        """Where the stages run; `components.device` is where the weights are between them."""
        return self.components.device if self.offload is None else self.offload.device

    def choose_dtype(self, free: bool) -> None:
        """Set whether twins may take the dtype that suits this machine; networks without a twin keep their own."""
        if self.engine.name == "fast":
            self.engine.free_dtype = free

    def quantise(self, word: str, largest: Mapping[str, Tensor], folder: Path) -> None:
        """The decoder's twin computes in 8-bit numbers from now on: see `fast.quantisation`. Raises ReducioError for
        ranges, read from `folder`, that do not fit the decoder."""
        from ...fast.quantisation import Quantisation, quantisable

        vae = self.components[self.components.layout.decoder]
        calibration_file.check(folder, largest, {path: conv.in_channels for path, conv in quantisable(vae)})
        self.engine.quantisation = Quantisation(word, largest)

    def move(self, device: Any, dtype: Any) -> None:
        """Move and cast every network in place: see `VideoPipeline.to`."""
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise ReducioError(f"to: two dtypes given, {device} and {dtype}")
            device, dtype = None, device
        if self.offload is not None and device is not None:
            raise ReducioError(
                f"to: device={device!r} given while weights are offloaded; call disable_model_cpu_offload() before"
            )
        target = self.components.device if device is None else devices.resolve_device(device)
        resolved = self.components.dtype if dtype is None else devices.resolve_dtype(dtype, None, target)
        if self.engine.quantisation is not None:
            validation.check_quantise(self.engine.quantisation.word, self.asked, target)
        with self.lock:
            before = self.components.device, self.components.dtype
            self.components.cast(target, resolved)
            if before != (self.components.device, self.components.dtype):
                self._forget()
            self.choose_dtype(dtype is None and self.engine.free_dtype)

    def start_offload(self, gpu_id: int | None, device: Any) -> None:
        """Move all weights to the CPU, and to `device` only while their stage runs."""
        if device is None and not torch.cuda.is_available():
            raise ReducioError("enable_model_cpu_offload: there is no GPU here, all weights are on the CPU already")
        chosen = devices.resolve_device((f"cuda:{gpu_id or 0}") if device is None else device)
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", gpu_id if gpu_id is not None else torch.cuda.current_device())
        with self.lock:
            self.offload = Offload(chosen)
            for network in self.components.networks():
                network.to("cpu")
            self._forget()

    def end_offload(self) -> None:
        """Move all weights to the device where the stages ran."""
        with self.lock:
            if self.offload is not None:
                device, self.offload = self.offload.device, None
                self.move(device, None)

    def unload(self, *names: str) -> None:
        """Remove optional components and what was made of them: see `VideoPipeline.unload`."""
        with self.lock:  # not during a clip that another thread is making
            self.components.unload(*names)
            self._forget([type(self.components[name]) for name in self._twinned])

    def _forget(self, kept: Sequence[type[nn.Module]] = ()) -> None:
        """Free the memory of twins and graphs, except for those of networks of the classes `kept`."""
        self.engine.forget(kept, self.device)
        self.adoptions.clear()
        devices.free_unused()

    # ---- what runs ----

    def twin(self, network: nn.Module) -> Any:
        """The twin of a network of the first stage."""
        if (placed := self._placed.get(id(network))) is not None:
            return placed
        return self.engine.twin(network, None if self.offload is None else self.offload.device)

    def network(self, name: str) -> Any:
        """The implementation of the component `name`: its fast twin, or the reference itself."""
        network = self.components[name]
        if (placed := self._placed.get(id(network))) is not None:
            return placed
        if name in self._obstacles:
            return network
        try:
            return self.engine.twin(network, self.device)
        except Exception as error:  # packing failed in a way that `missing_twin` does not predict
            if is_out_of_memory(error) or self.asked == "fast" or self.engine.name != "fast":
                raise
            reason = f"{name} could not be packed ({type(error).__name__}: {first_line(error)})"
            LOG.warning("%s; it runs on the reference", reason)
            self._obstacles[name] = reason
            return network

    def sample(
        self,
        denoise: Any,
        scheduler: Any,
        latent: Tensor,
        num_inference_steps: int,
        callback: Callback | None,
        generator: torch.Generator,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[int] | None = None,
        shortcuts: Shortcuts = NO_SHORTCUTS,
        data_hook: DataHook | None = None,
    ) -> Tensor:
        """Sample as `reference.sample` does: with the fast sampler if a twin denoises and that sampler can follow the
        scheduler, else with the reference's, which follows any. Raises ValueError as they do."""
        engine = self.engine
        if not hasattr(denoise, "plain"):
            engine = self._plain
        elif (why := unfollowed_by_twins(scheduler, num_inference_steps, sigmas, timesteps)) is not None:
            if shortcuts.cache_threshold:
                raise ValueError(f"cache_threshold={shortcuts.cache_threshold} needs the fast sampler: {why}")
            engine, denoise = self._plain, denoise.plain()
        given = (denoise, scheduler, latent, num_inference_steps, callback, generator)
        return engine.sample(*given, sigmas, timesteps, shortcuts, data_hook)

    def networks_of(self, stage: str) -> list[nn.Module]:
        """What has to be on the device while a stage runs, packed weights of twins included."""
        networks = self.components.of_stage(stage)
        twinned = [n for n in self._twinned if n in self.components.layout.of_stage(stage)]
        twins = [*map(self.network, twinned), *(self.twin(n) for n in self._drawing(stage))]
        return networks + [twin for twin in twins if not any(twin is network for network in networks)]

    def _drawing(self, stage: str) -> list[nn.Module]:
        """The stage's networks of a `first_stage.Parts`: under offloading, no other first stage runs as twins."""
        if stage != "content.generate" or self.offload is None or self.engine.name != "fast":
            return []
        from ...fast.twins import missing_twin

        return [n for n in self.components.of_stage(stage) if missing_twin(n) is None]

    def resident_bytes(self) -> int:
        """Bytes of all weights that are on the device now and that a forecast counts as well."""
        if self.components.device != self.device:
            return 0
        return weight_bytes(*self.components.networks(), *self.engine.packed())

    def describe(self) -> dict[str, Any]:
        """See `VideoPipeline.describe`."""
        processes = {} if self.ranks is None else {"processes": self.ranks.size}
        return {"backend": self.backend} | processes | self.engine.describe()

    def warn_of_compiling(self, height: int, width: int, usual: bool) -> None:
        """Warn once per size that is not `usual` and not an aspect bucket: it is compiled for this size alone."""
        usual = usual or aspect_buckets.is_bucket(height, width)
        if self.engine.compiles and not usual and (height, width) not in self.warned_sizes:
            self.warned_sizes.add((height, width))
            LOG.warning("compile: %dx%d is in no bucket, its blocks are compiled for this size alone", height, width)

    # ---- while it runs ----

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """One call at a time; calls of other threads wait. Raises ReducioError for a call from within a call."""
        with self.lock:
            if self in _working:
                raise ReducioError("callback_on_step_end: called the pipeline that called it, which is not done yet")
            self.check()
            _working.add(self)
            try:
                with self.engine.one_look():
                    yield
            finally:
                _working.discard(self)

    @contextmanager
    def stage(self, timings: dict[str, float], name: str) -> Iterator[None]:
        """A context with the stage's weights on the device; adds its seconds to `timings`, marks a profiler range."""
        start = self.clock()
        with annotate(name):
            with self.placed(name):
                yield
            end = self.clock()
        timings[name] = timings.get(name, 0.0) + end - start

    @contextmanager
    def placed(self, stage: str) -> Iterator[None]:
        """A context in which, under offloading, the stage's networks are on the device; afterwards on the CPU again."""
        if self.offload is None:
            yield
            return
        networks = self.networks_of(stage)
        # The engine recognises weights by address, so twins are looked up before the weights move.
        twins = {id(self.components[n]): self.network(n) for n in self._twinned}
        twins |= {id(n): self.twin(n) for n in self._drawing(stage)}
        try:
            with self.offload.placed(*networks):
                self._placed = twins
                yield
        finally:
            self._placed = {}

    def clock(self) -> float:
        """The time in seconds, read when the device has finished all launched work."""
        return clock(self.device)

    # ---- copies ----

    def for_thread(self, components: Components) -> Executor:
        """An executor of the same engine for another thread, with a lock of its own."""
        other = Executor(components, engine=self.engine)
        other.asked, other._reason = self.asked, self._reason
        return other

    def without_weights(self, components: Components, dry: DryRun) -> Executor:
        """An executor for `components` on the meta device, planned for the device of this one."""
        other = Executor(components, engine=self.engine.without_weights(dry.opaque, self.device))
        other._obstacles, other._unfollowed = dict(self._obstacles), self._unfollowed
        return other
