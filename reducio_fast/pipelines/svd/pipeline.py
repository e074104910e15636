"""An image -> a clip that starts with it: Stable Video Diffusion (arXiv 2311.15127) behind diffusers' own call.

Clips are made one after the other, each from its own generator: the picture's noise first, then the latent's, as
diffusers draws them.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...checkpoints import hub, model_folder
from ...checkpoints.layouts import SVD
from ...checkpoints.model_folder import Loaders
from ...checkpoints.strict_files import SVD_TINY, embedded_model
from ...media import image_files
from ...memory.dry_run import DryRun
from ...reference import initial_latent
from ...reference.svd import config as published
from ...reference.svd.sampler import EndConditions, align_your_steps
from ...reference.svd.unet import VideoUNet
from ...reference.svd.vae import FrameVAE, TemporalVAE
from ...system import devices, torch_state
from ...system.errors import ReducioError, check_word
from ...system.paths import expanded
from ..call import steering, validation
from ..call.chain import MAX_FRAMES, svd_joint
from ..call.output import ReducioOutput, stack, to_output
from ..call.request import ClipRequest, Embeds, SamplingInputs
from ..call.state import CallState, Stage
from ..execution.components import Components
from ..execution.drawing import check_content_kwargs
from ..execution.executor import Executor
from ..execution.first_stage import FirstStage
from ..execution.loading import loading
from ..execution.sampling import Sampler
from ..execution.schedules import check_sigmas
from ..video_pipeline import VideoPipeline
from .component_table import LOADERS, check_components, check_norms, check_settings
from .conditioner import ImageConditioner
from .decoder import ClipDecoder
from .dry_runs import DryStages
from .from_diffusers import networks_of
from .request import SVDArguments, SVDRequest, last_images

LOG = logging.getLogger("reducio_fast")

FILES = ("model_index.json", "*/*.json", "*/*.txt")
TRAINED_FPS, TRAINED_MOTION = (5, 30), (1, 255)
ALIGN_YOUR_STEPS = "align-your-steps"
IMAGE_FITS = ("stretch", "crop")


class SVDPipeline(VideoPipeline):
    """A loaded model: its `unet`, `vae`, `scheduler`, `image_encoder`, `feature_extractor`, as diffusers names them.

    text_to_image: any diffusers text-to-image pipeline; with it a call may give a prompt instead of an image.
    `report` says, per network, what runs it and why. Threads may share a pipeline: their calls take turns.
    """

    layout = SVD
    loaders: ClassVar[Loaders] = LOADERS
    decoder_class: ClassVar[type[ClipDecoder]] = ClipDecoder
    configs: ClassVar[dict[str, Any]] = {"vae": published.TemporalVAEConfig, "unet": published.VideoUNetConfig}
    _callback_tensor_inputs = ("latents", "frames")
    sample_height: int
    sample_width: int

    def __init__(
        self,
        vae: TemporalVAE | FrameVAE,
        unet: VideoUNet,
        scheduler: Any,
        image_encoder: Any,
        feature_extractor: Any,
        text_to_image: Any = None,
        sample_height: int = published.HEIGHT,
        sample_width: int = published.WIDTH,
        *,
        backend: str = "auto",
        compile: bool | None = None,
    ) -> None:
        """sample_height, sample_width: a clip's size in pixels if a call names none."""
        parts = Components(self.layout, locals())
        check_components(parts)
        self._assemble(parts, Executor(parts, backend, compile))

    @property
    def usual_size(self) -> tuple[int, int]:
        return self.sample_height, self.sample_width

    def _assemble(self, parts: Components, executor: Any) -> None:
        check_settings(parts)
        super().__init__(
            parts,
            executor,
            content=FirstStage(lambda: parts["text_to_image"], executor),
            conditioner=ImageConditioner(parts, executor),
            sampler=Sampler(parts, executor),
            decoder=self.decoder_class(parts, executor),
        )

    def _dry_stages(self, dry: DryRun) -> DryStages:
        return DryStages(self.parts, self.executor, self.decoder, dry)

    @classmethod
    @torch_state.inference()
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
        compile: bool | None = None,
        **components: Any,
    ) -> SVDPipeline:
        """Load a diffusers folder of a `StableVideoDiffusionPipeline`, or a hub repository `owner/name`, strictly.

        `variant` "fp16" reads the half-precision files. `dtype`, `device`, `backend`, `compile` and `components` are as
        in `ReducioPipeline.from_pretrained`; `text_to_image` may be a folder or hub id. Raises ReducioError for a
        folder, file or component that does not fit, and names it; for a gated repository it names the page and the
        login command.
        """
        validation.resolve_backend(backend)
        device = devices.resolve_device(device)
        free_dtype = dtype is None and torch_dtype is None
        dtype = devices.resolve_dtype(dtype, torch_dtype, device)
        folder = cls.find_folder(model, variant)
        with loading():
            parts = model_folder.read_model(folder, components, cls.layout, cls.loaders, dtype, device, variant)
            pipe = cls(**parts, backend=backend, compile=compile)
        pipe.executor.choose_dtype(free_dtype)
        pipe.parts.source = None if "vae" in components else hub.lasting_name(folder)
        return pipe

    @staticmethod
    def find_folder(model: str | os.PathLike[str], variant: str | None = None) -> Path:
        """The folder of `model`: a folder itself, the embedded one by its name, or the local copy of a hub repository,
        which is fetched with one variant of its weights."""
        if str(model) == SVD_TINY:
            return embedded_model(SVD_TINY)
        end = "" if variant is None else f".{variant}"
        files = (*FILES, f"*/*{end}.safetensors", f"*/*{end}-*.safetensors")  # whole, or shards
        return hub.find_model(model, files=files, ignored=("*/*.fp16.*", "*/*.fp16-*") if variant is None else ())

    @classmethod
    def from_diffusers(cls, pipeline: Any, backend: str = "auto", compile: bool | None = None) -> SVDPipeline:
        """A pipeline on the weights of a loaded `StableVideoDiffusionPipeline`, which it shares."""
        return cls(**networks_of(pipeline), backend=backend, compile=compile)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the folder that `from_pretrained` and diffusers' own read, each weight in its own dtype. Raises
        ReducioError for adapters that are active but not fused, and if a component was unloaded."""
        self.adapters.check_saving()
        self.parts.check_saving()
        target = expanded(save_directory, "save_directory")
        sizes = {name: self.parts[name] for name in self.layout.settings}
        usual = {"sample_height": published.HEIGHT, "sample_width": published.WIDTH}
        model_folder.write_model(target, self.parts.as_dict() | ({} if sizes == usual else sizes), self.layout)

    @torch_state.inference()
    def __call__(
        self,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = published.NUM_INFERENCE_STEPS,
        sigmas: Sequence[float] | str | None = None,
        min_guidance_scale: float = published.MIN_GUIDANCE_SCALE,
        max_guidance_scale: float = published.MAX_GUIDANCE_SCALE,
        fps: int = published.FPS,
        motion_bucket_id: int = published.MOTION_BUCKET_ID,
        noise_aug_strength: float = published.NOISE_AUG_STRENGTH,
        decode_chunk_size: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        *,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float | None = None,
        seed: int | None = 0,
        progress: bool = True,
        image_fit: str = "stretch",
        content_kwargs: dict[str, Any] | None = None,
        last_image: Any = None,
        overlap: int | None = None,
        match_colours: bool = False,
        loop: bool = False,
        preview_every: int | None = None,
    ) -> ReducioOutput | tuple[Any]:
        """Make a clip of an image, or of each image in a list, or `num_videos_per_prompt` of each.

        image: path, PIL image or array; the clip's first frame. None draws it from `prompt`, if the model has a
            `text_to_image`.
        height, width: pixels, multiples of 8. The published weights were made for 576x1024.
        num_frames: by default what the weights were made for, 14 or 25.
        num_inference_steps, sigmas: the schedule; `sigmas` has one value more than there are steps and ends with 0. The
            name "align-your-steps" is that paper's schedule, made for 10 steps.
        min_guidance_scale, max_guidance_scale: of the first and the last frame, linear between; a maximum of 1 or less
            switches guidance off and halves the work. guidance_scale: another name of the maximum.
        fps: frames per second of the clip; the network's input is fps - 1, as in its training.
        motion_bucket_id: amount of motion, 1 to 255. noise_aug_strength: amount of noise on the picture; with more, the
            clip departs further from it.
        decode_chunk_size: None decodes all frames together. A number decodes this many at once, independently of the
            others, as diffusers does: less memory, and seams between the chunks.
        generator: one per clip; or seed: clip i takes seed + i. It draws the picture's noise, then the latent's.
        latents: the initial noise [N, T, 4, H/8, W/8], without N for a single clip.
        output_type, callback_on_step_end, return_dict: as in `ReducioPipeline`.
        overlap: None samples `num_frames` at once. A number makes them from clips of the model's length. Each clip
            begins with this many frames of the clip before it: their latents are held, and the others are sampled.
        match_colours, loop, preview_every: as in `ReducioPipeline`.
        image_fit: "stretch" squeezes the picture into the clip's shape, as diffusers does; "crop" cuts it.
        last_image: the picture that the clip ends with: one, or one per image. Each step then costs twice as much
            (arXiv 2403.14611); with `overlap`, each step of the last part.

        Raises ReducioError before any work for an argument that does not fit.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        out = self.run(self.check_inputs(**arguments))
        return out if return_dict else (out.frames,)

    def _prepare(self, request: SVDRequest) -> None:
        if (self.decoder.frames, self.decoder.chunk) != (request.num_frames, request.decode_chunk_size):
            self.decoder.frames, self.decoder.chunk = request.num_frames, request.decode_chunk_size
            self.fitter.fits.clear()

    def check_inputs(self, **arguments: Any) -> SVDRequest:
        """Check the arguments of a call, before any work, and spread them over its clips. Arguments that are left out
        have the call's defaults. Raises ReducioError."""
        call = inspect.signature(self.__call__).bind(**arguments)
        call.apply_defaults()
        if self.executor is not None:  # a component may have been replaced
            check_components(self.parts)
        return self._request(SVDArguments(**call.arguments))

    def _request(self, inputs: SVDArguments) -> SVDRequest:
        prompts, negatives, images, is_list = self._pictures(inputs)
        height, width = (
            usual if side is None else side
            for side, usual in zip((inputs.height, inputs.width), self.usual_size, strict=True)
        )
        factor = self.vae.config.spatial_factor
        validation.check_size(self.vae.config, height, width)
        trained = self.unet.config.num_frames
        asked = trained if inputs.num_frames is None else inputs.num_frames
        total = validation.check_count("num_frames", asked, MAX_FRAMES)
        frames = total if inputs.overlap is None else trained
        steps, sigmas = inputs.num_inference_steps, inputs.sigmas
        if isinstance(sigmas, str) and sigmas != ALIGN_YOUR_STEPS:
            raise ReducioError(f"sigmas: {sigmas!r} is no schedule; known is {ALIGN_YOUR_STEPS}, or a list")
        if sigmas is not None and not isinstance(sigmas, str):
            validation.check_sigmas(sigmas)
            steps = len(sigmas) - 1
        max_steps = self.scheduler.config.num_train_timesteps
        max_scale = inputs.max_guidance_scale if inputs.guidance_scale is None else inputs.guidance_scale
        least, most = (
            validation.check_sampling(steps, max_steps, scale, inputs.output_type)
            for scale in (inputs.min_guidance_scale, max_scale)
        )
        if isinstance(sigmas, str):
            sigmas = align_your_steps(int(steps))
        if sigmas is not None:
            check_sigmas(self.scheduler, [float(sigma) for sigma in sigmas])
        ids = ("fps", "motion_bucket_id", "noise_aug_strength")
        fps, motion_bucket_id, noise_aug_strength = (validation.check_number(n, getattr(inputs, n)) for n in ids)
        if fps == 0:
            raise ReducioError("fps: must be above 0, is 0")
        chunk = inputs.decode_chunk_size
        if chunk is not None:
            validation.check_count("decode_chunk_size", chunk)
        check_word("image_fit", inputs.image_fit, IMAGE_FITS)
        names = inputs.callback_on_step_end_tensor_inputs
        validation.check_callback(inputs.callback_on_step_end, names, self._callback_tensor_inputs)
        per_image = validation.check_count("num_videos_per_prompt", inputs.num_videos_per_prompt, validation.MAX_VIDEOS)
        count, is_list = len(images) * per_image, is_list or per_image > 1
        generators = validation.check_generators(count, inputs.seed, inputs.generator)
        shape = (frames, self.vae.config.latent_channels, height // factor, width // factor)
        check_norms(self.parts, frames, *shape[2:])
        latents: Sequence[Tensor | None] = [None] * count
        if inputs.latents is not None:
            latents = validation.check_latents(inputs.latents, shape, count, is_list)
        joint = None if inputs.overlap is None else svd_joint(trained, inputs.overlap)
        steered = steering.check_steering(inputs, joint, total, "forward", self.scheduler, self.executor)
        self._warn(inputs, frames, trained)
        embeds = [Embeds()] * len(images)
        per_clip = ([x for x in each for _ in range(per_image)] for each in (prompts, negatives, images, embeds))
        last = [x for x in last_images(inputs.last_image, len(images)) for _ in range(per_image)]
        unset = [None] * count  # `motion` and `hold`
        return SVDRequest(
            clips=[ClipRequest(*clip) for clip in zip(*per_clip, generators, latents, unset, unset, last, strict=True)],
            is_list=is_list,
            height=height,
            width=width,
            latent_shape=shape,
            num_inference_steps=steps,
            guidance_scale=most,
            output_type=inputs.output_type,
            fps=fps,
            callback_on_step_end=inputs.callback_on_step_end,
            callback_tensor_inputs=tuple(names),
            content_kwargs=check_content_kwargs(self.text_to_image, inputs.content_kwargs),
            progress=inputs.progress,
            # As in diffusers, the last frame's scale switches guidance on or off.
            guidance_per_frame=torch.linspace(least, most, frames) if most > 1 else torch.ones(frames),
            sigmas=None if sigmas is None else [float(sigma) for sigma in sigmas],
            num_frames=frames,
            # The weights were trained on the number of frames that follow the first one within a second.
            time_ids=torch.tensor([fps - 1, motion_bucket_id, noise_aug_strength], dtype=torch.float64),
            noise_aug_strength=noise_aug_strength,
            decode_chunk_size=chunk,
            crops=inputs.image_fit == "crop",
            **steered,
        )

    def _pictures(self, inputs: SVDArguments) -> tuple[list[str], list[str], list[np.ndarray | None], bool]:
        """Prompts, negative prompts and pictures of one length, and whether a list was given."""
        if inputs.image is None:
            if self.text_to_image is None:
                wanted = "text_to_image=FOLDER_OR_HUB_ID loads a model that draws one from the prompt"
                raise ReducioError(f"image: None given; Stable Video Diffusion animates an image ({wanted})")
            prompts, negatives, is_list = validation.check_prompts(inputs.prompt, inputs.negative_prompt)
            return prompts, negatives, [None] * len(prompts), is_list
        if inputs.prompt or inputs.negative_prompt:
            raise ReducioError("prompt: Stable Video Diffusion reads no text; give an image or a prompt, not both")
        is_list = isinstance(inputs.image, list | tuple) or getattr(inputs.image, "ndim", 0) == 4
        count = len(inputs.image) if is_list else 1
        if count == 0:
            raise ReducioError("image: the list is empty")
        return [""] * count, [""] * count, image_files.read_images(inputs.image, count), is_list

    @staticmethod
    def _warn(inputs: SVDArguments, frames: int, trained: int) -> None:
        """Warn of values that run but that the weights were not trained on."""
        if frames != trained:
            LOG.warning("num_frames: %d, these weights were made for %d", frames, trained)
        for name, value, (low, high) in (
            ("fps", inputs.fps, TRAINED_FPS),
            ("motion_bucket_id", inputs.motion_bucket_id, TRAINED_MOTION),
        ):
            if not low <= value <= high:
                LOG.warning("%s: %g, SVD was trained on %d to %d", name, value, low, high)

    def _sampling_inputs(self, clip: Any, call: CallState, stage: Stage) -> SamplingInputs:
        request: Any = call.request
        if (picture := clip.image) is None:
            with stage(call.timings, "content.generate"):
                size = request.height, request.width
                texts, shown = (clip.prompt, clip.negative_prompt), not call.progress.disable
                given = (clip.generator, shown, request.content_kwargs, call.content_step)
                picture = self.content.draw(*texts, *size, *given)
        ends = [picture] if clip.last_image is None else [picture, clip.last_image]
        noises = [initial_latent((1, 3, request.height, request.width), [clip.generator]) for _ in ends]
        with stage(call.timings, "image.encode"):
            conditions = [self.conditioner(*end, request) for end in zip(ends, noises, strict=True)]
        cond: Any = conditions[0] if len(conditions) == 1 else EndConditions(*conditions)
        # Drawn in the weights' dtype, because half-precision draws differ from float32 ones; kept in float32.
        start = _noise(request.latent_shape, clip.generator, conditions[0].embeds.dtype)
        return SamplingInputs(self.conditioner.fit(picture, request), start, cond)

    @torch_state.inference()
    def decode(
        self, latents: Tensor, image: Any = None, output_type: str = "np", decode_chunk_size: int | None = None
    ) -> Any:
        """Frames of latents as `output_type="latent"` returns them: [T, 4, H/8, W/8], or with N in front. `image` is
        not read: SVD's decoder needs none."""
        check_word("output_type", output_type, validation.OUTPUT_TYPES[:-1])
        if decode_chunk_size is not None:
            validation.check_count("decode_chunk_size", decode_chunk_size)
        is_list = isinstance(latents, Tensor) and latents.ndim == 5
        shape = (None, self.vae.config.latent_channels, None, None)
        clips = validation.check_tensor(latents, shape, len(latents) if is_list else 1, is_list, "latents")
        with self.executor.exclusive(), self.executor.placed("vae.decode"):
            self.decoder.chunk = decode_chunk_size
            frames = []
            for clip in clips:
                self.decoder.frames = clip.shape[1]
                frames.append(to_output(self.decoder(clip.float(), None, output_type), output_type))
        return stack(frames) if is_list else frames[0]


def _noise(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn((1, *shape), generator=generator, device=generator.device, dtype=dtype).float()
