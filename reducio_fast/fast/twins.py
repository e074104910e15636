"""Which reference network has which fast twin: a family adds a row for each of its networks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..reference import ReducioDiT, ReducioVAE
from ..reference.reducio.image_vae import ImageVAE
from ..reference.reducio.pixart import PixArt
from ..reference.svd.unet import VideoUNet
from ..reference.svd.vae import FrameVAE, TemporalVAE
from ..system.devices import DTYPES
from .reducio.dit import FastReducioDiT
from .reducio.image_vae import FastImageVAE
from .reducio.pixart import FastPixArt
from .reducio.vae import FastReducioVAE
from .replaced_methods import replaced_methods
from .svd.unet import FastVideoUNet
from .svd.vae import FastFrameVAE, FastTemporalVAE

# A twin is built from (network, plan) and has: `graphs`, through which it runs; `graph_names`, under which it captures;
# `compiled_on_cpu`, whether compiling its blocks gains anything there.
TWINS: dict[type[nn.Module], Any] = {
    ReducioDiT: FastReducioDiT,
    ReducioVAE: FastReducioVAE,
    PixArt: FastPixArt,
    ImageVAE: FastImageVAE,
    VideoUNet: FastVideoUNet,
    TemporalVAE: FastTemporalVAE,
    FrameVAE: FastFrameVAE,
}

# What `nn.Module.__call__` runs beside `forward`.
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


def missing_twin(network: Any) -> str | None:
    """Why `network` cannot run as a twin; None if it can.

    A twin computes what the network's class and config say, from its weights. So the network must be of the exact class
    (a subclass may compute something else), with the modules that its config builds and no others, plain tensors as
    weights, and no hook or method that was set on a module.
    """
    if type(network) not in TWINS:
        return f"is a {type(network).__name__}, fast twins are built from {' and '.join(t.__name__ for t in TWINS)}"
    try:
        return difference(network, *_as_built(type(network), network.config))
    except Exception as error:  # attributes that were replaced may be anything
        return f"cannot be compared with what its config builds ({type(error).__name__}: {error})"


def difference(
    network: nn.Module, classes: dict[str, type], shapes: dict[str, torch.Size], replaced: str = ""
) -> str | None:
    """How `network` differs, beyond the values of its weights, from one with these module classes and weight shapes, by
    name; None if it does not. `replaced`: a method of the network that may have been replaced."""
    return next(_differences(network, classes, shapes, replaced), None)


def _differences(
    network: nn.Module, classes: dict[str, type], shapes: dict[str, torch.Size], replaced: str
) -> Iterator[str]:
    for hooks in GLOBAL_HOOKS:
        if getattr(torch_module, hooks):
            yield "runs under global module hooks"
    for path, module in network.named_modules():
        where = path or "the network"
        if path not in classes:
            yield f"has a module that its config does not build: {where}, a {type(module).__name__}"
        elif type(module) is not classes[path]:
            found, expected = _told_apart(type(module), classes[path])
            yield f"{where} is a {found} instead of a {expected}"
        elif any(getattr(module, hooks) for hooks in HOOKS):
            yield f"{where} has forward hooks"
        elif own := [name for name in replaced_methods(module) if path or name != replaced]:
            yield f"{where} has a {own[0]} of its own"
    weights = dict(network.named_parameters(remove_duplicate=False)) | dict(
        network.named_buffers(remove_duplicate=False)
    )
    if weights.keys() != shapes.keys():
        yield f"has other weights than its config builds: {', '.join(sorted(weights.keys() ^ shapes.keys())[:3])}"
    for name, weight in weights.items():
        if type(weight) not in (nn.Parameter, Tensor) or type(weight.data) is not Tensor:
            yield f"{name} is a {type(weight).__name__}, no plain tensor"
        elif weight.shape != shapes[name]:
            yield f"{name} is of shape {list(weight.shape)} instead of {list(shapes[name])}"
        elif weight.layout != torch.strided:
            yield f"{name} is stored as {str(weight.layout).removeprefix('torch.')}"
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in weights.values() if w.is_floating_point()})
    if len(dtypes) != 1 or any(w.dtype not in DTYPES.values() for w in network.parameters()):
        yield f"has weights of {' and '.join(dtypes)}"


def _told_apart(found: type, expected: type) -> tuple[str, str]:
    """Their names; with their modules if the names alone are equal, as of the LoRA layers of peft."""
    if found.__name__ != expected.__name__:
        return found.__name__, expected.__name__
    return f"{found.__module__}.{found.__qualname__}", f"{expected.__module__}.{expected.__qualname__}"


@functools.lru_cache(maxsize=8)
def _as_built(network_class: Any, config: Any) -> tuple[dict[str, type], dict[str, torch.Size]]:
    """`parts_of` the network that the config builds."""
    with torch.device("meta"):
        return parts_of(network_class(config))


def parts_of(network: nn.Module) -> tuple[dict[str, type], dict[str, torch.Size]]:
    """The class of each module and the shape of each weight, by name."""
    weights = (*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False))
    return {p: type(m) for p, m in network.named_modules()}, {n: w.shape for n, w in weights}
