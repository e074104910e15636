"""The fast twins of a pipeline's two networks, built at first use and again whenever the weights behind them change."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..compile.compiled_blocks import Regions, adopt, connect
from ..compile.graphs import Graphs
from ..reference import ReducioDiT, ReducioVAE
from .plan import Plan, default_dtype
from .reducio.dit import FastReducioDiT
from .reducio.vae import FastReducioVAE

_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Twins:
    """`plan.choices` lists what runs each of their modules, and why."""

    transformer: FastReducioDiT
    vae: FastReducioVAE
    plan: Plan


class Engine:
    """Packs weights once: a second call finds the twins ready, a changed, moved or replaced weight makes new ones.

    `compile` None: on a GPU the twins run through graphs, which end with the weights that they read; nobody waits for a
    compiler. True: their blocks also run compiled, on any device, and code outlives weights. False: neither. Graphs
    that are given serve on any device. `store`: the folder that keeps code for the next process.
    `own_dtype`: nobody asked for a dtype, so the twins take `plan.default_dtype`, not that of the weights.
    """

    def __init__(self, compile: bool | None = None, graphs: Graphs | None = None, store: Path | None = None) -> None:
        self.compile = compile
        self.graphs, self._everywhere = graphs or Graphs(), graphs is not None
        self.regions = Regions(store=store) if compile else None
        self.attention = "auto"  # of `plan.ATTENTION`
        self.own_dtype = False
        self._twins: Twins | None = None
        self._made_from: tuple = ()

    def twins(self, transformer: ReducioDiT, vae: ReducioVAE, device: torch.device | None = None) -> Twins:
        """`device` is where they will run; None: where the weights are. Without the two being one, there are no graphs:
        a graph holds addresses, and weights that come to the device for a stage have another one each time."""
        weights = (self.own_dtype, device, self.attention, *_fingerprint(transformer), *_fingerprint(vae))
        if self._twins is None or weights != self._made_from:
            self.graphs.reset()
            self._twins = None  # the old packing goes before the new one comes
            weight = next(transformer.parameters())
            runs_on = weight.device if device is None else device
            dtype = default_dtype(runs_on, weight.dtype)[0] if self.own_dtype else weight.dtype
            plan = Plan(runs_on, dtype, attention=self.attention)
            fast_dit = FastReducioDiT(_in(dtype, transformer), plan).eval()
            twins = Twins(fast_dit, FastReducioVAE(_in(dtype, vae), plan).eval(), plan)
            if self.compile is not False and weight.device == runs_on and (runs_on.type == "cuda" or self._everywhere):
                twins.transformer.graphs = twins.vae.graphs = self.graphs
            connect(twins.transformer, self.regions)
            # On a CPU a decoder's time is oneDNN's convolutions. What a compiler makes of the rest of the default
            # model gains nothing (0.98 of uncompiled) and takes most of the compiling.
            connect(twins.vae, self.regions if runs_on.type == "cuda" else None)
            self._twins, self._made_from = twins, weights
        return self._twins

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Inside, what is seen for the first time is captured at once: whoever calls knows that it will come again."""
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
        engine.attention, engine.own_dtype = self.attention, self.own_dtype
        return engine

    def packed(self) -> list[nn.Module]:
        """The twins, where they have been built."""
        return [] if self._twins is None else [self._twins.transformer, self._twins.vae]

    def adopt(self, name: str, network: nn.Module) -> None:
        """The repeated blocks of a network that is not ours run compiled too, where the twins' do."""
        if self.regions is not None:
            adopt(self.regions, name, network)

    def describe(self) -> dict[str, Any]:
        """What runs the twins, as plain data: the plan's choices, what became of every graph, and what is compiled."""
        choices = [] if self._twins is None else [asdict(choice) for choice in self._twins.plan.choices]
        regions = None if self.regions is None else self.regions.describe()
        return {"plan": choices, "graphs": self.graphs.describe(), "regions": regions}


def _in(dtype: torch.dtype, network: _Network) -> _Network:
    """The network itself where it has the dtype, else a copy: the twin shares what it does not pack."""
    return network if next(network.parameters()).dtype == dtype else copy.deepcopy(network).to(dtype)


def _fingerprint(network: nn.Module) -> tuple:
    """Changes with every write to a weight (its version), and with every new one (its place in memory)."""
    weights = itertools.chain(network.parameters(), network.buffers())
    return tuple((x.data_ptr(), x._version, x.dtype, x.device) for x in weights)
