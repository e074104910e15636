"""The small words of diffusers' pipelines: where the weights are, what a call is at, and how stages are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints import layouts, networks
from ..memory.offload import Offload
from ..system import devices
from ..system.errors import ReducioError
from .call.request import Request
from .execution.executor import Stages

if TYPE_CHECKING:
    from typing_extensions import Self


class Words(Stages):
    """What `ReducioPipeline` has beside its call."""

    _interrupt: bool
    _request: Request | None
    _current_timestep: Tensor | None
    _progress_bar_config: dict[str, Any]

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Self:
        """Move and cast every network in place; returns self. A dtype may also come alone: `pipe.to(torch.float16)`."""
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise ReducioError(f"to: two dtypes given, {device} and {dtype}")
            device, dtype = None, device
        if self._offload is not None and device is not None:
            raise ReducioError(
                f"to: device={device!r} given while weights are offloaded; call disable_model_cpu_offload() before"
            )
        target = self.device if device is None else devices.resolve_device(device)
        kind = self.dtype if dtype is None else devices.resolve_dtype(dtype, None, target)
        with self._lock:
            for network in self._networks():
                networks.cast(network, target, kind)
            self._let_fast_path_choose(dtype is None and self._engine is not None and self._engine.own_dtype)
        return self

    @property
    def components(self) -> dict[str, Any]:
        """By name: `ReducioPipeline(**pipe.components)` is a second pipeline on the same weights."""
        return {name: getattr(self, name) for name in layouts.COMPONENTS}

    @property
    def interrupt(self) -> bool:
        """Whether the call was asked to end; a callback asks by `pipe._interrupt = True`, as in diffusers."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float | None:
        """Of the call at work, else of the last one; so are the next three. None before the first call."""
        return None if self._request is None else self._request.guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool | None:
        return None if self._request is None else self._request.guidance_scale > 1

    @property
    def num_timesteps(self) -> int | None:
        return None if self._request is None else self._request.num_inference_steps

    @property
    def current_timestep(self) -> Tensor | None:
        """Of the step a callback is called for; None outside of the second stage."""
        return self._current_timestep

    def set_progress_bar_config(self, **words: Any) -> None:
        """Words for tqdm, kept for later calls: `set_progress_bar_config(disable=True)`."""
        self._progress_bar_config = words

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep all weights on the CPU, and on the GPU only those of the stage at work: less memory, and slower.

        diffusers' words. Packed weights of the fast twins travel likewise. Legal together: every backend, dtype, size
        and tiling. Not legal: graphs, which hold addresses (stages then run without); and `to(device)`, which is
        refused. Raises ReducioError where there is no GPU.
        """
        if device is None and not torch.cuda.is_available():
            raise ReducioError("enable_model_cpu_offload: there is no GPU here, all weights are on the CPU already")
        chosen = devices.resolve_device((f"cuda:{gpu_id or 0}") if device is None else device)
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", gpu_id if gpu_id is not None else torch.cuda.current_device())
        with self._lock:
            for network in self._networks():
                network.to("cpu")
            self._offload = Offload(chosen)
            self._fits.clear()

    def disable_model_cpu_offload(self) -> None:
        """All weights to the device where the stages ran, for good."""
        with self._lock:
            if self._offload is not None:
                device, self._offload = self._offload.device, None
                self._fits.clear()
                self.to(device)

    def enable_vae_tiling(self) -> None:
        """Decode each clip in tiles: 256 pixels, read 64 beyond and blended, as the release does.

        This is what `vae_tiling = None`, the default, does above 320 pixels, which is all that one tile reads.
        """
        self.vae_tiling = True

    def disable_vae_tiling(self) -> None:
        """Decode each clip whole.

        Above 320 pixels this makes another clip, not the same one faster: normalisation then averages over the whole
        frame, where the published weights saw 256 pixels, and above 512 pixels fusion attends in windows of 512. There
        are no seams, and memory grows with the frame.
        """
        self.vae_tiling = False

    def set_attention_backend(self, backend: str) -> None:
        """What computes attention in the fast twins, which are packed anew: a word of diffusers' or ours.

        "auto", the default: what the plan finds best. "native": torch's scaled_dot_product_attention. "flash": the
        flash-attn package; where keys are masked, which it cannot, our kernel. "reducio": our kernel everywhere.
        Raises ReducioError for another word, and for one that this device, dtype or backend cannot follow.
        """
        if self._engine is None:
            if backend not in ("auto", "native"):
                raise ReducioError(
                    f"attention backend: {backend!r} given; the reference knows auto and native, its own"
                )
            return
        from ..fast.plan import check_attention

        try:
            check_attention(backend, self.execution_device, self.dtype)
        except ValueError as error:
            raise ReducioError(f"attention backend: {error}") from error
        with self._lock:
            self._engine.attention = backend

    def reset_attention_backend(self) -> None:
        self.set_attention_backend("auto")

    @contextmanager
    def attention_backend(self, backend: str) -> Iterator[None]:
        """`set_attention_backend` for the calls inside of a `with`."""
        before = "auto" if self._engine is None else self._engine.attention
        self.set_attention_backend(backend)
        try:
            yield
        finally:
            self.set_attention_backend(before)
