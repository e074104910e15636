"""The fast twins inside a pipeline of diffusers: it keeps its call, its schedulers and its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..fast.engine import Engine
from ..fast.twins import difference, parts_of
from ..reference.svd.config import TemporalVAEConfig, VideoUNetConfig
from ..reference.svd.unet import VideoUNet
from ..reference.svd.vae import TemporalVAE
from ..system.errors import ReducioError
from .svd.from_diffusers import adopt


class Acceleration:
    """What `accelerate` replaced in a pipeline. `report` says it network by network, and after a call why one ran as
    before; `undo()`, or the end of a `with` block, puts everything back."""

    def __init__(self, networks: dict[str, _Accelerated], left: dict[str, str]) -> None:
        self._networks, self._left = networks, left

    @property
    def report(self) -> dict[str, str]:
        return self._left | {name: network.state for name, network in self._networks.items()}

    def undo(self) -> None:
        """The pipeline as it was. Packed weights go."""
        for network in self._networks.values():
            network.restore()
        self._networks = {}

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def accelerate(pipeline: Any, compile: bool | None = None) -> Acceleration:
    """Run a loaded diffusers pipeline on the fast twins of its networks, for the same result.

    pipeline: any with diffusers' `UNetSpatioTemporalConditionModel`, `AutoencoderKLTemporalDecoder` or both, such as
        `StableVideoDiffusionPipeline`; weights stay where they are and are packed a second time at the first step.
        Changed, moved or replaced weights are packed anew, at the next clip.
    compile: as in `SVDPipeline`.

    What a twin cannot do runs as before, and `report` says why: LoRA layers that are not fused, gradients, a subclass
    with a `forward` of its own, hooks (as of `enable_model_cpu_offload`), attention processors of your own, replaced or
    quantised modules, a module under `torch.compile`.
    Raises ReducioError for a pipeline without one of these networks.
    """
    networks, left = dict[str, _Accelerated](), dict[str, str]()
    engine = Engine(compile)
    for name, network in getattr(pipeline, "components", {}).items():
        kind = next((kind for kind in _KINDS if kind.class_name in _class_names(network)), None)
        if kind is None:
            continue
        if why := kind.obstacle(network):
            left[name] = f"as before: {why}"
        else:
            networks[name] = kind(network, engine)
    if not networks and not left:
        known = " or ".join(kind.class_name for kind in _KINDS)
        raise ReducioError(f"accelerate: a {type(pipeline).__name__} has no {known}")
    return Acceleration(networks, left)


# What computes attention as the networks' definition says: a twin may do it in their place.
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")


def _class_names(network: Any) -> list[str]:
    return [base.__name__ for base in type(network).__mro__]


class _Accelerated:
    """One network of diffusers, whose method `method` runs the twin."""

    class_name: str
    method: str
    network_class: Any
    config_class: Any

    @classmethod
    def obstacle(cls, network: nn.Module) -> str | None:
        """Why this network cannot be replaced, if so."""
        own = next(base for base in type(network).__mro__ if base.__name__ == cls.class_name)
        if getattr(type(network), cls.method) is not getattr(own, cls.method):
            return f"{type(network).__name__} has a {cls.method} of its own"
        if cls.method in vars(network) or hasattr(network, "_hf_hook"):
            return f"its {cls.method} was replaced before, by hooks or by accelerate"
        return None

    def __init__(self, network: nn.Module, engine: Engine) -> None:
        self.theirs, self.engine, self.state = network, engine, "fast"
        self.before: Callable[..., Any] = getattr(network, self.method)
        self.parameters: dict[str, int] | None = None
        self.built = self._as_built()
        self.seen: Any = None
        setattr(network, self.method, self.run)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the pipeline packs weights of its own."""
        return {"theirs": self.theirs, "before": self.before, "built": self.built, "compile": self.engine.compile}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.engine = Engine(state.pop("compile"))
        vars(self).update(state, state="fast", parameters=None, seen=None)

    def _as_built(self) -> tuple[dict[str, type], dict[str, torch.Size]]:
        theirs: Any = self.theirs
        with torch.device("meta"):
            return parts_of(type(theirs).from_config(theirs.config))

    def restore(self) -> None:
        delattr(self.theirs, self.method)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """In the method's place."""
        twin = self._twin(*args, **kwargs)
        return self.before(*args, **kwargs) if twin is None else self.call(twin, *args, **kwargs)

    def call(self, twin: Any, *args: Any, **kwargs: Any) -> Any:
        """The method on the twin, with diffusers' arguments."""
        raise NotImplementedError

    def first_of_clip(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the weights are to be looked at: once a clip, since reading all takes milliseconds."""
        return True

    def _twin(self, *args: Any, **kwargs: Any) -> Any:
        """The twin of the weights as they are now; None, and the reason in `state`, where it cannot serve."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.theirs.parameters()):
            self.state = "as before: gradients are recorded"
            return None
        if self.first_of_clip(*args, **kwargs):
            self.twin = self._look()
        return self.twin

    def _look(self) -> Any:
        if why := self._changed():
            self.state, self.parameters = f"as before: {why}", None
            return None
        parameters = {name: id(parameter) for name, parameter in self.theirs.named_parameters()}
        if parameters != self.parameters:  # the first call, or a parameter was replaced
            try:
                self.network = adopt(self.theirs, self.network_class, self.config_class, self.class_name, True)
            except ReducioError as error:
                self.state, self.parameters = f"as before: {error}", None
                return None
            self.parameters = parameters
        self.state = "fast"
        return self.engine.twin(self.network)

    def _changed(self) -> str | None:
        """What was changed about the network since its class built it, but for the values of its weights."""
        for path, module in self.theirs.named_modules():
            name = type(getattr(module, "processor", None)).__name__
            if hasattr(module, "processor") and name not in PLAIN_PROCESSORS:
                return f"{path} has a {name}"
        return difference(self.theirs, *self.built, replaced=self.method)


class _UNet(_Accelerated):
    class_name, method = "UNetSpatioTemporalConditionModel", "forward"
    network_class, config_class = VideoUNet, VideoUNetConfig

    def first_of_clip(self, *args: Any, **kwargs: Any) -> bool:
        """All steps of a clip are given one tensor of image embeddings."""
        embeds = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        before, self.seen = self.seen, embeds
        return embeds is not before

    def call(
        self,
        twin: Any,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor,
        return_dict: bool = True,
    ) -> Any:
        from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionOutput

        time = torch.as_tensor(timestep, device=sample.device)
        if time.ndim and not (time == time[0]).all():  # the twin has one table of embeddings for all clips
            return self.before(sample, timestep, encoder_hidden_states, added_time_ids, return_dict)
        out = twin(sample, time, encoder_hidden_states, added_time_ids).to(sample.dtype)
        return UNetSpatioTemporalConditionOutput(sample=out) if return_dict else (out,)


class _VAE(_Accelerated):
    class_name, method = "AutoencoderKLTemporalDecoder", "decode"
    network_class, config_class = TemporalVAE, TemporalVAEConfig

    def call(self, twin: Any, z: Tensor, num_frames: int, return_dict: bool = True) -> Any:
        from diffusers.models.autoencoders.vae import DecoderOutput

        frames = twin.decode(z.unflatten(0, (-1, num_frames))).flatten(0, 1)
        return DecoderOutput(sample=frames) if return_dict else (frames,)


_KINDS: tuple[type[_Accelerated], ...] = (_UNet, _VAE)
