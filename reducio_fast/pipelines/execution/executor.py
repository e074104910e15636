"""The stages of a clip, one method each: what a loaded model computes, below the words in which it is asked.

text.encode and image.encode make the joint condition of the DiT, dit.step the motion latent, vae.decode the frames.
`Stages` holds the components, checks that they fit each other, and picks per network what runs it.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...checkpoints import layouts
from ...checkpoints.networks import pipeline_networks
from ...media import image_files
from ...memory.dry_run import weight_bytes
from ...memory.offload import Offload
from ...reference import Condition, ReducioDiT, ReducioVAE, sample
from ...reference.sampler import Callback
from ...system.errors import ReducioError, is_out_of_memory
from ...system.stage_clock import annotate, clock
from ..call import validation
from ..call.request import ClipRequest, Embeds, Request
from ..reducio import content_frame, dry_runs
from ..reducio.encoders import ContentEncoder, SemanticEncoder, TextEncoder, clean_caption

LOG = logging.getLogger("reducio_fast")

VAE_FACTOR = 8  # of the SD autoencoder, for content latents that are given to a model without one
UNLOADABLE = ("text_encoder", "image_encoder", "content_encoder", "text_to_image")


class Stages:
    """The components of a model and the computations between them. Each takes and gives tensors of one clip."""

    def __init__(
        self,
        vae: ReducioVAE,
        transformer: ReducioDiT,
        scheduler: Any,
        text_encoder: nn.Module | None,
        tokenizer: Any,
        image_encoder: SemanticEncoder | Callable[[Tensor], Tensor] | None,
        content_encoder: nn.Module | None,
        text_to_image: Any,
        backend: str,
        clean_caption: bool = False,
        content_scaling_factor: float = 1.0,
        compile: bool | None = None,
    ) -> None:
        required = backend == "fast"
        self.backend, self._why = validation.resolve_backend(backend)
        validation.check_compile(compile, self.backend, self._why)
        self.report = {name: f"{self.backend}: {self._why}" for name in ("transformer", "vae")}
        self.vae, self.transformer, self.scheduler = vae, transformer, scheduler
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.image_encoder, self.content_encoder, self.text_to_image = image_encoder, content_encoder, text_to_image
        self.vae_tiling: bool | None = None  # None: by the size of the clip
        self.clean_caption, self.content_scaling_factor = clean_caption, content_scaling_factor
        # Networks, scheduler and fast twins are shared between calls: a second thread waits for the first one's clips.
        self._lock = threading.RLock()
        self._unloaded: set[str] = set()
        self._engine: Any = None
        self._offload: Offload | None = None
        self._placed_twins: Any = None  # while a stage's weights are away from home
        self._fits: dict[tuple[int, int], dry_runs.Fit] = {}  # what the last call for a size was decoded with
        self._forecasts: dict[tuple[Any, ...], dry_runs.Forecast] = {}
        self._check_components()
        if self.backend == "fast":
            self._start_engine(required, compile)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def execution_device(self) -> torch.device:
        """Where the stages run; `device` is where the weights are between them."""
        return self.device if self._offload is None else self._offload.device

    @property
    def offloading(self) -> bool:
        return self._offload is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | list[str], negative_prompt: str | list[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The text side of the condition, once for many calls or for another process.

        Returns, as in diffusers' PixArt pipelines, prompt_embeds [N, L, C], prompt_attention_mask [N, L] and the two of
        the negative prompt (None without one): the words of a call, which gives the same bytes with them as without.
        """
        prompts, negatives, _ = validation.check_prompts(prompt, negative_prompt)
        self._check_text_encoder()
        with self._lock, self._on_device("text.encode"):
            pairs = [self._encode_text(text) for text in prompts]  # one by one: a text's bytes depend on no other
            against = [self._encode_text(text) if text.strip() else None for text in negatives]
        embeds, masks = (torch.cat(each) for each in zip(*pairs, strict=True))
        if not any(text.strip() for text in negatives):
            return embeds, masks, None, None
        null = self.transformer.null_text[None].to(embeds)
        found = [(null, own[1]) if pair is None else pair for pair, own in zip(against, pairs, strict=True)]
        negative_embeds, negative_masks = (torch.cat(each) for each in zip(*found, strict=True))
        return embeds, masks, negative_embeds, negative_masks

    def unload(self, *names: str) -> None:
        """Let go of text_encoder, image_encoder, content_encoder or text_to_image, and of the memory they hold.

        Calls then need what it computed: embeds, or an image. Assigning the attribute brings it back. Raises
        ReducioError for another name, and for a network that `text_to_image` shares and that stays for it.
        """
        if unknown := [name for name in names if name not in UNLOADABLE]:
            raise ReducioError(f"unload: {unknown[0]!r} given; must be of {', '.join(UNLOADABLE)}")
        if self.text_to_image is not None and "text_to_image" not in names:
            kept = {id(network) for network in pipeline_networks(self.text_to_image)}
            for name in names:
                if id(getattr(self, name)) in kept:
                    raise ReducioError(f"unload: text_to_image uses the {name} too; unload both or neither")
        with self._lock:  # not under a clip that another thread is making
            for name in names:
                if getattr(self, name) is not None:
                    setattr(self, name, None)
                    self._unloaded.add(name)
        gc.collect()  # networks hold cycles, which would keep their memory until some later collection
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def unloaded(self) -> list[str]:
        """What `unload` took and nobody gave back."""
        return sorted(name for name in self._unloaded if getattr(self, name) is None)

    def _content_frame(self, clip: ClipRequest, request: Request, progress: bool) -> np.ndarray | None:
        """uint8 [H, W, 3] of the clip's size; None where nothing reads it."""
        if clip.image is not None:
            return image_files.fit_image(clip.image, request.height, request.width)
        if not self._needs_frame(clip, request):
            return None
        words = {"clean_caption": self.clean_caption} | request.content_kwargs
        return self._draw(
            clip.prompt, clip.negative_prompt, request.height, request.width, clip.generator, progress, words
        )

    def _draw(self, *words: Any) -> np.ndarray:
        """`content.draw_image` with this pipeline's first stage, which may be another, or wear a LoRA, since last."""
        if self._engine is not None:
            for network in pipeline_networks(self.text_to_image):
                self._engine.adopt("content.block", network)
        return content_frame.draw_image(self.text_to_image, *words)

    def _condition(self, clip: ClipRequest, frame: np.ndarray | None, timings: dict[str, float]) -> Condition:
        with self._stage(timings, "text.encode"):
            text, mask = self._here(*(clip.embeds.text or self._encode_text(clip.prompt)))
        with self._stage(timings, "image.encode"):
            semantic, latent = self._encode_image(frame, clip.embeds)
        return Condition(text, mask, semantic, latent)

    def _without_prompt(self, cond: Condition, clip: ClipRequest, timings: dict[str, float]) -> Condition:
        """The half guidance leads away from. The image stays in both halves: guidance is about the text alone."""
        if clip.embeds.negative_text is not None:
            text, mask = self._here(*clip.embeds.negative_text)
        elif not clip.negative_prompt.strip():
            return cond.without_text(self.transformer.null_text)
        else:
            with self._stage(timings, "text.encode"):
                text, mask = self._here(*self._encode_text(clip.negative_prompt))
        return Condition(text, mask, cond.semantic, cond.content)

    def _encode_text(self, prompt: str) -> tuple[Tensor, Tensor]:
        assert self.text_encoder is not None  # check_inputs has asked for embeds otherwise
        length = self.transformer.config.caption_length
        return TextEncoder(self.text_encoder, self.tokenizer, length, self.clean_caption)([prompt])

    def _encode_image(self, frame: np.ndarray | None, given: Embeds) -> tuple[Tensor | None, Tensor | None]:
        """The tokens and the latent of a content frame, but what is given; the encoders get float32 pixels."""
        pixels = None if frame is None else self._pixels(frame, torch.float32)
        semantic, latent = given.semantic, given.content
        if semantic is None and self.image_encoder is not None:
            assert pixels is not None  # _needs_frame
            semantic = self.image_encoder(pixels)
        if latent is None and self.content_encoder is not None:
            assert pixels is not None
            latent = ContentEncoder(self.content_encoder, self.content_scaling_factor)(pixels)
        return self._here(semantic, latent)

    def _here(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        return tuple(None if tensor is None else tensor.to(self.execution_device) for tensor in tensors)

    def _content_size(self, height: int, width: int) -> tuple[int, int]:
        """Of the content latent of a frame."""
        factor = VAE_FACTOR if self.content_encoder is None else ContentEncoder(self.content_encoder).factor
        return height // factor, width // factor

    def _needs_frame(self, clip: ClipRequest, request: Request) -> bool:
        """Whether anything reads the content frame: the decoder, or an encoder whose result is not given."""
        semantic = clip.embeds.semantic is None and self.image_encoder is not None
        latent = clip.embeds.content is None and self.content_encoder is not None
        return semantic or latent or request.output_type != "latent"

    def _check_encoders(self, request: Request) -> None:
        """Refuse a call that needs an encoder or a first stage that is not there."""
        for clip in request.clips:
            for name, given in (("image_encoder", clip.embeds.semantic), ("content_encoder", clip.embeds.content)):
                if given is None and name in self.unloaded:
                    word = "semantic_embeds" if name == "image_encoder" else "content_latents"
                    raise ReducioError(f"{word}: None given, and the {name} was unloaded")
            if clip.image is None and self._needs_frame(clip, request):
                if self.text_to_image is None:
                    raise ReducioError("image: None given, and this model has no text-to-image stage to draw one")
                if not clip.prompt:
                    raise ReducioError("image: None given, and without a prompt there is nothing to draw one from")
            texts = [] if clip.embeds.text is not None else [clip.prompt]
            if clip.embeds.negative_text is None and clip.negative_prompt.strip() and request.guidance_scale > 1:
                texts.append(clip.negative_prompt)
            if texts:
                self._check_text_encoder()
            for text in texts:
                if self.clean_caption and not clean_caption(text):
                    raise ReducioError(
                        f"prompt: nothing is left of {text!r} after caption cleaning; set pipe.clean_caption = False"
                    )

    def _check_text_encoder(self) -> None:
        if self.text_encoder is None or self.tokenizer is None:
            raise ReducioError(
                "prompt_embeds: None given, and no text_encoder is loaded; give the embeds with their attention mask, "
                "or load one: from_pretrained(..., text_encoder=FOLDER_OR_HUB_ID)"
            )

    def _sample(
        self,
        noise: Tensor,
        cond: Condition,
        uncond: Condition | None,
        guidance_scale: float,
        steps: int,
        generator: torch.Generator,
        step_end: Callback,
    ) -> Tensor:
        """noise [1, 16, T/f, H/32, W/32] on any device -> the motion latent, float32, of the last step taken."""
        # The latent stays float32 whatever the networks run in: twenty updates in bfloat16 lose what they add.
        noise = noise.to(self.execution_device)
        words = (noise, cond, uncond, guidance_scale, steps, step_end)
        try:
            if self._engine is None:
                return sample(self.transformer, self.scheduler, *words, generator)
            from ...fast.sampler import sample as fast_sample

            return fast_sample(self._twins().transformer, self.scheduler, *words)
        except ReducioError:
            raise
        except ValueError as error:
            if error is getattr(step_end, "error", None):
                raise
            raise ReducioError(f"sampling: {error}") from error

    def _decode(self, latent: Tensor, frame: np.ndarray, output_type: str = "pt") -> Tensor:
        """[1, 16, T/f, H/32, W/32] and the content frame -> float32 [3, T, H, W] in [-1, 1].

        Where bytes are wanted ("np", "pil") the fast path makes them itself: uint8 [T, H, W, 3].
        Out of memory, it is tried again in ways that need less; the error is raised where none is left.
        """
        chosen = self._fits.get(frame.shape[:2]) or dry_runs.Fit(dry_runs.default_decoding(self, *frame.shape[:2]))
        failure: BaseException | None = None
        for decoding in dry_runs.attempts(self, chosen.decoding):
            if failure is not None:
                LOG.warning("vae.decode: out of memory, trying again %s", decoding)
            try:
                return self._decode_as(latent, frame, decoding, output_type)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # its frames hold the tensors that there is no room for
            if self.execution_device.type == "cuda":
                torch.cuda.empty_cache()
        assert failure is not None
        raise failure

    def _decode_as(
        self, latent: Tensor, frame: np.ndarray, decoding: dry_runs.Decoding, output_type: str = "pt"
    ) -> Tensor:
        vae = dry_runs.as_chosen(self.vae if self._engine is None else self._twins().vae, decoding)
        dtype = self.dtype if self._engine is None else vae.dtype
        features = vae.encode_content(self._pixels(frame, dtype), tiled=decoding.tiled)
        latent = latent.to(self.execution_device, dtype)
        if self._engine is not None and output_type != "pt":
            try:
                return vae.decode(latent, features, tiled=decoding.tiled, as_uint8=True)[0]
            except ValueError as error:
                raise ReducioError(f"vae.decode: {error}") from error
        video = vae.decode(latent, features, tiled=decoding.tiled)[0].float()
        if not torch.isfinite(video).all():
            raise ReducioError("vae.decode: the clip has values that are not finite (NaN or infinite)")
        return video.clamp(-1, 1)

    def _pixels(self, frame: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """uint8 [H, W, 3] -> [1, 3, H, W] in [-1, 1], by default in the networks' dtype."""
        pixels = torch.from_numpy(frame).to(self.execution_device).permute(2, 0, 1)[None].float()
        return (pixels / 127.5 - 1).to(dtype or self.dtype)

    def _let_fast_path_choose(self, free: bool) -> None:
        """Whether the twins may take the dtype that suits this machine; what is not a twin keeps its own."""
        if self._engine is None:
            return
        from ...fast.plan import default_dtype

        self._engine.own_dtype = free
        dtype, why = default_dtype(self.execution_device, self.dtype) if free else (self.dtype, "asked for")
        line = f"fast: {self._why}; in {str(dtype).removeprefix('torch.')}: {why}"
        self.report = dict.fromkeys(self.report, line)

    def _start_engine(self, required: bool, compile: bool | None) -> None:
        """Fast twins for both networks; where one cannot have one, an error if `required`, else the reference."""
        from ...compile import cache
        from ...fast.engine import Engine
        from ...fast.solver_tables import coefficients
        from ...triton_kernels.tables import add_tables, arch_of

        obstacle = None
        for name, kind in (("transformer", ReducioDiT), ("vae", ReducioVAE)):
            if type(getattr(self, name)) is not kind:
                obstacle = (
                    f"{name} is a {type(getattr(self, name)).__name__}, fast twins are built from {kind.__name__}"
                )
        try:
            coefficients(self.scheduler, 2)
        except ValueError as error:
            obstacle = f"scheduler: {error}"
        if obstacle is None:
            origin = cache.Origin.here(arch_of(self.device))
            cache.use(origin)
            add_tables(cache.folder("tables", origin))
            self._engine = Engine(compile, store=cache.folder("regions", origin))
        elif required:
            raise ReducioError(f"backend: 'fast' cannot run this model: {obstacle}")
        else:
            self.backend = "reference"
            self.report = dict.fromkeys(self.report, f"reference: {obstacle}")

    @contextmanager
    def _stage(self, timings: dict[str, float], name: str) -> Iterator[None]:
        start = self._clock()
        with annotate(name):
            with self._on_device(name):
                yield
            end = self._clock()
        timings[name] = timings.get(name, 0.0) + end - start

    def _clock(self) -> float:
        return clock(self.execution_device)

    def forecast(self, height: int, width: int, decoding: dry_runs.Decoding | None = None) -> dry_runs.Forecast:
        """Bytes that a clip of this size will need, stage by stage. See `memory.forecast`."""
        decoding = dry_runs.default_decoding(self, height, width) if decoding is None else decoding
        same = (height, width, self.vae_tiling, self.execution_device, self.dtype, self._engine is None)
        key = (*same, decoding)
        if key not in self._forecasts:
            earlier = next((f for known, f in self._forecasts.items() if known[:-1] == same), None)
            self._forecasts[key] = dry_runs.forecast(self, height, width, decoding, earlier)
        return self._forecasts[key]

    def resident_bytes(self) -> int:
        """Of all weights that are on the device now, and would have to be counted again otherwise."""
        if self.device != self.execution_device:
            return 0
        return weight_bytes(*self._networks(), *([] if self._engine is None else self._engine.packed()))

    def describe(self) -> dict[str, Any]:
        """What runs this pipeline, as plain data: `backend` and, of the fast path, the implementation picked for each
        module and why (`plan`), what became of every graph (`graphs`) and which blocks are compiled (`regions`)."""
        return {"backend": self.backend} | ({} if self._engine is None else self._engine.describe())

    def _twins(self) -> Any:
        """The fast twins; asked for where the weights are at home, since their place is what the engine knows."""
        if self._placed_twins is not None:
            return self._placed_twins
        return self._engine.twins(self.transformer, self.vae, self.execution_device)

    def _stage_networks(self, stage: str) -> list[nn.Module]:
        """What has to be on the device while a stage runs, packed weights of the fast twins included."""
        twins = None if self._engine is None else self._twins()
        chosen: dict[str, list[Any]] = {
            "content.generate": [] if self.text_to_image is None else pipeline_networks(self.text_to_image),
            "text.encode": [self.text_encoder],
            "image.encode": [self.image_encoder, self.content_encoder],
            "dit.step": [self.transformer, None if twins is None else twins.transformer],
            "vae.decode": [self.vae, None if twins is None else twins.vae],
        }
        return [network for network in chosen.get(stage, []) if isinstance(network, nn.Module)]

    @contextmanager
    def _on_device(self, stage: str) -> Iterator[None]:
        """Under offloading, the stage's networks are on the device inside, and at home again afterwards."""
        if self._offload is None:
            yield
            return
        networks = self._stage_networks(stage)
        self._placed_twins = None if self._engine is None else self._twins()
        try:
            with self._offload.placed(*networks):
                yield
        finally:
            self._placed_twins = None

    def _networks(self) -> list[nn.Module]:
        own = [c for c in (getattr(self, name) for name in layouts.COMPONENTS) if isinstance(c, nn.Module)]
        return own + ([] if self.text_to_image is None else pipeline_networks(self.text_to_image))

    def _check_components(self) -> None:
        """Refuse networks that cannot work together: told now, not by a shape error in the middle of a clip."""
        config = self.transformer.config
        text_channels = getattr(getattr(self.text_encoder, "config", None), "hidden_size", config.caption_channels)
        tower = getattr(self.image_encoder, "visual", None)
        semantic_channels = config.semantic_channels if tower is None else tower.ln_post.normalized_shape[0]
        content_config = getattr(self.content_encoder, "config", None)
        for name, needed, source, given in (
            ("latent_channels", config.latent_channels, "vae", self.vae.config.latent_channels),
            ("caption_channels", config.caption_channels, "text_encoder", text_channels),
            ("semantic_channels", config.semantic_channels, "image_encoder", semantic_channels),
            (
                "content_channels",
                config.content_channels,
                "content_encoder",
                getattr(content_config, "latent_channels", config.content_channels),
            ),
        ):
            if needed != given:
                raise ReducioError(f"transformer has {name}={needed}, {source} gives {given}")
