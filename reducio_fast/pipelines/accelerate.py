"""Run the fast twins inside a diffusers pipeline, which keeps its call, its schedulers and its results."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..fast.engine import Engine
from ..fast.replaced_methods import is_set_on
from ..reference.reducio.image_vae import ImageVAE, ImageVAEConfig
from ..reference.reducio.pixart import PixArt, PixArtConfig
from ..reference.svd.config import TemporalVAEConfig, VideoUNetConfig
from ..reference.svd.unet import VideoUNet
from ..reference.svd.vae import TemporalVAE
from ..system.errors import ReducioError
from .call import validation
from .execution.foreign_networks import Adoption


class Acceleration:
    """The networks that `accelerate` replaced in a pipeline. `report` has one line per network, and says after a call
    why a network ran as before; `undo()`, or the end of a `with` block, restores everything."""

    def __init__(self, pipeline: Any, networks: dict[str, _Accelerated], left: dict[str, str]) -> None:
        self._pipeline, self._networks, self._left = pipeline, networks, left

    @property
    def report(self) -> dict[str, str]:
        there, gone = self._pipeline.components, "as before: another network is there now"
        ours = {name: each.state if there.get(name) is each.theirs else gone for name, each in self._networks.items()}
        return self._left | ours

    def undo(self) -> None:
        """Restore the pipeline as it was and free the packed weights. A method that was set since, as by hooks, stays;
        if it calls ours, ours calls diffusers'."""
        for network in self._networks.values():
            network.restore()
        self._networks = {}

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def accelerate(pipeline: Any, compile: bool | None = None) -> Acceleration:
    """Run a loaded diffusers pipeline on the fast twins of its networks, for the same result.

    pipeline: has at least one of diffusers' `UNetSpatioTemporalConditionModel`, `AutoencoderKLTemporalDecoder`,
        `PixArtTransformer2DModel` and `AutoencoderKL` (its `decode` runs fast), such as `StableVideoDiffusionPipeline`
        and the PixArt pipelines, or a U-Net of DepthCrafter or sv3d-diffusers. Its weights stay where they are; the
        first step packs a second copy of them. Weights that were changed, moved or replaced are packed again at the
        next clip, that is with the next tensor of embeddings: pipelines make one for each call.
    compile: as in `SVDPipeline`.

    What a twin cannot do runs as before, and `report` says why: LoRA layers that are not fused, gradients, autocast,
    another class with its own `forward`, hooks (such as those of `enable_model_cpu_offload`), custom attention
    processors, replaced or quantised modules, a module under `torch.compile`.
    Raises ReducioError for a pipeline without one of these networks, and for another `compile`.
    """
    validation.check_compile(compile, "fast", "asked for")
    networks, left = dict[str, _Accelerated](), dict[str, str]()
    engine = Engine(compile)
    components: Any = getattr(pipeline, "components", None)
    for name, network in dict[str, Any](components if isinstance(components, Mapping) else {}).items():
        inner = getattr(network, "_orig_mod", network)  # of torch.compile, whose result has another class
        bases = [base.__name__ for base in type(inner).__mro__]
        kinds = [kind for kind in _KINDS if kind.class_name in bases]
        if not kinds:
            continue
        kind = next((kind for kind in kinds if kind.serves(inner)), None)
        if inner is not network:
            why: str | None = "it is compiled"
        else:
            why = kinds[0].not_served(network) if kind is None else kind.obstacle(network)
        if kind is None or why is not None:
            left[name] = f"as before: {why}"
        else:
            networks[name] = kind(network, engine)
    if not networks and not left:
        *others, last = (kind.class_name for kind in _KINDS)
        known = f"{', '.join(others)} or {last}"
        raise ReducioError(f"accelerate: a {type(pipeline).__name__} has no {known}")
    return Acceleration(pipeline, networks, left)


def _owner(network: nn.Module, method: str) -> type:
    """The class whose `method` the network runs."""
    return next((base for base in type(network).__mro__ if method in vars(base)), object)


class _Accelerated:
    """One network of diffusers, whose method `method` runs the twin."""

    class_name: str
    prepared: tuple[tuple[Any, ...], Any] | None = None  # the last condition, after what it was made from
    source = "diffusers"  # the package that defines the class
    diffusers_class: str | None = None  # diffusers' class with the same modules, if the source is not diffusers
    modules: tuple[str, ...] = ()  # modules that the class has beside those of `diffusers_class`
    method: str
    helpers: tuple[str, ...] = ()  # further methods of the class that `method` calls
    network_class: Any
    config_class: Any

    @classmethod
    def serves(cls, network: nn.Module) -> bool:
        """Whether the network runs the `method` that the twin stands for. What counts is the class that defines the
        method: other packages have classes with diffusers' names, and subclasses with methods of their own."""
        owner = _owner(network, cls.method)
        if owner.__name__ != cls.class_name or any(_owner(network, name) is not owner for name in cls.helpers):
            return False
        method = vars(owner)[cls.method]
        if method.__module__.split(".")[0] != owner.__module__.split(".")[0]:
            return False  # it was replaced on the class
        if cls.diffusers_class is None:
            return owner.__module__.startswith("diffusers.")
        # A copy of the class may lie in a package of any name, so the arguments and modules are compared as well.
        takes, taken = (list(inspect.signature(run).parameters) for run in (cls.call, method))
        return takes[2:] == taken[1:] and all(hasattr(network, name) for name in cls.modules)

    @classmethod
    def not_served(cls, network: nn.Module) -> str:
        """The reason why no kind serves this network."""
        kinds = [kind for kind in _KINDS if kind.network_class is cls.network_class]
        known = " and ".join(f"{kind.class_name} ({kind.source})" for kind in kinds)
        theirs = f"{type(network).__module__}.{type(network).__qualname__}"
        return f"{theirs} has a {cls.method} of its own; supported is that of {known}"

    @classmethod
    def obstacle(cls, network: nn.Module) -> str | None:
        """Why this network cannot be replaced; None if it can."""
        ours = cls._set_on(network)
        replaced = is_set_on(network, cls.method) and (ours is None or ours.held)
        if replaced or hasattr(network, "_hf_hook"):
            return f"its {cls.method} was replaced before, by hooks or by accelerate"
        if cls.method == "forward" and getattr(network, "_compiled_call_impl", None) is not None:
            return "it is compiled"
        return None

    @classmethod
    def _set_on(cls, network: nn.Module) -> _Accelerated | None:
        """The object whose `run` is the network's method now."""
        ours = getattr(vars(network).get(cls.method), "__self__", None)
        return ours if isinstance(ours, _Accelerated) and ours.theirs is network else None

    def __init__(self, network: nn.Module, engine: Engine) -> None:
        if earlier := self._set_on(network):  # it came with a copy, or with a hook that was removed after `undo`
            earlier.restore()
        self.theirs, self.engine, self.state = network, engine, "fast"
        self.held, self.undone = True, False  # whether an Acceleration can undo this; whether it did
        self.before: Callable[..., Any] = getattr(network, self.method)
        # A subclass may build its blocks from other modules, so diffusers' class says which there must be.
        builder = getattr(importlib.import_module("diffusers"), self.diffusers_class or self.class_name)
        classes = (self.network_class, self.config_class)
        self.adoption = Adoption(network, self.class_name, *classes, self.method, builder)
        self.seen: Any = None
        setattr(network, self.method, self.run)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the pipeline packs weights of its own."""
        kept = {name: vars(self)[name] for name in ("theirs", "before", "adoption", "undone")}
        return kept | {"compile": self.engine.compile}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.engine = Engine(state.pop("compile"))
        vars(self).update(state, state="fast", seen=None, held=False)

    def restore(self) -> None:
        if self._set_on(self.theirs) is self:
            delattr(self.theirs, self.method)
        # Something else, such as a hook, may still call `run` and keep this object: it holds no packed weights then.
        self.held, self.undone, self.twin, self.seen, self.prepared = False, True, None, None, None
        self.engine.forget()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs in place of the method."""
        if torch.compiler.is_compiling():  # packing cannot be traced
            self.state, self.seen = "as before: it is compiled", None
            return self.before(*args, **kwargs)
        twin = self._twin(*args, **kwargs)
        return self.before(*args, **kwargs) if twin is None else self.call(twin, *args, **kwargs)

    def call(self, twin: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the method on the twin, with diffusers' arguments."""
        raise NotImplementedError

    def first_of_clip(self, *args: Any, **kwargs: Any) -> bool:
        """Whether to compare the weights with the packed ones: once per clip, since reading all takes milliseconds."""
        return True

    def _twin(self, *args: Any, **kwargs: Any) -> Any:
        """The twin of the current weights. None if it cannot run; `state` then has the reason."""
        if self.undone:
            return None
        why, device = None, next(self.theirs.parameters()).device.type
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *self.theirs.parameters())):
            why = "gradients are recorded"
        elif hasattr(self.theirs, "_hf_hook"):
            why = "has hooks, such as those of enable_model_cpu_offload"
        elif any(tensor.numel() == 0 for tensor in given):
            why = "the batch is empty"
        elif torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            why = "runs under autocast"
        if why is not None:
            self.state, self.seen = f"as before: {why}", None
            return None
        if self.first_of_clip(*args, **kwargs):
            self.twin = self._current_twin()
        return self.twin

    def _current_twin(self) -> Any:
        try:
            network = self.adoption.network()
        except ReducioError as error:
            self.state = f"as before: {error}"
            return None
        self.state = "fast"
        return self.engine.twin(network)


class _UNet(_Accelerated):
    class_name, method = "UNetSpatioTemporalConditionModel", "forward"
    network_class = VideoUNet
    config_class: Any = VideoUNetConfig

    def first_of_clip(self, *args: Any, **kwargs: Any) -> bool:
        """All steps of a clip get the same tensor of image embeddings."""
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
        conditions = self.conditions(sample, encoder_hidden_states, added_time_ids)
        # The twin has one table of embeddings for all clips.
        if conditions is None or (time.ndim and not (time == time[0]).all()):
            return self.before(sample, timestep, encoder_hidden_states, added_time_ids, return_dict)
        out = twin(sample, time, *conditions)
        return UNetSpatioTemporalConditionOutput(sample=out) if return_dict else (out,)

    def conditions(self, sample: Tensor, embeds: Tensor, added: Any) -> tuple[Tensor, Tensor] | None:
        """The image's tokens and the time ids, as the twin takes them; None for others than the class documents."""
        return embeds, added


class _DepthCrafterUNet(_UNet):
    """DepthCrafter reads a video, so each frame has an image token of its own: [B, T, E]."""

    class_name, source = "DiffusersUNetSpatioTemporalConditionModelDepthCrafter", "DepthCrafter"
    diffusers_class = "UNetSpatioTemporalConditionModel"

    def conditions(self, sample: Tensor, embeds: Tensor, added: Any) -> tuple[Tensor, Tensor] | None:
        return (embeds[:, :, None], added) if embeds.ndim == 3 and embeds.shape[:2] == sample.shape[:2] else None


class _OrbitConfig:
    """Reads sv3d-diffusers' configuration, which does not state that an angle is embedded in twice as many channels as
    the noise augmentation."""

    @staticmethod
    def from_dict(stated: dict[str, Any]) -> VideoUNetConfig:
        width = stated["addition_time_embed_dim"]
        return VideoUNetConfig.from_dict(stated | {"addition_time_embed_dim": (width, 2 * width, 2 * width)})


class _OrbitUNet(_UNet):
    """sv3d-diffusers gives each frame its own camera: lists of noise augmentation, polar angle and azimuth, [B, T]."""

    class_name, source = "SV3DUNetSpatioTemporalConditionModel", "sv3d-diffusers"
    diffusers_class, modules = "UNetSpatioTemporalConditionModel", ("add_angle_proj",)
    config_class = _OrbitConfig

    def __init__(self, network: Any, engine: Engine) -> None:
        super().__init__(network, engine)
        self.adoption.built[0]["add_angle_proj"] = type(network.add_time_proj)

    def conditions(self, sample: Tensor, embeds: Tensor, added: Any) -> tuple[Tensor, Tensor] | None:
        if not isinstance(added, list) or [ids.shape for ids in added] != [sample.shape[:2]] * 3:
            return None  # one tensor: each id is embedded as the noise augmentation is
        return embeds, torch.stack(added, dim=-1)


class _VAE(_Accelerated):
    class_name, method = "AutoencoderKLTemporalDecoder", "decode"
    network_class, config_class = TemporalVAE, TemporalVAEConfig

    def call(self, twin: Any, z: Tensor, num_frames: int, return_dict: bool = True) -> Any:
        from diffusers.models.autoencoders.vae import DecoderOutput

        frames = twin.decode(z.unflatten(0, (-1, num_frames))).flatten(0, 1)
        return DecoderOutput(sample=frames) if return_dict else (frames,)


class _PixArt(_Accelerated):
    class_name, method = "PixArtTransformer2DModel", "forward"
    network_class, config_class = PixArt, PixArtConfig

    def first_of_clip(self, *args: Any, **kwargs: Any) -> bool:
        """All steps of an image get the same tensor of text embeddings and the same mask."""
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        conditions = (text, args[6] if len(args) > 6 else kwargs.get("encoder_attention_mask"))
        before, self.seen = self.seen, conditions
        return before is None or any(now is not then for now, then in zip(conditions, before, strict=True))

    def call(
        self,
        twin: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        given = (hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, cross_attention_kwargs)
        config: Any = self.theirs.config
        cut = any(side % config.patch_size for side in hidden_states.shape[2:])
        unusual = cut or cross_attention_kwargs or attention_mask is not None or not _is_shared(timestep)
        condition = () if unusual else self._condition(twin, *given, encoder_attention_mask)
        if not condition or timestep is None:
            return self.before(*given, attention_mask, encoder_attention_mask, return_dict)
        keys_values, size = condition
        out = twin.predict(hidden_states, timestep.reshape(-1)[:1], keys_values, size).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _condition(self, twin: Any, latent: Tensor, text: Any, time: Any, added: Any, words: Any, mask: Any) -> Any:
        """What `_prepare` returns, once for an image; read and replaced whole, as another thread may draw too."""
        added = added or {}
        tensors = (text, mask, added.get("resolution"), added.get("aspect_ratio"))
        # Tensors by identity, whose == compares values; writes in place change versions, which inference mode lacks.
        key = (twin, *tensors, *(None if x is None or x.is_inference() else x._version for x in tensors), len(latent))
        kept = self.prepared
        if kept is None or any(
            now is not then if isinstance(now, Tensor) else now != then for now, then in zip(key, kept[0], strict=True)
        ):
            self.prepared = kept = (key, self._prepare(twin, text, mask, added.get, latent))
        return kept[1]

    @staticmethod
    def _prepare(
        twin: Any, text: Tensor | None, mask: Tensor | None, added: Callable[[str], Tensor | None], latent: Tensor
    ) -> Any:
        """Keys and values of an image's condition, and its size; () for a condition that the twin does not take."""
        # Of a mask without any token diffusers lowers all scores alike, as if there were none.
        if text is None or len(text) != len(latent) or (mask is not None and (mask.ndim != 2 or not mask.any(1).all())):
            return ()
        size, ratio = added("resolution"), added("aspect_ratio")
        if twin.sizes.size_conditioning:
            if size is None or ratio is None or not bool((size == size[:1]).all()):
                return ()
            expected = (size[:, 0].float() / size[:, 1].float()).to(ratio.dtype)
            if not torch.allclose(ratio.flatten(), expected):
                return ()
        return twin.prepare(text, mask), None if size is None else size[:1].float()


class _ImageVAE(_Accelerated):
    class_name, method, helpers = "AutoencoderKL", "decode", ("_decode",)
    network_class, config_class = ImageVAE, ImageVAEConfig

    def call(self, twin: Any, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        from diffusers.models.autoencoders.vae import DecoderOutput

        vae: Any = self.theirs
        if vae.use_tiling or vae.use_slicing:
            return self.before(z, return_dict, generator)
        image = twin.decode(z)
        return DecoderOutput(sample=image) if return_dict else (image,)


def _is_shared(timestep: Any) -> bool:
    """Whether all items share one timestep. An expanded tensor need not be read back from the device."""
    if not isinstance(timestep, Tensor):
        return False
    return timestep.numel() == 1 or timestep.stride(0) == 0 or bool((timestep == timestep[0]).all())


_KINDS: tuple[type[_Accelerated], ...] = (_UNet, _DepthCrafterUNet, _OrbitUNet, _VAE, _PixArt, _ImageVAE)
