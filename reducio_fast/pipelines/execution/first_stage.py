"""content.generate: a picture of a prompt, by the fast twins of PixArt's networks, or by diffusers' pipeline itself.

A PixArt pipeline of diffusers is read as data: its networks, tokenizer and scheduler do what its own call does, with
the transformer and the decoder as twins and the steps in this package's sampler. Every other pipeline draws by itself.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...checkpoints import diffusers_folders
from ...checkpoints.model_folder import Loading
from ...checkpoints.networks import pipeline_networks
from ...checkpoints.strict_files import INDEX
from ...media.image_files import fit_image
from ...reference.reducio.image_vae import ImageVAE, ImageVAEConfig
from ...reference.reducio.pixart import PixArt, PixArtConfig
from ...reference.sampler import StopSampling
from ...system.errors import ReducioError
from .drawing import call_defaults, check_content_kwargs, draw_image, drawing_size, warn_of_scaling
from .executor import Executor
from .schedules import check_scheduler, known, scheduled

PIPELINES = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
# Arguments of a PixArt pipeline's call that are followed here; with any other it draws by itself.
FOLLOWED = (
    "num_inference_steps",
    "guidance_scale",
    "height",
    "width",
    "clean_caption",
    "use_resolution_binning",
    "max_sequence_length",
    "timesteps",
)
Text = tuple[Tensor, Tensor]  # features [1, L, C] and mask [1, L]


@dataclass(slots=True)
class Parts:
    """A PixArt-alpha first stage of this package's own networks, for which no library is imported. Its call has the
    arguments and defaults of diffusers' pipeline."""

    transformer: PixArt
    vae: ImageVAE
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    call_defaults: dict[str, Any] = field(default_factory=dict)  # see `drawing.own_defaults`

    @property
    def components(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "call_defaults"}

    @property
    def vae_scale_factor(self) -> int:
        return self.vae.config.spatial_factor

    def __call__(
        self,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        height: int | None = None,
        width: int | None = None,
        clean_caption: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int = 120,
        timesteps: list[int] | None = None,
    ) -> None:
        raise ReducioError("text_to_image: drawn by `FirstStage` alone")


def load_text_to_image(loading: Loading) -> Any:
    """The diffusers pipeline of the model's folder, or the one that the caller named. Raises ReducioError for one whose
    steps are taken here and whose scheduler cannot step, and for defaults that its call does not take."""
    folder = loading.folder
    if loading.source is not None:
        folder = diffusers_folders.find_text_to_image(loading.source)
    shared = loading.layout.shared(loading.parts)
    pipeline = diffusers_folders.load_text_to_image(folder, shared, loading.dtype, loading.device, loading.loaded)
    if type(pipeline).__name__ in PIPELINES:
        check_scheduler(pipeline.scheduler, folder / "scheduler")
    try:
        check_content_kwargs(pipeline, pipeline.call_defaults)
    except ReducioError as error:
        raise ReducioError(f"{folder / INDEX}: _call_defaults: {error}") from error
    return pipeline


class FirstStage:
    """Draws content frames by a diffusers text-to-image pipeline, `pipeline()`, or its twins.

    clean_caption: PixArt's cleaning.
    """

    def __init__(
        self,
        pipeline: Callable[[], Any],
        executor: Executor,
        clean_caption: Callable[[str], str] | None = None,
    ) -> None:
        self.pipeline, self.executor, self.clean_caption = pipeline, executor, clean_caption

    @property
    def line(self) -> str:
        """For the report: which implementation draws, and why."""
        try:
            self._networks()
        except ReducioError as error:
            return f"{'reference' if isinstance(self.pipeline(), Parts) else 'diffusers'}: {error}"
        return "fast: its transformer and decoder run as twins"

    def twins(self) -> tuple[Any, Any]:
        """Twins of the transformer and of the autoencoder. Raises ReducioError, with the reason, if diffusers draws."""
        transformer, vae = self._networks()
        return self.executor.twin(transformer), self.executor.twin(vae)

    def _networks(self) -> tuple[Any, Any]:
        pipeline = self.pipeline()
        if (why := self.obstacle()) is not None:
            raise ReducioError(why)
        return self._adopted("transformer", pipeline.transformer), self._adopted("vae", pipeline.vae)

    def obstacle(self) -> str | None:
        """The reason why diffusers draws, as far as it is known without reading the networks; else None."""
        pipeline = self.pipeline()
        if self.executor.engine.name != "fast":
            return "the networks run on the reference"
        if isinstance(pipeline, Parts):
            return None
        if type(pipeline).__name__ not in PIPELINES or not type(pipeline).__module__.startswith("diffusers."):
            return f"a {type(pipeline).__name__} draws by itself; twins are for {' and '.join(PIPELINES)}"
        if self.executor.offload is not None or any(hasattr(n, "_hf_hook") for n in pipeline_networks(pipeline)):
            return "weights are offloaded"
        if pipeline.tokenizer is None or pipeline.text_encoder is None:
            return "no text encoder is loaded"
        vae = pipeline.vae
        if getattr(vae, "use_tiling", False) or getattr(vae, "use_slicing", False):
            return "the autoencoder decodes in tiles or slices"
        return None

    def _adopted(self, name: str, theirs: nn.Module) -> Any:
        from ...fast.twins import missing_twin
        from .foreign_networks import Adoption

        classes = {
            "transformer": ("PixArtTransformer2DModel", PixArt, PixArtConfig),
            "vae": ("AutoencoderKL", ImageVAE, ImageVAEConfig),
        }
        if type(theirs) in (PixArt, ImageVAE):
            if (why := missing_twin(theirs)) is not None:
                raise ReducioError(f"{name} {why}")
            return theirs
        if type(theirs).__name__ != classes[name][0]:
            raise ReducioError(f"{name} is a {type(theirs).__name__}, its twin is built from {classes[name][0]}")
        adoption = self.executor.adoptions.get(name)
        if adoption is None or adoption.theirs is not theirs:
            adoption = self.executor.adoptions[name] = Adoption(theirs, *classes[name])
        try:
            return adoption.network()
        except ReducioError as error:
            raise ReducioError(f"{name} {error}") from error

    def with_steps(self, steps: int | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's arguments, with `steps` quadratic steps added if it can follow them and `kwargs` has none."""
        pipeline = self.pipeline()
        given = {"num_inference_steps", "timesteps", "sigmas"} & kwargs.keys()
        if steps is None or given or not isinstance(pipeline, Parts) and type(pipeline).__name__ not in PIPELINES:
            return kwargs
        scheduler = getattr(pipeline, "scheduler", None)  # None where a call is checked without a model's weights
        if scheduler is None or "quadratic" not in known(scheduler):
            return kwargs
        _, timesteps = scheduled(scheduler, "quadratic", steps)  # the scheduler keeps its own solver order
        return kwargs | {"num_inference_steps": steps, "timesteps": timesteps}

    def draw(
        self,
        prompt: str,
        negative_prompt: str,
        height: int,
        width: int,
        generator: torch.Generator,
        progress: bool,
        kwargs: dict[str, Any] | None = None,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> np.ndarray:
        """The picture, uint8 [height, width, 3]: see `drawing.draw_image`, whose arguments these are."""
        pipeline = self.pipeline()
        given = (pipeline, prompt, negative_prompt, height, width, generator, progress, kwargs, on_step)
        try:
            networks = self.twins()
            asked = self.arguments(kwargs or {}, height, width)
        except ReducioError:
            if not isinstance(pipeline, Parts):
                for network in pipeline_networks(pipeline):  # at each call: it may be another one now, or have a LoRA
                    self.executor.engine.adopt("content.block", network)
                return draw_image(*given)
            networks = pipeline.transformer, pipeline.vae  # no library draws here, so they run as they are
            asked = self.arguments(kwargs or {}, height, width)
        warn_of_scaling(pipeline, asked["height"], asked["width"], height, width)
        image = self.pixels(networks, prompt, negative_prompt, generator, asked, progress, on_step)
        if not bool(torch.isfinite(image).all()):
            raise ReducioError(
                f"content frame of {prompt!r}: the text-to-image stage returned values that are not finite"
            )
        values = image[0].permute(1, 2, 0).float().cpu().numpy()
        return fit_image((values * 255).round().astype(np.uint8), height, width)

    def arguments(self, kwargs: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        """The arguments of the drawing. Raises ReducioError for those that only diffusers' own call can follow."""
        pipeline = self.pipeline()
        defaults, _ = call_defaults(pipeline)
        drawn_height, drawn_width = drawing_size(pipeline, height, width)
        asked: dict[str, Any] = {name: defaults.get(name) for name in FOLLOWED}
        asked |= {"height": drawn_height, "width": drawn_width, "clean_caption": False, "use_resolution_binning": False}
        asked |= kwargs
        cell = getattr(pipeline, "vae_scale_factor", 8) * getattr(pipeline.transformer.config, "patch_size", 2)
        timesteps = asked["timesteps"]
        whole_steps = isinstance(timesteps, list | tuple) and timesteps and all(isinstance(t, int) for t in timesteps)
        followed = (
            asked.keys() <= set(FOLLOWED)
            and all(isinstance(asked[n], int) and asked[n] > 0 and not asked[n] % cell for n in ("height", "width"))
            and isinstance(asked["num_inference_steps"], int)
            and asked["num_inference_steps"] > 1
            and isinstance(asked["guidance_scale"], numbers.Real)
            and isinstance(asked["max_sequence_length"], int)
            and asked["max_sequence_length"] > 0
            and not asked["use_resolution_binning"]
            and (timesteps is None or (whole_steps and "quadratic" in known(pipeline.scheduler)))
        )
        if not followed:
            raise ReducioError("these arguments are for diffusers' own call")
        return asked

    def pixels(
        self,
        networks: tuple[Any, Any],
        prompt: str,
        negative_prompt: str,
        generator: torch.Generator,
        asked: dict[str, Any],
        progress: bool = False,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Tensor:
        """The picture as [1, 3, height, width] from 0 to 1, at the size that it is drawn at."""
        (transformer, vae), pipeline = networks, self.pipeline()
        guidance = float(asked["guidance_scale"])
        steps = asked["num_inference_steps"] if asked["timesteps"] is None else len(asked["timesteps"])
        length, cleans = asked["max_sequence_length"], asked["clean_caption"]
        text, mask = self._encode(pipeline, prompt, length, cleans)
        negative = self._encode(pipeline, negative_prompt, length, cleans) if guidance > 1 else None
        device, factor = text.device, pipeline.vae_scale_factor
        shape = (1, transformer.sizes.latent_channels, asked["height"] // factor, asked["width"] // factor)
        # Drawn in the dtype of the text, as in diffusers: in half precision the same seed draws other numbers.
        noise = torch.randn(shape, generator=generator, device=generator.device, dtype=text.dtype).float().to(device)
        size = torch.tensor([[float(asked["height"]), float(asked["width"])]], device=device)
        denoise = transformer.denoiser(text, mask, negative, guidance, size)
        with tqdm(total=steps, desc="content.generate", leave=False, disable=not progress) as bar:
            latent = self._sample(denoise, pipeline.scheduler, noise[:, :, None], steps, generator, asked, bar, on_step)
        image = vae.decode(latent[:, :, 0] / pipeline.vae.config.scaling_factor)
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def _sample(
        self,
        denoise: Any,
        scheduler: Any,
        noise: Tensor,
        steps: int,
        generator: torch.Generator,
        asked: dict[str, Any],
        bar: Any,
        on_step: Callable[[int], None],
    ) -> Tensor:
        stopped: list[StopSampling] = []

        def callback(step: int, timestep: Tensor, latent: Tensor) -> bool:
            bar.update()
            try:
                on_step(step)
            except StopSampling as stop:  # the sampler would take it for the end of a finished picture
                stopped.append(stop)
                return False
            return True

        timesteps: Sequence[int] | None = asked["timesteps"]
        try:
            latent = self.executor.sample(denoise, scheduler, noise, steps, callback, generator, timesteps=timesteps)
        except (ValueError, ZeroDivisionError) as error:
            raise ReducioError(f"content frame: {error}") from error
        if stopped:
            raise stopped[0]
        return latent

    def _encode(self, pipeline: Any, prompt: str, length: int, cleans: bool) -> Text:
        """Features [1, L, C] and mask [1, L] of a caption, as PixArt's encoder reads it."""
        if cleans and self.clean_caption is not None:
            caption = self.clean_caption(prompt)
        else:
            caption = prompt.lower().strip()
        encoder = pipeline.text_encoder
        kwargs = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = pipeline.tokenizer([caption], add_special_tokens=True, **kwargs)
        device = next(encoder.parameters()).device
        mask = tokens.attention_mask.to(device)
        return encoder(tokens.input_ids.to(device), attention_mask=mask)[0], mask
