"""Prompt -> content frame -> motion latent -> frames: the two stages of Reducio (arXiv 2411.13552) behind one call.

The arguments of the call are those of diffusers' image-to-video pipelines. Clips are made one after the other, each
from its own generator, so that a clip's bytes do not depend on the list that its prompt is in.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints import calibration_file, hub, model_folder
from ...checkpoints.layouts import REDUCIO
from ...media import aspect_buckets, image_files
from ...memory.dry_run import DryRun
from ...reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig, initial_latent
from ...reference.reducio.config import GUIDANCE_SCALE, NUM_FRAMES
from ...reference.reducio.preview import PreviewConfig, PreviewDecoder
from ...system import devices, torch_state
from ...system.errors import ReducioError, check_switch, check_word
from ...system.paths import expanded
from ..call import steering, validation
from ..call.output import ReducioOutput, stack, to_output
from ..call.request import Arguments, ClipRequest, Embeds, Request, SamplingInputs
from ..call.state import CallState, Stage
from ..execution.components import Components
from ..execution.decoding import Decoding, TiledDecoder
from ..execution.executor import Executor
from ..execution.loading import loading
from ..execution.sampling import Sampler
from ..parallel import shared
from ..video_pipeline import VideoPipeline
from .component_table import LOADERS, check_components, check_settings
from .conditioner import Conditioner
from .content_frame import ContentFrame
from .dry_runs import DryStages
from .encoders import SemanticEncoder
from .motion import Motion, read_motion
from .request import latents_with_images, request_of

StepCallback = Callable[["ReducioPipeline", int, Tensor, dict[str, Tensor]], "dict[str, Tensor] | None"]


class ReducioPipeline(VideoPipeline):
    """The loaded model. Each component can be any object with the same call (the small ones are in `encoders`).

    `text_to_image` may be None (each call then needs an image), and so may `text_encoder` (a call then needs
    `prompt_embeds`), `image_encoder` and `content_encoder` (the DiT then lacks that condition, unless a call gives
    `semantic_embeds` or `content_latents`). `report` says what runs each network, and why. Threads may share a
    pipeline.

    clean_caption: put prompts through PixArt's caption cleaning, for a model trained on PixArt's captions; the
        published recipe does. content_scaling_factor: multiplies the content latent; 1, as the release extracts it,
        although Stable Diffusion itself has 0.18215. sampling: this model's defaults for a call's `quality` and the
        arguments that it presets: {"quality": "balanced", "cache_threshold": 0.1}.
    """

    layout = REDUCIO
    loaders = LOADERS
    configs = {"vae": VAEConfig, "transformer": DiTConfig, "preview_decoder": PreviewConfig}
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", "frames")

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
        preview_decoder: PreviewDecoder | None = None,
        *,
        fps: float = 16,
        sample_height: int = 256,
        sample_width: int = 256,
        clean_caption: bool = False,
        content_scaling_factor: float = 1.0,
        sampling: dict[str, Any] | None = None,
        backend: str = "auto",
        compile: bool | None = None,
    ) -> None:
        arguments = locals()
        parts = Components(REDUCIO, arguments)
        check_components(parts)
        self._assemble(parts, Executor(parts, backend, compile))

    def _assemble(self, parts: Components, executor: Any) -> None:
        check_settings(parts)
        super().__init__(
            parts,
            executor,
            content=ContentFrame(parts, executor),
            conditioner=Conditioner(parts, executor),
            sampler=Sampler(parts, executor),
            decoder=TiledDecoder(parts, executor),
        )
        self.motion = Motion(parts, executor, self.decoder)

    def _dry_stages(self, dry: DryRun) -> DryStages:
        return DryStages(self.parts, self.executor, self.decoder.tiling, dry)

    @property
    def usual_size(self) -> tuple[int, int]:
        return self.sample_height, self.sample_width

    def _sampling_inputs(self, clip: ClipRequest, call: CallState, stage: Stage) -> SamplingInputs:
        request = call.request
        # The noise is drawn even if latents are given, and before the first stage draws. So a seed's content frame is
        # the same with and without latents, and its noise is the same with and without an image.
        noise = initial_latent((1, *request.latent_shape), [clip.generator])
        with stage(call.timings, "content.generate"):
            arguments = (clip, request, not call.progress.disable, call.content_step)
            frame = shared(self.executor.ranks, self.content, *arguments)
        if clip.motion is not None:
            return SamplingInputs(frame, noise, None)
        cond = self.conditioner(clip, frame, call.timings, request.clip_condition)
        guides = request.guidance_scale > 1
        uncond = self.conditioner.without_prompt(cond, clip, call.timings) if guides else None
        embeds = {"prompt_embeds": cond.text, "negative_prompt_embeds": None if uncond is None else uncond.text}
        negative = None if uncond is None else (uncond.text, uncond.text_mask)
        return SamplingInputs(frame, noise, cond, uncond, embeds, Embeds((cond.text, cond.text_mask), negative))

    def finished(
        self, latent: Tensor, frame: Any, request: Request, output_type: str, decoding: Decoding | None
    ) -> Tensor:
        return self.motion.decode(latent, frame, output_type, decoding, request.motion_strength, request.keep_content)

    @classmethod
    @torch_state.inference()
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
        compile: bool | None = None,
        quantise: str | None = None,
        **components: Any,
    ) -> ReducioPipeline:
        """Load a model folder, or a hub repository `owner/name`, in the diffusers layout (safetensors only).

        `device` None is a GPU if there is one; `dtype` None is bfloat16 on a GPU, and float32 on a CPU, where the fast
        path computes in bfloat16 if the processor multiplies it faster (`report` says so; a named dtype is used
        everywhere). `torch_dtype` is the older name of `dtype`. Further arguments replace components by name: an
        object, or the folder or hub id to load it from (`text_encoder="google/flan-t5-xxl"`,
        `image_encoder="ViT-H-14/laion2b_s32b_b79k"`, `text_to_image="PixArt-alpha/PixArt-XL-2-1024-MS"`); None leaves
        an optional one out. Raises ReducioError for a folder, file or setting that does not fit, and names it.

        `compile` True runs the repeated blocks of both stages through torch.compile: the first clip of each size then
        waits for a compiler, later ones are faster. By default nothing is compiled, and on a GPU the fast path replays
        graphs of its kernels; False switches off both.

        `quantise` "fp8" (on an A100 "int8") computes the decoder's residual blocks in 8-bit numbers, whose ranges
        `reducio-fast calibrate` wrote into the folder. A CPU emulates it.
        """
        validation.resolve_backend(backend)  # before gigabytes are read
        device = devices.resolve_device(device)
        free_dtype = dtype is None and torch_dtype is None
        dtype = devices.resolve_dtype(dtype, torch_dtype, device)
        folder, largest = hub.find_model(model), dict[str, Tensor]()
        if quantise is not None:
            validation.check_quantise(quantise, backend, device)
            if "vae" in components:
                raise ReducioError(f"quantise: {quantise!r} needs the model's own vae, which was calibrated")
            largest = calibration_file.read(folder)
        with loading():
            parts = model_folder.read_model(folder, components, REDUCIO, cls.loaders, dtype, device)
            pipe = cls(**parts, backend=backend, compile=compile)
        pipe.executor.choose_dtype(free_dtype)
        pipe.parts.source = None if "vae" in components else hub.lasting_name(folder)
        pipe.parts.folder = folder.absolute()
        if quantise is not None:
            pipe.executor.quantise(quantise, largest, folder)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the folder that `from_pretrained` reads, each weight in its own dtype.

        Components that `text_to_image` shares with this pipeline are written once. The calibration for `quantise` is
        written too if the vae has the weights that it was made for, in any dtype. An earlier model in that folder is
        replaced once everything is written; a failure leaves it as it was. Raises ReducioError if a component was
        unloaded, because the folder would lack it.
        """
        self.adapters.check_saving()
        self.parts.check_saving()
        names = (*REDUCIO.names, *REDUCIO.settings)
        target = expanded(save_directory, "save_directory")
        model_folder.write_model(target, {name: self.parts[name] for name in names}, REDUCIO, self.parts.folder)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a Reducio model",
    ) -> str:
        """Upload the folder that `save_pretrained` writes to the hub; returns the address of the commit."""
        return hub.push(self.save_pretrained, repo_id, private, token, commit_message)

    @torch_state.inference()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = NUM_FRAMES,
        num_inference_steps: int | None = None,
        guidance_scale: float = GUIDANCE_SCALE,
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
        quality: str | None = None,
        schedule: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_reuse: int | None = None,
        cache_threshold: float | None = None,
        direction: str = "forward",
        match_colours: bool = False,
        motion_strength: float = 1.0,
        motion_score: float | None = None,
        motion_latents: Tensor | None = None,
        keep_content: bool = False,
        loop: bool = False,
        preview_every: int | None = None,
    ) -> ReducioOutput | tuple[Any]:
        """Make a clip of a prompt, or of each prompt in a list, or `num_videos_per_prompt` of each.

        prompt: text. A text longer than the model reads (120 tokens) is cut, with a warning.
        image: the content frame (path, PIL image or array; one for all, or a list or array with one per prompt), scaled
            to cover the clip and cropped. None draws a new one from the prompt for each clip.
        negative_prompt: what guidance leads away from. None or "" is the model's null text.
        height, width: pixels, multiples of 32. By default the size the model was made for; with an image, a square
            model of 256, 512 or 1024 takes the image's aspect bucket (`media.aspect_buckets`).
        num_frames: more than the model's 16 are made of clips that continue each other, each adding 8: see `long_clip`.
        num_inference_steps: steps of the second stage; None is the quality's number, 20 for "exact".
        guidance_scale: 1 or less switches guidance off.
        seed: clip i takes seed + i; None draws one at random. generator: one per clip, instead of seeds.
        latents: the initial noise [N, 16, T/f, H/32, W/32], without N for a single clip; the first stage still uses the
            seeds.
        output_type: see `ReducioOutput`.
        callback_on_step_end(pipe, step, timestep, tensors): called after each step of the second stage, with a dict of
            the tensors named in `callback_on_step_end_tensor_inputs` (of `_callback_tensor_inputs`). It may return
            {"latents": replacement}, and may set `pipe._interrupt = True`, which ends the call with the current latent.
        prompt_embeds [N, L, C], prompt_attention_mask [N, L]: the prompt as the DiT reads it, from `encode_prompt` here
            or elsewhere. The call then needs no text encoder, and a prompt only serves to draw the content frame. The
            names with `negative_` in front are the same for the negative prompt. All are without N for a single prompt.
        semantic_embeds [N, tokens, C], content_latents [N, 4, H/8, W/8]: the image as the DiT reads it, from
            `encode_image`. Decoding still needs the content frame itself, unless output_type is "latent".
        content_kwargs: further arguments for the text-to-image pipeline, such as {"num_inference_steps": 30,
            "guidance_scale": 7.0, "height": 768, "width": 1344}; by default its own steps and guidance, at the size
            nearest to the clip's shape that it was made for.
        return_dict: False returns the tuple `(frames,)` alone.
        quality: "exact" (the default), "balanced" or "draft": presets of the arguments below and of both stages' steps.
            Each can be overridden by its own argument; docs/speed.md has the cost and the loss of the presets.
        schedule: where the steps lie: "own" (as the scheduler says), "quadratic", "lu" or "exponential".
        guidance_interval: shares of the steps between which guidance is on; a step outside of it is half the work.
        guidance_reuse: one of this many guided steps computes both halves of guidance; 1 means every step.
        cache_threshold: above 0, a step skips the blocks after the first one if the first one's output has changed by
            less than this share; only the fast path does so.
        direction: for long clips, "forward" from the content frame, or "both" ways (further clips add 8 and 7 in turn).
        match_colours: give each further clip's content frame the mean and spread of colours of the first one.
        motion_strength: 0 stands still, 1 is the motion as generated, up to 4; above 1 it saturates.
        motion_score: amount of motion, in percent of the short side per half second as `reducio-fast curate` measures
            it, for a model trained with `clip_conditioning`; None leaves it open.
        motion_latents [16, T/f, H/32, W/32]: the motion, from `encode_motion` or another call, for one clip or for all.
            With it nothing is sampled, and a call with an image needs no prompt.
        keep_content: use the content frame's own pixels where nothing moves, not the decoder's; decodes twice.
        loop: play the frames forward and back again, 2T - 2 of them, so that the last one meets the first.
        preview_every: every this many steps the callback's tensors have `frames`, uint8 [T, h, w, 3], of the unfinished
            clip: in half size if the model has a `preview_decoder`, else in full size from its own decoder. Naming
            "frames" in `callback_on_step_end_tensor_inputs` without it adds them in each step.

        Raises ReducioError before any work for an argument that does not fit, and later if a value is not finite.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        request = self.check_inputs(**arguments)
        out = self.run(request)
        return out if return_dict else (out.frames,)

    def check_inputs(self, **arguments: Any) -> Request:
        """Check the arguments of a call, before any work, and spread them over its clips. Arguments that are left out
        have the call's defaults. Raises ReducioError."""
        call = inspect.signature(self.__call__).bind(**arguments)
        call.apply_defaults()
        request = request_of(self, Arguments(**call.arguments))
        self.conditioner.check(request)
        return request

    @torch_state.inference()
    def encode_prompt(
        self, prompt: str | list[str], negative_prompt: str | list[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The text side of the condition, once for many calls or for another process.

        Returns, as in diffusers' PixArt pipelines, prompt_embeds [N, L, C], prompt_attention_mask [N, L] and the two of
        the negative prompt (None without one). A call with these arguments gives the same bytes as with the prompts.
        """
        prompts, negatives, _ = validation.check_prompts(prompt, negative_prompt)
        self.conditioner.check_text_encoder()
        with self.executor.lock, self.executor.placed("text.encode"):
            return self.conditioner.encode_prompts(prompts, negatives)

    @torch_state.inference()
    def decode(
        self,
        latents: Tensor,
        image: Any,
        output_type: str = "np",
        motion_strength: float = 1.0,
        keep_content: bool = False,
    ) -> Any:
        """Frames of motion latents, as `output_type="latent"` returns them, and their content frames (`out.content`).

        latents [16, T/f, H/32, W/32] with one image, or [N, 16, ...] with a list or array of N. Returns what
        `ReducioOutput` calls `frames`. `motion_strength` and `keep_content` are as in a call. Raises ReducioError for
        shapes that do not fit and values that are not finite.
        """
        check_word("output_type", output_type, validation.OUTPUT_TYPES[:-1])
        options = (steering.check_strength(motion_strength), check_switch("keep_content", keep_content))
        pairs = latents_with_images(self.vae.config, latents, image)
        with self.executor.lock, self.executor.placed("vae.decode"):
            self.executor.check()
            fit = self.fitter.fits.get(pairs[0][1].shape[:2])
            way = None if fit is None else fit.decoding
            decoded = [self.motion.decode(z, frame, output_type, way, *options) for z, frame in pairs]
            frames = [to_output(clip, output_type) for clip in decoded]
        return stack(frames) if latents.ndim == 5 else frames[0]

    @torch_state.inference()
    def encode_motion(
        self,
        video: Any,
        height: int | None = None,
        width: int | None = None,
        start: int = 0,
        step: int = 1,
        refine: int = 0,
        progress: bool = False,
    ) -> Tensor:
        """The motion of a clip [16, T/f, H/32, W/32], for `motion_latents` of a call or for `decode`.

        video: a path, uint8 [T, h, w, 3] or a list of pictures, scaled to cover the size and cropped; its frames
        `start`, `start + step` ... are read, as many as the model has. height, width: as in a call. refine: steps that
        move the encoder's latent until its decoded frames are nearest to the clip's; each decodes once or twice,
        forward and backward, in float32 (20 are enough). progress: show them.
        """
        frames = read_motion(video, self.vae.config.num_frames, start, step)
        height, width = self._size(height, width, [frames.shape[1:3]])
        with self.executor.lock, self.executor.placed("vae.decode"):
            return self.motion.encode(image_files.cover_crop(frames, height, width), refine, progress)[0]

    @torch_state.inference()
    def encode_image(
        self, image: Any, height: int | None = None, width: int | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The image side of the condition of one image or a list: semantic_embeds [N, tokens, C] and content_latents
        [N, 4, H/8, W/8] of a clip of that size (by default as in a call); None for an encoder the model does not have.
        """
        images = [image_files.read_image(each) for each in (image if isinstance(image, list | tuple) else [image])]
        if not images:
            raise ReducioError("image: the list is empty")
        height, width = self._size(height, width, [each.shape[:2] for each in images])
        frames = [image_files.fit_image(each, height, width) for each in images]
        with self.executor.lock, self.executor.placed("image.encode"):
            pairs = [self.conditioner.encode_image(frame, Embeds()) for frame in frames]
        semantic, latent = (None if each[0] is None else torch.cat(each) for each in zip(*pairs, strict=True))
        return semantic, latent

    def _size(self, height: Any, width: Any, pictures: Sequence[aspect_buckets.Size]) -> aspect_buckets.Size:
        """The size of a clip of these pictures, as in a call. Raises ReducioError."""
        factor = self.vae.config.spatial_factor
        height, width = aspect_buckets.choose_size(height, width, self.usual_size, pictures, factor)
        validation.check_size(self.vae.config, height, width)
        return height, width
