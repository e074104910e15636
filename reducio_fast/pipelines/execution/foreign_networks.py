"""Our networks on the parameters of diffusers' own, so that they have fast twins while users keep what they loaded."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from ...fast.twins import difference, parts_of
from ...system.errors import ReducioError

# What computes attention as the networks' definition says: a twin may do it in their place.
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")


def adopt(theirs: nn.Module, network_class: Any, config_class: Any, name: str, as_parameters: bool = False) -> Any:
    """`network_class` on the very tensors of `theirs`, or on its very parameters, which then also move together."""
    stated = json.loads(theirs.to_json_string())  # type: ignore[operator]
    try:
        config = config_class.from_dict(stated)
        with torch.device("meta"):
            network = network_class(config)
        tensors = theirs.state_dict(keep_vars=as_parameters)
        for parameter_name, parameter in network.named_parameters():  # else assigning would switch theirs on
            if parameter_name in tensors:
                parameter.requires_grad_(tensors[parameter_name].requires_grad)
        network.load_state_dict(tensors, strict=True, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ReducioError(f"{name}: a {type(theirs).__name__} that is not as published ({error})") from error
    return network.eval()


class Adoption:
    """A network of diffusers and ours on the same parameters.

    class_name: diffusers'. `replaced`: a method of the network that may have been set on it, by `accelerate`.
    """

    def __init__(self, theirs: nn.Module, class_name: str, network_class: Any, config_class: Any, replaced: str = ""):
        self.theirs, self.class_name, self.replaced = theirs, class_name, replaced
        self.network_class, self.config_class = network_class, config_class
        with torch.device("meta"):
            self.built = parts_of(type(theirs).from_config(theirs.config))  # type: ignore[attr-defined]
        self._parameters: dict[str, int] | None = None
        self._network: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Forget ours, for a copy whose network has other parameters."""
        return vars(self) | {"_parameters": None, "_network": None}

    def network(self) -> Any:
        """Ours, on the parameters as they are now. Raises ReducioError, with the reason, where the network is not what
        its class built, but for the values of its weights."""
        if why := self._changed():
            self._parameters = None
            raise ReducioError(why)
        parameters = {name: id(parameter) for name, parameter in self.theirs.named_parameters()}
        if parameters != self._parameters:  # the first call, or a parameter was replaced
            self._parameters = None
            self._network = adopt(self.theirs, self.network_class, self.config_class, self.class_name, True)
            self._parameters = parameters
        return self._network

    def _changed(self) -> str | None:
        for path, module in self.theirs.named_modules():
            name = type(getattr(module, "processor", None)).__name__
            if hasattr(module, "processor") and name not in PLAIN_PROCESSORS:
                return f"{path} has a {name}"
        return difference(self.theirs, *self.built, replaced=self.replaced)
