"""Prompt -> content frame -> motion latent -> frames: the two stages of Reducio (arXiv 2411.13552) behind one call.

The words of the call are those of diffusers' image-to-video pipelines. Clips are made one after the other, each from
its own generator, so that a clip's bytes do not depend on the list its prompt stood in.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...checkpoints import hub, layouts, model_folder
from ...checkpoints.saved_latents import rescue
from ...compile import gc_pause
from ...media import aspect_buckets, image_files
from ...media.image_files import read_image
from ...reference import ReducioDiT, ReducioVAE, initial_latent
from ...system import devices
from ...system.deadline import Outcome
from ...system.errors import ReducioError, is_out_of_memory
from ..call import validation
from ..call.output import ReducioOutput, stack, to_output
from ..call.request import ClipRequest, Embeds, Request
from ..call.step_callback import StepEnd
from ..execution.adapters import LoraLoader
from ..execution.warmup import warm_up
from ..video_pipeline import Words
from . import content_frame, dry_runs
from .encoders import SemanticEncoder

LOG = logging.getLogger("reducio_fast")

StepCallback = Callable[["ReducioPipeline", int, Tensor, dict[str, Tensor]], "dict[str, Tensor] | None"]


class ReducioPipeline(LoraLoader, Words):
    """The loaded model. Each component can be any object with the same call (the small ones are in `encoders`).

    `text_to_image` may be None (then each call needs an image), `text_encoder` too (then it needs `prompt_embeds`), and
    so may `image_encoder` and `content_encoder` (the DiT is then not told about that side of the image, unless by
    `semantic_embeds` and `content_latents`). `report` says, per network, what runs it and why.
    Threads may share a pipeline: their calls take turns.

    clean_caption: put prompts through PixArt's caption cleaning, as a model trained on PixArt's captions wants it; the
        published recipe does. content_scaling_factor: multiplies the content latent; 1, as the release extracts it,
        where Stable Diffusion itself would say 0.18215.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(
        self,
        vae: ReducioVAE,
        transformer: ReducioDiT,
        scheduler: Any,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        image_encoder: SemanticEncoder | Callable[[Tensor], Tensor] | None = None,
        content_encoder: nn.Module | None = None,
        text_to_image: Any = None,
        *,
        fps: float = 16,
        sample_height: int = 256,
        sample_width: int = 256,
        clean_caption: bool = False,
        content_scaling_factor: float = 1.0,
        backend: str = "auto",
        compile: bool | None = None,
    ) -> None:
        super().__init__(
            vae, transformer, scheduler, text_encoder, tokenizer, image_encoder, content_encoder, text_to_image,
            backend, clean_caption, content_scaling_factor, compile,
        )  # fmt: skip
        self.fps, self.sample_height, self.sample_width = fps, sample_height, sample_width
        self._interrupt = False
        self._progress_bar_config: dict[str, Any] = {}
        self._request: Request | None = None
        self._current_timestep: Tensor | None = None
        self._at_work = False
        self._told_of: set[tuple[int, int]] = set()  # sizes in no bucket that have been compiled for

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
        compile: bool | None = None,
        **components: Any,
    ) -> ReducioPipeline:
        """Load a model folder, or a hub repository `owner/name`, in the diffusers layout (safetensors only).

        `device` None is a GPU where there is one; `dtype` None is bfloat16 on a GPU, float32 on a CPU, where the fast
        path computes in bfloat16 if the processor multiplies that faster (`report` says so; a named dtype holds
        everywhere). `torch_dtype` is the older word for `dtype`. Further words replace components by name: an object,
        or the folder or hub id to load it from (`text_encoder="google/flan-t5-xxl"`,
        `image_encoder="ViT-H-14/laion2b_s32b_b79k"`, `text_to_image="PixArt-alpha/PixArt-XL-2-1024-MS"`); None leaves
        an optional one out. Raises ReducioError for a folder, file or setting that does not fit, and names it.

        `compile` True runs the repeated blocks of both stages through torch.compile: the first clip of each size then
        waits for a compiler, later ones are faster. By default nothing does, and on a GPU the fast path replays graphs
        of its kernels; False switches off both.
        """
        validation.resolve_backend(backend)  # before gigabytes are read
        device = devices.resolve_device(device)
        free = dtype is None and torch_dtype is None
        dtype = devices.resolve_dtype(dtype, torch_dtype, device)
        with gc_pause.paused():
            parts = model_folder.read_model(hub.find_model(model), components, dtype, device)
            pipe = cls(**parts, backend=backend, compile=compile)
        pipe._let_fast_path_choose(free)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the folder `from_pretrained` reads, each weight in the dtype it has.

        Components that `text_to_image` shares with this pipeline are written once. An earlier model in that place is
        replaced when all is written; a failure leaves what was there. Raises ReducioError where a component was
        unloaded: the folder would lack it.
        """
        if (active := self.get_active_adapters()) and not self.fused_loras:
            raise ReducioError(
                f"save_pretrained: the adapters {', '.join(active)} are active; fuse_lora() to write them with the "
                "weights, or unload_lora_weights() to leave them out"
            )
        if self.unloaded:
            raise ReducioError(f"save_directory: {', '.join(self.unloaded)} unloaded; the folder would be without")
        parts = {name: getattr(self, name) for name in (*layouts.COMPONENTS, *layouts.SETTINGS)}
        model_folder.write_model(Path(save_directory).expanduser(), parts)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a Reducio model",
    ) -> str:
        """Upload the folder that `save_pretrained` writes to the hub; returns the address of the commit."""
        return hub.push(self.save_pretrained, repo_id, private, token, commit_message)

    def warmup(
        self,
        sizes: Sequence[int | tuple[int, int]] | None = None,
        deadline: float | None = None,
        progress: bool = True,
    ) -> Outcome:
        """Compile, capture and tune now what calls of these sizes would otherwise wait for; returns when it is done.

        sizes: (height, width), or a number for a square; by default the model's own. deadline: seconds; when they have
        passed, the pipeline is usable at once but runs uncompiled, with one line of log. Returns the seconds each size
        took, and which are `left`. Raises ReducioError for sizes that a call would refuse.
        """
        return warm_up(self, sizes, deadline, progress)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 16,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        seed: int | None = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "np",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = True,
        num_videos_per_prompt: int = 1,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        semantic_embeds: Tensor | None = None,
        content_latents: Tensor | None = None,
        content_kwargs: dict[str, Any] | None = None,
    ) -> ReducioOutput | tuple[Any]:
        """Make a clip of a prompt, or of each prompt in a list, or `num_videos_per_prompt` of each.

        prompt: text; longer than the model reads (120 tokens) it is cut with a warning.
        image: the content frame (path, PIL image or array; one for all, or a list or array with one a prompt), scaled
            to cover the clip and cropped. None draws it from the prompt, for each clip anew.
        negative_prompt: what guidance leads away from. None or "" is the model's null text.
        height, width: pixels, multiples of 32. By default the aspect bucket of the image (see `buckets`), without one
            the size the model was made for.
        num_inference_steps: of the second stage.
        guidance_scale: 1 or less switches guidance off.
        seed: clip i takes seed + i; None draws one at random. generator: instead of seeds, one a clip.
        latents: the initial noise [N, 16, T/f, H/32, W/32], without N for a single clip; the seeds still serve the
            first stage.
        output_type: see `ReducioOutput`.
        callback_on_step_end(pipe, step, timestep, tensors): called after each step of the second stage, with a dict of
            the tensors named in `callback_on_step_end_tensor_inputs` (of `_callback_tensor_inputs`). It may return
            {"latents": replacement}, and may set `pipe._interrupt = True`, which ends the call with the latent reached.
        prompt_embeds [N, L, C], prompt_attention_mask [N, L]: the prompt as the DiT reads it, from `encode_prompt` here
            or elsewhere; no text encoder is needed then, and a prompt only serves to draw the content frame. The same
            two words with `negative_` in front. All without N for a single prompt.
        semantic_embeds [N, tokens, C], content_latents [N, 4, H/8, W/8]: the image as the DiT reads it, from
            `encode_image`. The content frame itself is still needed, for decoding: unless output_type is "latent".
        content_kwargs: further words for the text-to-image pipeline, such as {"num_inference_steps": 30,
            "guidance_scale": 7.0, "height": 768, "width": 1344}; by default its own steps and guidance, at the size
            nearest to the clip's shape that it was made for.
        return_dict: False returns the tuple `(frames,)` alone.

        Raises ReducioError before any work for an argument that does not fit, and later where values stop being finite.
        """
        request = self.check_inputs(
            prompt=prompt, image=image, negative_prompt=negative_prompt, height=height, width=width,
            num_frames=num_frames, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed,
            generator=generator, latents=latents, output_type=output_type, callback_on_step_end=callback_on_step_end,
            num_videos_per_prompt=num_videos_per_prompt,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            prompt_embeds=prompt_embeds, prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask, semantic_embeds=semantic_embeds,
            content_latents=content_latents, content_kwargs=content_kwargs,
        )  # fmt: skip
        with self._lock:
            if self._at_work:
                raise ReducioError("callback_on_step_end: called the pipeline that called it, which is not done yet")
            self._at_work, self._request, self._interrupt = True, request, False
            try:
                out = self._make_clips(request, progress)
            finally:
                self._at_work, self._current_timestep = False, None
        return out if return_dict else (out.frames,)

    def check_inputs(
        self,
        *,
        prompt: Any = None,
        image: Any = None,
        negative_prompt: Any = None,
        height: Any = None,
        width: Any = None,
        num_frames: Any = 16,
        num_inference_steps: Any = 20,
        guidance_scale: Any = 4.5,
        seed: Any = 0,
        generator: Any = None,
        latents: Any = None,
        output_type: Any = "np",
        callback_on_step_end: Any = None,
        num_videos_per_prompt: Any = 1,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
        prompt_embeds: Any = None,
        prompt_attention_mask: Any = None,
        negative_prompt_embeds: Any = None,
        negative_prompt_attention_mask: Any = None,
        semantic_embeds: Any = None,
        content_latents: Any = None,
        content_kwargs: Any = None,
    ) -> Request:
        """The words of a call, checked before any work and spread over its clips. Raises ReducioError."""
        config = self.vae.config
        prompts, negatives, many_prompts = validation.check_prompts(prompt, negative_prompt, prompt_embeds)
        images = image_files.read_images(image, len(prompts))
        sizes = [i.shape[:2] for i in images if i is not None]
        own = (self.sample_height, self.sample_width)
        height, width = aspect_buckets.choose_size(height, width, own, sizes, config.spatial_factor)
        per_prompt = validation.check_count("num_videos_per_prompt", num_videos_per_prompt, validation.MAX_VIDEOS)
        validation.check_size(config, height, width, num_frames)
        max_steps = self.scheduler.config.num_train_timesteps
        validation.check_sampling(num_inference_steps, max_steps, guidance_scale, output_type)
        validation.check_callback(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        shape, count = validation.latent_shape(config, height, width), len(prompts) * per_prompt
        is_list = many_prompts or per_prompt > 1
        generators = validation.check_generators(count, seed, generator)
        given = [None] * count if latents is None else validation.check_latents(latents, shape, count, is_list)
        embeds = validation.check_embeds(
            self.transformer.config, self._content_size(height, width), len(prompts), many_prompts, prompt_embeds,
            prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask, semantic_embeds,
            content_latents,
        )  # fmt: skip
        of_prompts = ([x for x in each for _ in range(per_prompt)] for each in (prompts, negatives, images, embeds))
        clips = [ClipRequest(*words) for words in zip(*of_prompts, generators, given, strict=True)]
        request = Request(
            clips, is_list, height, width, shape, num_inference_steps, guidance_scale, output_type,
            callback_on_step_end, tuple(callback_on_step_end_tensor_inputs),
            content_frame.check_words(self.text_to_image, content_kwargs),
        )  # fmt: skip
        self._check_encoders(request)
        return request

    def _fit(self, height: int, width: int) -> None:
        """Choose how a clip of this size is made in the memory that is free. ReducioError where it cannot be."""
        fit = dry_runs.fit(self, height, width)
        if fit.offload and self._offload is None:
            LOG.warning("memory: weights are offloaded to the CPU between stages, all at once do not fit")
            self.enable_model_cpu_offload(device=self.device)
        self._fits[height, width] = fit

    def _tell_of_compiling(self, height: int, width: int) -> None:
        """One line, once a size, where somebody waits for a compiler who could have had a size that others have too."""
        compiles = self._engine is not None and self._engine.regions is not None
        usual = (height, width) == (self.sample_height, self.sample_width) or aspect_buckets.is_bucket(height, width)
        if compiles and not usual and (height, width) not in self._told_of:
            self._told_of.add((height, width))
            LOG.warning("compile: %dx%d is in no bucket, its blocks are compiled for this size alone", height, width)

    def _make_clips(self, request: Request, progress: bool) -> ReducioOutput:
        self._fit(request.height, request.width)
        self._tell_of_compiling(request.height, request.width)
        timings: dict[str, float] = {}
        frames: list[Any] = []
        contents: list[np.ndarray] = []  # empty where nothing needs a content frame
        self._undecoded: list[tuple[Tensor, np.ndarray]] = []  # latents of this call, small enough to keep to its end
        with self._progress_bar(len(request.clips) * request.num_inference_steps, progress) as bar:
            for clip in request.clips:
                frame, made = self._make_clip(clip, request, bar, timings)
                contents += [] if frame is None else [frame]
                frames.append(made)
                if self._interrupt:
                    break
        return ReducioOutput(
            frames=stack(frames) if request.is_list else frames[0],
            content=None if not contents else np.stack(contents) if request.is_list else contents[0],
            seeds=[clip.generator.initial_seed() for clip in request.clips[: len(frames)]],
            fps=self.fps,
            timings=timings,
            output_type=request.output_type,
            is_list=request.is_list,
            interrupted=self._interrupt,
        )

    def _make_clip(
        self, clip: ClipRequest, request: Request, bar: tqdm, timings: dict[str, float]
    ) -> tuple[np.ndarray | None, Any]:
        """One clip's content frame, and its frames or latent in the form asked for."""
        shape, steps = (1, *request.latent_shape), request.num_inference_steps
        # Drawn even where latents are given, and before the first stage draws: so the content frame of a seed is the
        # same with and without latents, and the noise the same with and without an image.
        noise = initial_latent(shape, [clip.generator])
        with self._stage(timings, "content.generate"):
            frame = self._content_frame(clip, request, not bar.disable)
        cond = self._condition(clip, frame, timings)
        uncond = self._without_prompt(cond, clip, timings) if request.guidance_scale > 1 else None
        step_end = StepEnd(self, request, cond, uncond, bar)
        with self._stage(timings, "dit.step"):
            start = noise if clip.latents is None else clip.latents
            latent = self._sample(start, cond, uncond, request.guidance_scale, steps, clip.generator, step_end)
        latent = latent if step_end.replaced is None else step_end.replaced
        if request.output_type == "latent":
            return frame, latent[0]
        assert frame is not None  # _needs_frame
        self._undecoded.append((latent, frame))
        try:
            with self._stage(timings, "vae.decode"):
                return frame, to_output(self._decode(latent, frame, request.output_type), request.output_type)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            seeds = [c.generator.initial_seed() for c in request.clips[: len(self._undecoded)]]
            kept = rescue(self._undecoded, seeds, self.fps)
            raise ReducioError(f"vae.decode: out of memory at {request.height}x{request.width}; {kept}") from error

    @torch.no_grad()
    def decode(self, latents: Tensor, image: Any, output_type: str = "np") -> Any:
        """Frames of motion latents, as `output_type="latent"` returns them, and their content frames (`out.content`).

        latents [16, T/f, H/32, W/32] with one image, or [N, 16, ...] with a list or array of N. Returns what
        `ReducioOutput` calls `frames`. Raises ReducioError for shapes that do not fit and values that are not finite.
        """
        if output_type not in validation.OUTPUT_TYPES[:-1]:
            raise ReducioError(f"output_type: must be one of np, pil, pt, is {output_type!r}")
        is_list = isinstance(latents, Tensor) and latents.ndim == 5
        rows, columns = latents.shape[-2:] if isinstance(latents, Tensor) and latents.ndim in (4, 5) else (1, 1)
        factor, count = self.vae.config.spatial_factor, len(latents) if is_list else 1
        height, width = rows * factor, columns * factor
        clips = validation.check_latents(
            latents, validation.latent_shape(self.vae.config, height, width), count, is_list
        )
        images = image_files.read_images(image, count)
        if images[0] is None:
            raise ReducioError("image: None given; decoding needs the content frame of the clip (out.content)")
        fitted = [image_files.fit_image(i, height, width) for i in images if i is not None]
        with self._lock, self._on_device("vae.decode"):
            decoded = [self._decode(z, i, output_type) for z, i in zip(clips, fitted, strict=True)]
            frames = [to_output(clip, output_type) for clip in decoded]
        return stack(frames) if is_list else frames[0]

    @torch.no_grad()
    def encode_image(
        self, image: Any, height: int | None = None, width: int | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The image side of the condition of one image or a list: semantic_embeds [N, tokens, C] and content_latents
        [N, 4, H/8, W/8] of a clip of that size (by default as in a call); None for an encoder the model does not have.
        """
        images = [read_image(each) for each in (image if isinstance(image, list | tuple) else [image])]
        config, own = self.vae.config, (self.sample_height, self.sample_width)
        sizes = [each.shape[:2] for each in images]
        height, width = aspect_buckets.choose_size(height, width, own, sizes, config.spatial_factor)
        validation.check_size(config, height, width, config.num_frames)
        frames = [image_files.fit_image(each, height, width) for each in images]
        with self._lock, self._on_device("image.encode"):
            pairs = [self._encode_image(frame, Embeds()) for frame in frames]
        semantic, latent = (None if each[0] is None else torch.cat(each) for each in zip(*pairs, strict=True))
        return semantic, latent

    def _progress_bar(self, total: int, progress: bool) -> tqdm:
        silent = not progress or os.environ.get("RANK", "0") != "0"  # of the ranks that torchrun starts, one speaks
        words: dict[str, Any] = {"desc": "dit.step", "disable": silent} | self._progress_bar_config
        return tqdm(total=total, **words)
