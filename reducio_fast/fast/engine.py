"""The fast twins of a pipeline's networks: each is built at first use, and again when the weights behind it change."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..compile import cache
from ..compile.compiled_blocks import Regions, adopt, connect
from ..compile.graphs import Graphs
from ..reference.data_prediction import DataHook
from ..reference.sampler import NO_SHORTCUTS, Callback, Shortcuts
from ..system import cache_folder
from ..system.checksum import checksums
from ..triton_kernels.launch import descriptor_memory
from ..triton_kernels.registry import OPS
from ..triton_kernels.tables import add_tables, arch_of, table
from . import sampler
from .plan import Plan, check_attention, default_dtype
from .quantisation import Quantisation
from .twins import TWINS

_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A twin, and the weights it was made from: where they were, and the checksum of each."""

    places: tuple[Any, ...]
    contents: tuple[int, ...]
    twin: Any


class Engine:
    """Packs the weights of each network once: a second call returns the same twin. Changed, moved or replaced weights
    rebuild the twin of that network alone, and end the graphs that read the old ones. Changes are found by checksums of
    the weights (`system.checksum`), at every request for a twin, or once within `one_look`.

    `compile` None: on a GPU the twins run through graphs, and nothing waits for a compiler. True: their blocks also run
    compiled, on any device, and code outlives weights. False: neither. Graphs that are passed in serve on any device.
    `store`: the folder that keeps code for the next process. `free_dtype`: no dtype was asked for, so a twin takes
    `plan.default_dtype`, not that of its weights.
    """

    name = "fast"

    def __init__(self, compile: bool | None = None, graphs: Graphs | None = None, store: Path | None = None) -> None:
        self.compile = compile
        self.graphs, self._everywhere = graphs or Graphs(), graphs is not None
        self.regions = Regions(store=store, kernels=_kernels) if compile else None
        self.attention = "auto"  # a key of `plan.ATTENTION`
        self.free_dtype = False
        self.ranks: Any = None  # of `fast.parallel`: processes that make each clip together
        self.quantisation: Quantisation | None = None
        self._twins: dict[type[nn.Module], _Packed] = {}  # by class of network
        self._looks = threading.local()  # `.seen`: classes whose contents were compared in this thread's `one_look`

    @property
    def compiles(self) -> bool:
        return self.regions is not None

    def twin(self, network: nn.Module, device: torch.device | None = None) -> Any:
        """The fast twin of `network`, with its plan as `plan`. Raises KeyError if its class has no twin.

        `device`: where it will run; None: where the weights are. If the two differ, there are no graphs: a graph holds
        addresses, and weights that are moved to the device for a stage have another one each time.
        """
        if (device or next(network.parameters()).device).type == "cuda":
            descriptor_memory()  # in this thread, which is about to run the twin
        network_class, seen = type(network), getattr(self._looks, "seen", None)
        seen = set() if seen is None else seen  # outside of `one_look` each request compares
        quantisation = self.quantisation
        if quantisation is not None and not quantisation.serves(network):
            quantisation = None
        places = (self.free_dtype, device, self.attention, quantisation, *_places(network))
        packed = self._twins.get(network_class)
        if packed is not None and packed.places != places:
            packed = None
        if packed is not None and network_class in seen:
            return packed.twin
        contents = checksums(_weights(network))
        seen.add(network_class)
        if packed is not None and packed.contents == contents:
            return packed.twin
        self.graphs.reset(TWINS[network_class].graph_names)
        del packed  # with its entry, so that the old packing is freed before the new one is made
        self._twins.pop(network_class, None)
        weight = next(network.parameters())
        runs_on = weight.device if device is None else device
        dtype = default_dtype(runs_on, weight.dtype, network)[0] if self.free_dtype else weight.dtype
        add_tuned_tables(runs_on)
        plan = Plan(runs_on, dtype, attention=self.attention, quantisation=quantisation)
        twin = self._build(network, plan, dtype)
        if self.compile is not False and weight.device == runs_on and (runs_on.type == "cuda" or self._everywhere):
            twin.graphs = self.graphs
        if self.ranks is not None and hasattr(twin, "ranks"):
            twin.ranks = self.ranks
        connect(twin, self.regions if runs_on.type == "cuda" or twin.compiled_on_cpu else None)
        self._twins[network_class] = _Packed(places, contents, twin)
        return twin

    def divide(self, ranks: Any) -> None:
        """From now on, twins that support it make each clip together with the processes of `ranks`."""
        self.ranks = ranks
        self.forget()

    def forget(self, kept: Collection[type[nn.Module]] = (), device: torch.device | None = None) -> None:
        """Release the twins and graphs of all networks, except for those of the classes `kept`. `device`: where the
        next twins will run, if that may have changed; compiled code is then kept in the folder of that device."""
        for network_class in [c for c in self._twins if c not in kept]:
            self.graphs.reset(TWINS[network_class].graph_names)
            self._twins.pop(network_class, None)
        if device is not None and self.regions is not None and self.regions.store is not None:
            self.regions.store = code_folder(device)

    @contextmanager
    def one_look(self) -> Iterator[None]:
        """Inside, in this thread, the contents of each network are compared only at the first request for its twin: the
        weights are read once per clip, not once per stage."""
        before, self._looks.seen = getattr(self._looks, "seen", None), set()
        try:
            yield
        finally:
            self._looks.seen = before

    @staticmethod
    def _build(network: nn.Module, plan: Plan, dtype: torch.dtype) -> Any:
        twin = TWINS[type(network)](_in_dtype(dtype, network), plan).eval()
        twin.plan = plan
        return twin

    def sample(
        self,
        denoise: sampler.Denoiser,
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
        """See `fast.sampler.sample`."""
        arguments = (denoise, scheduler, latent, num_inference_steps, callback, generator)
        return sampler.sample(*arguments, sigmas, timesteps, shortcuts, data_hook)

    def chosen_dtype(self, device: torch.device, network: nn.Module) -> tuple[torch.dtype, str]:
        """The dtype in which the network's twin runs on `device`, and why."""
        stored = next(network.parameters()).dtype
        return default_dtype(device, stored, network) if self.free_dtype else (stored, "asked for")

    def set_attention(self, word: str, device: torch.device, dtype: torch.dtype) -> None:
        """Sets the attention backend. Raises ValueError, one line, for a name that is unknown or not supported."""
        check_attention(word, device, dtype)
        self.attention = word

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Inside, a new key is captured at its first call: the caller knows that the key will be used again."""
        sightings, self.graphs.sightings = self.graphs.sightings, 0
        try:
            yield
        finally:
            self.graphs.sightings = sightings

    def uncompiled(self) -> Engine:
        """An engine for the same networks that shares nothing with this one. Neither compiles anything from now on."""
        if self.regions is not None:
            self.regions.open = False
        engine = Engine(compile=False)
        engine.attention, engine.free_dtype = self.attention, self.free_dtype
        engine.quantisation = self.quantisation
        return engine

    def without_weights(
        self, opaque: Callable[[Callable[..., Any]], Callable[..., Any]], device: torch.device
    ) -> Engine:
        """An engine for copies of the networks on the meta device, planned as for `device`: see `memory.dry_run`.

        `opaque(function)` returns the function as one kernel.
        """
        return _DryEngine(opaque, device)

    def packed(self) -> list[nn.Module]:
        """The twins that have been built."""
        return [packed.twin for packed in self._twins.values()]

    def adopt(self, name: str, network: nn.Module) -> None:
        """Run the repeated blocks of a foreign network compiled too, if the twins' blocks are."""
        if self.regions is not None:
            adopt(self.regions, name, network)

    def describe(self) -> dict[str, Any]:
        """How the twins run, as plain data: the plans' choices, the state of every graph, and what is compiled."""
        choices = [asdict(choice) for twin in self.packed() for choice in twin.plan.choices]  # type: ignore[union-attr]
        regions = None if self.regions is None else self.regions.describe()
        return {"plan": choices, "graphs": self.graphs.describe(), "regions": regions}


class _DryEngine(Engine):
    """Twins of networks without weights. Each is kept for as long as its network."""

    def __init__(self, opaque: Callable[[Callable[..., Any]], Callable[..., Any]], device: torch.device) -> None:
        super().__init__(compile=False)
        self._opaque, self._device = opaque, device

    def twin(self, network: nn.Module, device: torch.device | None = None) -> Any:
        network_class = type(network)
        if network_class not in self._twins:
            dtype = next(network.parameters()).dtype
            plan = Plan(torch.device("cpu"), dtype)
            if self._device.type != "cpu":
                plan = _KernelPlan(torch.device("cpu"), dtype)
                plan.opaque = self._opaque
            self._twins[network_class] = _Packed((), (), self._build(network, plan, dtype))
        return self._twins[network_class].twin


class _KernelPlan(Plan):
    """Every op is one kernel. A vendor's library in its place allocates no more memory."""

    opaque: Callable[[Callable[..., Any]], Callable[..., Any]]

    def pick(self, path: str, op: str, shape: str = "") -> Callable[..., Any]:
        return self.opaque(OPS[op].twin)

    def clip_statistics(self) -> Callable[[Tensor], Tensor]:
        return self.opaque(super().clip_statistics())

    def runs_kernel(self, op: str, shape: str) -> bool:
        return True

    def library_pads(self, op: str, shape: str) -> bool:
        return False


def add_tuned_tables(device: torch.device) -> None:
    """Use the launch settings that `bench --tune` measured on this machine for `device`: call it before planning."""
    add_tables(cache.folder("tables", cache.Origin.here(arch_of(device)), cache_folder.root()))


def code_folder(device: torch.device) -> Path:
    """The folder of code that was compiled on this machine for `device`, for `Engine`."""
    origin, root = cache.Origin.here(arch_of(device)), cache_folder.root()
    if cache_folder.is_for_compilers():
        cache.use(origin, root)
    return cache.folder("regions", origin, root)


def _in_dtype(dtype: torch.dtype, network: _Network) -> _Network:
    """The network itself if it has the dtype, else a copy: the twin shares the weights that it does not pack."""
    return network if next(network.parameters()).dtype == dtype else copy.deepcopy(network).to(dtype)


def _kernels(device: torch.device) -> Hashable:
    """What compiled code takes from our kernels: their source, by a function of their folder, and launch settings."""
    return table, json.dumps(table(arch_of(device)), sort_keys=True)


def _weights(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _places(network: nn.Module) -> tuple[Any, ...]:
    """The address of each weight and torch's count of writes to it. Comparing these finds most changes, but no change
    of contents alone."""
    # Tensors that were made in inference mode count no writes.
    return tuple((x.data_ptr(), x.is_inference() or x._version, x.dtype, x.device) for x in _weights(network))
