"""The fast twins of a pipeline's two networks, built at first use and again whenever the weights behind them change."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..reference import ReducioDiT, ReducioVAE
from .dit import FastReducioDiT
from .plan import Plan
from .vae import FastReducioVAE


@dataclass(frozen=True, slots=True)
class Twins:
    """`plan.choices` lists what runs each of their modules, and why."""

    transformer: FastReducioDiT
    vae: FastReducioVAE
    plan: Plan


class Engine:
    """Packs weights once: a second call finds the twins ready, a changed, moved or replaced weight makes new ones."""

    def __init__(self) -> None:
        self._twins: Twins | None = None
        self._made_from: tuple = ()

    def twins(self, transformer: ReducioDiT, vae: ReducioVAE) -> Twins:
        weights = _fingerprint(transformer) + _fingerprint(vae)
        if self._twins is None or weights != self._made_from:
            self._twins = None  # the old packing goes before the new one comes
            weight = next(transformer.parameters())
            plan = Plan(weight.device, weight.dtype)
            fast_dit = FastReducioDiT(transformer, plan).eval()
            self._twins = Twins(fast_dit, FastReducioVAE(vae, plan).eval(), plan)
            self._made_from = weights
        return self._twins


def _fingerprint(network: nn.Module) -> tuple:
    """Changes with every write to a weight (its version), and with every new one (its place in memory)."""
    return tuple((x.data_ptr(), x._version, x.dtype, x.device) for x in network.state_dict(keep_vars=True).values())
