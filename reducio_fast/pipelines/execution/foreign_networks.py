"""Our networks on the parameters of diffusers' networks: ours have fast twins, and users keep the ones they loaded."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from ...fast.twins import difference, parts_of
from ...system.errors import ReducioError

# Processors that compute attention as the networks define it: a twin may replace them.
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")


def adopt(theirs: nn.Module, network_class: Any, config_class: Any, name: str, as_parameters: bool = False) -> Any:
    """`network_class` on the tensors of `theirs`, or on its parameters (`as_parameters`): both then move together."""
    stated = json.loads(theirs.to_json_string())  # type: ignore[operator]
    try:
        config = config_class.from_dict(stated)
        with torch.device("meta"):
            network = network_class(config)
        tensors = theirs.state_dict(keep_vars=as_parameters)
        for parameter_name, parameter in network.named_parameters():  # else assigning sets theirs to require gradients
            if parameter_name in tensors:
                parameter.requires_grad_(tensors[parameter_name].requires_grad)
        network.load_state_dict(tensors, strict=True, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ReducioError(f"{name}: a {type(theirs).__name__} that is not as published ({error})") from error
    return network.eval()


class Adoption:
    """A network of diffusers and ours on the same parameters.

    class_name: diffusers' class. replaced: name of a method of the network that `accelerate` may have replaced.
    builder: the class whose modules ours stands for, if not that of the network, which may build others.
    """

    def __init__(
        self,
        theirs: nn.Module,
        class_name: str,
        network_class: Any,
        config_class: Any,
        replaced: str = "",
        builder: Any = None,
    ):
        self.theirs, self.class_name, self.replaced = theirs, class_name, replaced
        self.network_class, self.config_class = network_class, config_class
        network_builder: Any = builder or type(theirs)
        with torch.device("meta"):
            self.built = parts_of(network_builder.from_config(theirs.config))
        self.built[0][""] = type(theirs)  # the network itself
        self._parameters: dict[str, int] | None = None
        self._network: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """The state without our network: the network of a copy has other parameters."""
        return vars(self) | {"_parameters": None, "_network": None}

    def network(self) -> Any:
        """Our network on the current parameters. Raises ReducioError, with the reason, if diffusers' network differs
        from what its class builds in more than the values of its weights."""
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
