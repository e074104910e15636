"""A loaded model that makes clips: the loop over the clips of a call, and diffusers' methods, by delegation."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.layouts import Layout
from ..memory.dry_run import DryRun
from ..memory.forecast import Forecast
from ..system import torch_state
from ..system.deadline import Outcome
from ..system.errors import ReducioError
from . import long_clip, one_clip, parallel
from .call.output import ReducioOutput
from .call.request import ClipRequest, Request, SamplingInputs
from .call.state import CallState, Stage
from .call.validation import check_names
from .execution.adapters import Adapters
from .execution.components import Components, PartAttribute
from .execution.decoding import Decoding
from .execution.executor import Executor
from .execution.fitting import Fitter
from .execution.sampling import Sampler
from .execution.warmup import warm_up

if TYPE_CHECKING:
    from typing_extensions import Self


class VideoPipeline:
    """What the pipelines of all families have in common. A family has a `layout`, builds parts and makes requests.

    parts: components and settings; they are attributes of the pipeline too. executor: what runs them. content,
    conditioner, sampler, decoder: the stages. call: the running call, or the last one.
    """

    layout: Layout
    configs: ClassVar[dict[str, Any]]  # of the networks that a call's arguments are checked against
    usual_size: Any  # height and width of a call that names none

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Components and settings of the layout."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in (*cls.layout.names, *cls.layout.settings):
            setattr(cls, name, PartAttribute(name))

    def __init__(
        self,
        parts: Components,
        executor: Executor,
        content: Any,
        conditioner: Any,
        sampler: Sampler,
        decoder: Any,
    ) -> None:
        self.parts, self.executor = parts, executor
        self.content, self.conditioner, self.sampler, self.decoder = content, conditioner, sampler, decoder
        self.adapters = Adapters(parts, executor)
        self.call: CallState | None = None
        self.listener: Callable[[str, int], None] | None = None  # called at each step; may raise to end a call
        self.rescue_folder: Path | None = None  # where latents go when decoding fails; None: the cache folder
        self._progress_bar_config: dict[str, Any] = {}
        self.fitter = Fitter(parts, executor, decoder, self._dry_stages)

    # ---- a call ----

    def run(self, request: Request) -> ReducioOutput:
        """Make the clips of a checked request, one after the other."""
        size, call = (request.height, request.width), CallState(request, listener=self.listener)
        with self.turn(call):
            try:
                decoding = self.fitter.settle(*size)
                self.executor.warn_of_compiling(*size, usual=size == self.usual_size)
                make: Any = one_clip.make_clip if request.chain is None else long_clip.make
                make = functools.partial(make, self, call=call, decoding=decoding)
                return call.make_clips(make, request.fps, self._progress_bar_config)
            finally:
                call.end()

    def stream(self, **arguments: Any) -> Iterator[Any]:
        """Frames of one clip of any length, in order, as soon as each is final; arguments as in a call, by name.

        Each frame is what `frames[i]` of a call would be. Only one clip of the model's length is in memory; calls of
        other threads can run between two such clips. Raises ReducioError at once, also for calls of more than one clip.
        """
        check_names(self.__call__, arguments)
        call = CallState(self.check_inputs(**arguments), listener=self.listener)
        long_clip.check_stream(call.request)
        return long_clip.stream(self, call)

    @contextmanager
    def turn(self, call: CallState) -> Iterator[None]:
        """A context for the work of a call, during which calls of other threads wait."""
        with torch_state.inference(), self.executor.exclusive():
            self._prepare(call.request)
            if self.executor.ranks is not None:
                parallel.agree(self.executor.ranks, call.request)
            self.call = call
            yield

    def _prepare(self, request: Any) -> None:
        """Store in the family's parts what they need of the running call."""

    def finished(
        self, latent: Tensor, frame: np.ndarray, request: Any, output_type: str, decoding: Decoding | None
    ) -> Tensor:
        """Decode a latent, and apply what the request asks for beyond that."""
        return self.decoder(latent, frame, output_type, decoding)

    def _sampling_inputs(self, clip: ClipRequest, call: CallState, stage: Stage) -> SamplingInputs:
        """The inputs of sampling, from the family's first stage and encoders for one clip's request."""
        raise NotImplementedError

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Arguments for tqdm, kept for later calls: `set_progress_bar_config(disable=True)`."""
        self._progress_bar_config = kwargs

    @property
    def _interrupt(self) -> bool:
        return self.call is not None and self.call.interrupted

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        if self.call is not None:
            self.call.interrupted = value

    @property
    def interrupt(self) -> bool:
        """Whether the call was asked to end; a callback asks by `pipe._interrupt = True`, as in diffusers."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float | None:
        """Guidance scale of the running call, or of the last one. None before the first call."""
        return None if self.call is None else self.call.request.guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool | None:
        return None if self.call is None else self.call.request.guidance_scale > 1

    @property
    def num_timesteps(self) -> int | None:
        return None if self.call is None else self.call.request.num_inference_steps

    @property
    def current_timestep(self) -> Tensor | None:
        """Timestep that the callback is called for; None outside of the second stage."""
        return None if self.call is None else self.call.timestep

    def forecast(self, height: int, width: int, decoding: Decoding | None = None) -> Forecast:
        """Bytes that a clip of this size will need, stage by stage, without computing anything: see
        `memory.forecast.Forecast`. `decoding`: how to decode, if not in the pipeline's own way. Raises ReducioError for
        a size that a call would refuse."""
        return self.fitter.forecast(height, width, decoding)

    def warmup(
        self,
        sizes: Sequence[int | tuple[int, int]] | None = None,
        deadline: float | None = None,
        progress: bool = True,
    ) -> Outcome:
        """Compile, capture and tune now what calls of these sizes would otherwise wait for; returns when it is done.

        sizes: (height, width), or a number for a square; by default the model's own. deadline: seconds; when they have
        passed, the pipeline is usable at once but runs uncompiled, with one line of log. Returns the seconds each size
        took, and the sizes that are `left`. Raises ReducioError for sizes that a call would refuse.
        """
        return warm_up(self, sizes, deadline, progress)

    # ---- where the weights are ----

    @property
    def components(self) -> dict[str, Any]:
        """Components by name: `ReducioPipeline(**pipe.components)` is a second pipeline on the same weights, with the
        default settings (size, fps, clean_caption, sampling)."""
        return self.parts.as_dict()

    @property
    def backend(self) -> str:
        return self.executor.backend

    @property
    def report(self) -> dict[str, str]:
        """Per network, what runs it and why; for a first stage, what draws the content frame."""
        lines = self.executor.report
        return lines if self.text_to_image is None else lines | {"text_to_image": self.content.line}

    def describe(self) -> dict[str, Any]:
        """What runs this pipeline, as plain data: `backend` and, for the fast path, the implementation picked for each
        module and why (`plan`), what became of every graph (`graphs`) and which blocks are compiled (`regions`)."""
        return self.executor.describe()

    @property
    def device(self) -> torch.device:
        return self.parts.device

    @property
    def execution_device(self) -> torch.device:
        """Where the stages run; `device` is where the weights are between them."""
        return self.executor.device

    @property
    def offloading(self) -> bool:
        return self.executor is not None and self.executor.offload is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.parts.dtype

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Self:
        """Move and cast every network in place; returns self. A dtype may also come alone: `pipe.to(torch.float16)`."""
        with torch_state.inference(), self.adapters.casting():
            self.executor.move(device, dtype)
            self.fitter.fits.clear()
        return self

    def unload(self, *names: str) -> None:
        """Remove optional components, such as text_encoder or text_to_image, and free their memory.

        Calls then need as arguments what these computed: embeds, or an image. Assigning the attribute restores the
        component. Raises ReducioError for another name, and for a network that a remaining `text_to_image` also uses.
        """
        self.executor.unload(*names)

    @property
    def unloaded(self) -> list[str]:
        """Components that `unload` removed and that were not assigned again."""
        return self.parts.unloaded

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep all weights on the CPU, and on the GPU only those of the running stage: less memory, but slower.

        As in diffusers. Packed weights of the fast twins move too. Works with every backend, dtype, size and tiling.
        Stages run without graphs, which hold addresses, and `to(device)` is refused. Raises ReducioError where there is
        no GPU.
        """
        with self.executor.lock:
            self.executor.start_offload(gpu_id, device)
            self.fitter.fits.clear()

    def disable_model_cpu_offload(self) -> None:
        """Move all weights to the device where the stages ran, and keep them there."""
        with self.executor.lock:
            self.executor.end_offload()
            self.fitter.fits.clear()

    def _dry_stages(self, dry: DryRun) -> Any:
        """The family's stages without contents, for `Fitter`."""
        raise NotImplementedError

    def for_thread(self) -> Self:
        """A second pipeline on the same weights and engine, for another thread. What a call writes to is not shared."""
        parts = self.parts.for_thread()
        other = type(self).__new__(type(self))
        other._assemble(parts, self.executor.for_thread(parts))
        other.decoder.tiling = self.decoder.tiling
        return other

    def _assemble(self, parts: Components, executor: Any) -> None:
        """Build the family's stages on these parts."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """The state from which `copy.deepcopy` and `pickle` make an equal pipeline: components, settings, adapters and
        the choices that methods have made. The copy makes new locks, twins, graphs and forecasts."""
        rebuilt = ("content", "conditioner", "sampler", "decoder", "motion", "adapters", "fitter", "call", "listener")
        others = {name: value for name, value in vars(self).items() if name not in rebuilt}
        return others | {"vae_tiling": self.vae_tiling, "merge": self.adapters.merge}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tiling, merge = state.pop("vae_tiling"), state.pop("merge")
        self._assemble(state.pop("parts"), state.pop("executor"))
        vars(self).update(state)
        self.vae_tiling, self.adapters.merge = tiling, merge

    # ---- how stages compute ----

    @property
    def vae_tiling(self) -> bool | None:
        """Whether to decode in tiles (Reducio only); None: the size of the clip decides."""
        return self.decoder.tiling

    @vae_tiling.setter
    def vae_tiling(self, value: bool | None) -> None:
        self.decoder.tiling = value
        self.fitter.fits.clear()

    def enable_vae_tiling(self) -> None:
        """Decode each clip in tiles of 256 pixels that read 64 pixels more and are blended, as the release does. The
        default, `vae_tiling = None`, does so above 320 pixels, which is all that one tile reads. Reducio only."""
        self.vae_tiling = True

    def disable_vae_tiling(self) -> None:
        """Decode each clip whole. Reducio only.

        Above 320 pixels this gives a different clip, not the same one faster: norms then average over the whole frame,
        where the published weights saw 256 pixels, and fusion attends in windows of 512. Memory grows with the frame.
        """
        self.vae_tiling = False

    def set_attention_backend(self, backend: str) -> None:
        """Choose what computes attention in the fast twins, by one of diffusers' names or ours; packs the twins again.

        "auto", the default: what the plan finds best. "native": torch's scaled_dot_product_attention. "flash": the
        flash-attn package, or our kernel where keys are masked, which flash-attn cannot do. "reducio": our kernel
        everywhere. Raises ReducioError for another name, and for one that this device, dtype or backend does not
        support.
        """
        with self.executor.lock:
            try:
                self.executor.engine.set_attention(backend, self.execution_device, self.dtype)
            except ValueError as error:
                raise ReducioError(f"attention backend: {error}") from error

    def reset_attention_backend(self) -> None:
        self.set_attention_backend("auto")

    @contextmanager
    def attention_backend(self, backend: str) -> Iterator[None]:
        """`set_attention_backend` for the calls inside a `with` block."""
        before = self.executor.engine.attention
        self.set_attention_backend(backend)
        try:
            yield
        finally:
            self.set_attention_backend(before)

    # ---- adapters: see `execution.adapters.Adapters` ----

    def load_lora_weights(
        self,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        weight_name: str | None = None,
        hotswap: bool = False,
    ) -> None:
        """Read a LoRA and make it the active adapter, with weight 1: see `Adapters.load`."""
        self.adapters.load(source, adapter_name, weight_name, hotswap)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Make these adapters the active ones, each with its weight (one for all, or one each; None: 1)."""
        self.adapters.activate(adapter_names, adapter_weights)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Fuse the active adapters (or those named), times `lora_scale`, into the weights until `unfuse_lora`.
        `save_pretrained` writes the fused weights, and `unload_lora_weights` leaves them as they are."""
        self.adapters.fuse(components, lora_scale, adapter_names)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Restore the adapters and weights of before `fuse_lora`, bit for bit. Does nothing if none is fused."""
        self.adapters.unfuse(components)

    def unload_lora_weights(self) -> None:
        """Remove every adapter. The weights become the originals again, bit for bit; fused ones stay as they are."""
        self.adapters.unload()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        self.adapters.delete(adapter_names)

    def disable_lora(self) -> None:
        """Compute without the active adapters until `enable_lora`."""
        self.adapters.enable(False)

    def enable_lora(self) -> None:
        self.adapters.enable(True)

    def get_active_adapters(self) -> list[str]:
        return self.adapters.active_names

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Loaded adapters by component."""
        return self.adapters.by_component

    @property
    def fused_loras(self) -> set[str]:
        return self.adapters.fused_names
