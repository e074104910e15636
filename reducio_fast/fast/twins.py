"""Which reference network has which fast twin: a family adds a row for each of its networks."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..reference import ReducioDiT, ReducioVAE
from .reducio.dit import FastReducioDiT
from .reducio.vae import FastReducioVAE

# A twin is built from (network, plan) and has: `graphs`, through which it runs; `graph_names`, under which it captures;
# `compiled_on_cpu`, whether compiling its blocks gains anything there.
TWINS: dict[type[nn.Module], Any] = {ReducioDiT: FastReducioDiT, ReducioVAE: FastReducioVAE}


def missing_twin(network: Any) -> str | None:
    """Why `network` has no twin, None where it has one. A subclass has none: it may compute something else."""
    if type(network) in TWINS:
        return None
    return f"is a {type(network).__name__}, fast twins are built from {' and '.join(t.__name__ for t in TWINS)}"
