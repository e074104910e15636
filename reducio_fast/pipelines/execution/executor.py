"""What runs a model's networks: the implementation of each, the device it runs on, the clock that times its stage."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...media import aspect_buckets
from ...memory.dry_run import DryRun, weight_bytes
from ...memory.offload import Offload
from ...system import cache_folder, devices
from ...system.errors import ReducioError
from ...system.stage_clock import annotate, clock
from ..call import validation
from .components import Components
from .plain_engine import PlainEngine

LOG = logging.getLogger("reducio_fast")


class Executor:
    """Runs the networks of `components`.

    `engine` gives the implementation of each: `fast.engine.Engine`, or `PlainEngine` for the reference. `report` says,
    for the denoiser and the decoder, what runs it and why. Raises ReducioError where backend "fast" cannot run the
    model, and for values of `backend` and `compile` that do not exist or do not go together.
    """

    def __init__(
        self, components: Components, backend: str = "auto", compile: bool | None = None, engine: Any = None
    ) -> None:
        self.components = components
        self.backend, self._reason = validation.resolve_backend(backend)
        validation.check_compile(compile, self.backend, self._reason)
        # Networks, scheduler and twins are shared between calls: a second thread waits for the clips of the first.
        self.lock = threading.RLock()
        self._at_work = False
        self.warned_sizes: set[tuple[int, int]] = set()
        self.offload: Offload | None = None
        self._placed: dict[int, Any] = {}  # id of a network -> its implementation, while offloading has moved weights
        self.engine: Any = engine
        obstacle = None
        if engine is None:
            self.engine = PlainEngine()
            if self.backend == "fast":
                obstacle = self._start_fast_engine(compile)
        if obstacle is not None:
            if backend == "fast":
                raise ReducioError(f"backend: 'fast' cannot run this model: {obstacle}")
            self.backend, self._reason = "reference", obstacle
        layout = components.layout
        self.report = dict.fromkeys((layout.denoiser, layout.decoder), f"{self.backend}: {self._reason}")

    def _start_fast_engine(self, compile: bool | None) -> str | None:
        """Install the engine of the fast path, or say why it cannot run this model."""
        from ...compile import cache
        from ...fast.engine import Engine
        from ...fast.solver_tables import coefficients
        from ...fast.twins import missing_twin
        from ...triton_kernels.tables import add_tables, arch_of

        layout = self.components.layout
        for name in (layout.denoiser, layout.decoder):
            if (reason := missing_twin(self.components[name])) is not None:
                return f"{name} {reason}"
        try:
            coefficients(self.components["scheduler"], 2)
        except ValueError as error:
            return f"scheduler: {error}"
        origin = cache.Origin.here(arch_of(self.components.device))
        root = cache_folder.root()
        cache.use(origin, root)
        add_tables(cache.folder("tables", origin, root))
        self.engine = Engine(compile, store=cache.folder("regions", origin, root))
        return None

    # ---- where and in what ----

    @property
    def device(self) -> torch.device:
        """Where the stages run; `components.device` is where the weights are between them."""
        return self.components.device if self.offload is None else self.offload.device

    def choose_dtype(self, free: bool) -> None:
        """Whether twins may take the dtype that suits this machine; networks without a twin keep their own."""
        if self.engine.name != "fast":
            return
        self.engine.free_dtype = free
        dtype, why = self.engine.chosen_dtype(self.device, self.components.dtype)
        line = f"fast: {self._reason}; in {str(dtype).removeprefix('torch.')}: {why}"
        self.report = dict.fromkeys(self.report, line)

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
        with self.lock:
            self.components.cast(target, resolved)
            self.choose_dtype(dtype is None and self.engine.free_dtype)

    def start_offload(self, gpu_id: int | None, device: Any) -> None:
        """Weights go to the CPU, and to `device` while their stage runs."""
        if device is None and not torch.cuda.is_available():
            raise ReducioError("enable_model_cpu_offload: there is no GPU here, all weights are on the CPU already")
        chosen = devices.resolve_device((f"cuda:{gpu_id or 0}") if device is None else device)
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", gpu_id if gpu_id is not None else torch.cuda.current_device())
        with self.lock:
            for network in self.components.networks():
                network.to("cpu")
            self.offload = Offload(chosen)

    def end_offload(self) -> None:
        """All weights go to the device where the stages ran."""
        with self.lock:
            if self.offload is not None:
                device, self.offload = self.offload.device, None
                self.move(device, None)

    # ---- what runs ----

    def network(self, name: str) -> Any:
        """The implementation of the component `name`: its fast twin, or the reference itself."""
        network = self.components[name]
        return self._placed.get(id(network)) or self.engine.twin(network, self.device)

    def networks_of(self, stage: str) -> list[nn.Module]:
        """What has to be on the device while a stage runs, packed weights of twins included."""
        networks = self.components.of_stage(stage)
        layout = self.components.layout
        twinned = [n for n in (layout.denoiser, layout.decoder) if n in layout.of_stage(stage)]
        twins = [self.network(name) for name in twinned]
        return networks + [twin for twin in twins if not any(twin is network for network in networks)]

    def resident_bytes(self) -> int:
        """Of all weights that are on the device now and that a forecast counts as well."""
        if self.components.device != self.device:
            return 0
        return weight_bytes(*self.components.networks(), *self.engine.packed())

    def describe(self) -> dict[str, Any]:
        """See `VideoPipeline.describe`."""
        return {"backend": self.backend} | self.engine.describe()

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
            if self._at_work:
                raise ReducioError("callback_on_step_end: called the pipeline that called it, which is not done yet")
            self._at_work = True
            try:
                yield
            finally:
                self._at_work = False

    @contextmanager
    def stage(self, timings: dict[str, float], name: str) -> Iterator[None]:
        """The stage's weights are on the device inside; its seconds are added to `timings`, its range is marked."""
        start = self.clock()
        with annotate(name):
            with self.placed(name):
                yield
            end = self.clock()
        timings[name] = timings.get(name, 0.0) + end - start

    @contextmanager
    def placed(self, stage: str) -> Iterator[None]:
        """Under offloading, the stage's networks are on the device inside, and on the CPU again afterwards."""
        if self.offload is None:
            yield
            return
        networks = self.networks_of(stage)
        layout = self.components.layout
        # The engine recognises weights by address, so twins are looked up before the weights move.
        twins = {id(self.components[n]): self.network(n) for n in (layout.denoiser, layout.decoder)}
        try:
            with self.offload.placed(*networks):
                self._placed = twins
                yield
        finally:
            self._placed = {}

    def clock(self) -> float:
        """Seconds, once the device has done what was launched."""
        return clock(self.device)

    # ---- copies ----

    def for_thread(self, components: Components) -> Executor:
        """An executor of the same engine for another thread, with a lock of its own."""
        other = Executor(components, engine=self.engine)
        other.backend, other._reason, other.report = self.backend, self._reason, self.report
        return other

    def without_weights(self, components: Components, dry: DryRun) -> Executor:
        """An executor for `components` on the meta device, planned for the device of this one."""
        other = Executor(components, engine=self.engine.without_weights(dry.opaque, self.device))
        other.backend = self.backend
        return other
