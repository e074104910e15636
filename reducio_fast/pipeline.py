"""Prompt -> content frame -> motion latent -> frames: the two stages of Reducio (arXiv 2411.13552) behind one call.

The words of the call are those of diffusers' image-to-video pipelines. Clips are made one after the other, each from
its own generator, so that a clip's bytes do not depend on the list its prompt stood in.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checkpoints, content, folders, inputs
from .encoders import ContentEncoder, SemanticEncoder, TextEncoder
from .errors import ReducioError
from .output import ReducioOutput, stack, to_output
from .reference import Condition, ReducioDiT, ReducioVAE, initial_latent, sample
from .reference.sampler import StopSampling
from .video import read_image

CACHED_PIPELINES = 2  # kept by `generate`: enough to compare two models; at full size a third would fill most hosts

StepCallback = Callable[["ReducioPipeline", int, Tensor, dict[str, Tensor]], "dict[str, Tensor] | None"]


class ReducioPipeline:
    """The loaded model. Each component can be any object with the same call (the small ones are in `encoders`).

    `text_to_image` may be None (then each call needs an image), and so may `image_encoder` and `content_encoder` (the
    DiT is then not told about that side of the image). `report` says, per network, what runs it and why.
    """

    def __init__(
        self,
        vae: ReducioVAE,
        transformer: ReducioDiT,
        scheduler: Any,
        text_encoder: nn.Module,
        tokenizer: Any,
        image_encoder: SemanticEncoder | Callable[[Tensor], Tensor] | None = None,
        content_encoder: nn.Module | None = None,
        text_to_image: Any = None,
        *,
        fps: float = 16,
        sample_height: int = 256,
        sample_width: int = 256,
        backend: str = "auto",
    ) -> None:
        required = backend == "fast"
        self.backend, why = inputs.resolve_backend(backend)
        self.report = {name: f"{self.backend}: {why}" for name in ("transformer", "vae")}
        self.vae, self.transformer, self.scheduler = vae, transformer, scheduler
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.image_encoder, self.content_encoder, self.text_to_image = image_encoder, content_encoder, text_to_image
        self.fps, self.sample_height, self.sample_width = fps, sample_height, sample_width
        self._interrupt = False
        self._progress_bar_config: dict[str, Any] = {}
        self._engine: Any = None
        self._check_components()
        if self.backend == "fast":
            self._start_engine(required)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
        **components: Any,
    ) -> ReducioPipeline:
        """Load a model folder, or a hub repository `owner/name`, in the diffusers layout (safetensors only).

        `device` None is a GPU where there is one; `dtype` None is float32 on a CPU and bfloat16 on a GPU; `torch_dtype`
        is the older word for `dtype`. Further words replace components by name; None leaves an optional one out. Raises
        ReducioError for a folder, file or setting that does not fit, and names it.
        """
        inputs.resolve_backend(backend)  # before gigabytes are read
        device = inputs.resolve_device(device)
        dtype = inputs.resolve_dtype(dtype, torch_dtype, device)
        parts = folders.read_model(checkpoints.find_model(model), components, dtype, device)
        return cls(**parts, backend=backend)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the folder `from_pretrained` reads, each weight in the dtype it has.

        Components that `text_to_image` shares with this pipeline are written once. An earlier model in that place is
        replaced when all is written; a failure leaves what was there.
        """
        parts = {name: getattr(self, name) for name in (*folders.COMPONENTS, *folders.SETTINGS)}
        folders.write_model(Path(save_directory).expanduser(), parts)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> ReducioPipeline:
        """Move and cast every network in place; returns self."""
        target = self.device if device is None else inputs.resolve_device(device)
        kind = self.dtype if dtype is None else inputs.resolve_dtype(dtype, None, target)
        for network in self._networks():
            checkpoints.cast(network, target, kind)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def interrupt(self) -> bool:
        """Whether the call was asked to end; a callback asks by `pipe._interrupt = True`, as in diffusers."""
        return self._interrupt

    def set_progress_bar_config(self, **words: Any) -> None:
        """Words for tqdm, kept for later calls: `set_progress_bar_config(disable=True)`."""
        self._progress_bar_config = words

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
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
    ) -> ReducioOutput:
        """Make one clip of a prompt, or one of each prompt in a list.

        prompt: text; longer than the model reads (120 tokens) it is cut with a warning.
        image: the content frame (path, PIL image or array; one for all, or a list or array with one a prompt), scaled
            to cover the clip and cropped. None draws it from the prompt.
        negative_prompt: what guidance leads away from. None or "" is the model's null text.
        height, width: pixels, multiples of 32; by default the size the model was made for.
        num_inference_steps: of the second stage.
        guidance_scale: 1 or less switches guidance off.
        seed: clip i takes seed + i; None draws one at random. generator: instead of seeds, one a clip.
        latents: the initial noise [N, 16, T/f, H/32, W/32], without N for a single prompt; the seeds still serve the
            first stage.
        output_type: see `ReducioOutput`.
        callback_on_step_end(pipe, step, timestep, {"latents": [1, 16, ...]}): called after each step of the second
            stage. It may return {"latents": replacement}, and may set `pipe._interrupt = True`, which ends the call
            with the latent reached.

        Raises ReducioError before any work for an argument that does not fit, and later where values stop being finite.
        """
        is_list = not isinstance(prompt, str)
        height = self.sample_height if height is None else height
        width = self.sample_width if width is None else width
        prompts, negatives = inputs.check_prompts(prompt, negative_prompt)
        inputs.check_size(self.vae.config, height, width, num_frames)
        max_steps = self.scheduler.config.num_train_timesteps
        inputs.check_sampling(num_inference_steps, max_steps, guidance_scale, output_type, callback_on_step_end)
        shape, count = inputs.latent_shape(self.vae.config, height, width), len(prompts)
        generators = inputs.check_generators(count, seed, generator)
        given = None if latents is None else inputs.check_latents(latents, shape, count, is_list)
        images = self._read_images(image, count)
        if image is None and self.text_to_image is None:
            raise ReducioError("image: None given, and this model has no text-to-image stage to draw one")

        self._interrupt = False
        timings: dict[str, float] = {}
        frames, contents = [], []
        with self._progress_bar(count * num_inference_steps, progress) as bar:
            for i in range(count):
                # Drawn even where latents are given, and before the first stage draws: so the content frame of a seed
                # is the same with and without latents, and the noise the same with and without an image.
                noise = initial_latent((1, *shape), [generators[i]])
                with self._stage(timings, "content.generate"):
                    if images[i] is not None:
                        frame = content.fit_image(images[i], height, width)
                    else:
                        frame = content.draw_image(
                            self.text_to_image, prompts[i], negatives[i], height, width, generators[i], progress
                        )
                cond = self._condition(prompts[i], frame, timings)
                uncond = self._without_prompt(cond, negatives[i], timings) if guidance_scale > 1 else None
                step_end = _StepEnd(self, callback_on_step_end, bar, (1, *shape))
                with self._stage(timings, "dit.step"):
                    latent = self._sample(
                        noise if given is None else given[i],
                        cond, uncond, guidance_scale, num_inference_steps, generators[i], step_end,
                    )  # fmt: skip
                contents.append(frame)
                if output_type == "latent":
                    frames.append(latent[0])
                else:
                    with self._stage(timings, "vae.decode"):
                        frames.append(to_output(self._decode(latent, frame), output_type))
                if self._interrupt:
                    break
        return ReducioOutput(
            frames=stack(frames) if is_list else frames[0],
            content=np.stack(contents) if is_list else contents[0],
            seeds=[g.initial_seed() for g in generators[: len(frames)]],
            fps=self.fps,
            timings=timings,
            output_type=output_type,
            is_list=is_list,
            interrupted=self._interrupt,
        )

    @torch.no_grad()
    def decode(self, latents: Tensor, image: Any, output_type: str = "np") -> Any:
        """Frames of motion latents, as `output_type="latent"` returns them, and their content frames (`out.content`).

        latents [16, T/f, H/32, W/32] with one image, or [N, 16, ...] with a list or array of N. Returns what
        `ReducioOutput` calls `frames`. Raises ReducioError for shapes that do not fit and values that are not finite.
        """
        if output_type not in inputs.OUTPUT_TYPES[:-1]:
            raise ReducioError(f"output_type: must be one of np, pil, pt, is {output_type!r}")
        is_list = isinstance(latents, Tensor) and latents.ndim == 5
        rows, columns = latents.shape[-2:] if isinstance(latents, Tensor) and latents.ndim in (4, 5) else (1, 1)
        factor, count = self.vae.config.spatial_factor, len(latents) if is_list else 1
        height, width = rows * factor, columns * factor
        clips = inputs.check_latents(latents, inputs.latent_shape(self.vae.config, height, width), count, is_list)
        images = self._read_images(image, count)
        if images[0] is None:
            raise ReducioError("image: None given; decoding needs the content frame of the clip (out.content)")
        fitted = [content.fit_image(i, height, width) for i in images if i is not None]
        frames = [to_output(self._decode(z, i), output_type) for z, i in zip(clips, fitted, strict=True)]
        return stack(frames) if is_list else frames[0]

    # ---- the stages -------------------------------------------------------------------------------------------------

    def _read_images(self, image: Any, count: int) -> list[np.ndarray | None]:
        if image is None:
            return [None] * count
        if isinstance(image, np.ndarray) and image.ndim == 4:
            image = list(image)  # `out.content` of a list, given back
        if not isinstance(image, list | tuple):
            return [read_image(image)] * count
        if len(image) != count:
            raise ReducioError(f"image: {len(image)} given for {count} prompts; give one for all or one a prompt")
        return [read_image(each) for each in image]

    def _condition(self, prompt: str, frame: np.ndarray, timings: dict[str, float]) -> Condition:
        with self._stage(timings, "text.encode"):
            text, mask = self._encode_text(prompt)
        with self._stage(timings, "image.encode"):
            pixels = self._pixels(frame)
            semantic = None if self.image_encoder is None else self.image_encoder(pixels)
            latent = None if self.content_encoder is None else ContentEncoder(self.content_encoder)(pixels)
        return Condition(text, mask, semantic, latent)

    def _without_prompt(self, cond: Condition, negative_prompt: str, timings: dict[str, float]) -> Condition:
        """The half guidance leads away from. The image stays in both halves: guidance is about the text alone."""
        if not negative_prompt.strip():
            return cond.without_text(self.transformer.null_text)
        with self._stage(timings, "text.encode"):
            text, mask = self._encode_text(negative_prompt)
        return Condition(text, mask, cond.semantic, cond.content)

    def _encode_text(self, prompt: str) -> tuple[Tensor, Tensor]:
        length = self.transformer.config.caption_length
        return TextEncoder(self.text_encoder, self.tokenizer, length)([prompt])

    def _sample(
        self,
        noise: Tensor,
        cond: Condition,
        uncond: Condition | None,
        guidance_scale: float,
        steps: int,
        generator: torch.Generator,
        step_end: _StepEnd,
    ) -> Tensor:
        # The latent stays float32 whatever the networks run in: twenty updates in bfloat16 lose what they add.
        noise = noise.to(self.device)
        words = (noise, cond, uncond, guidance_scale, steps, step_end)
        try:
            if self._engine is None:
                latent = sample(self.transformer, self.scheduler, *words, generator)
            else:
                from .fast.sampler import sample as fast_sample

                twins = self._engine.twins(self.transformer, self.vae)
                latent = fast_sample(twins.transformer, self.scheduler, *words)
        except ReducioError:
            raise
        except ValueError as error:
            raise ReducioError(f"sampling: {error}") from error
        return latent if step_end.replaced is None else step_end.replaced

    def _decode(self, latent: Tensor, frame: np.ndarray) -> Tensor:
        """[1, 16, T/f, H/32, W/32] and the content frame -> float32 [3, T, H, W] in [-1, 1]."""
        config = self.vae.config
        tiled = max(frame.shape[:2]) > config.tile_size * (1 + config.tile_overlap)
        vae = self.vae if self._engine is None else self._engine.twins(self.transformer, self.vae).vae
        features = vae.encode_content(self._pixels(frame), tiled=tiled)
        video = vae.decode(latent.to(self.device, self.dtype), features, tiled=tiled)[0].float()
        if not torch.isfinite(video).all():
            raise ReducioError("vae.decode: the clip has values that are not finite (NaN or infinite)")
        return video.clamp(-1, 1)

    def _pixels(self, frame: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> [1, 3, H, W] in [-1, 1], in the networks' dtype."""
        pixels = torch.from_numpy(frame).to(self.device).permute(2, 0, 1)[None].float()
        return (pixels / 127.5 - 1).to(self.dtype)

    def _start_engine(self, required: bool) -> None:
        """Fast twins for both networks; where one cannot have one, an error if `required`, else the reference."""
        from .fast.engine import Engine
        from .fast.sampler import coefficients

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
            self._engine = Engine()
        elif required:
            raise ReducioError(f"backend: 'fast' cannot run this model: {obstacle}")
        else:
            self.backend = "reference"
            self.report = dict.fromkeys(self.report, f"reference: {obstacle}")

    # ---- bookkeeping ------------------------------------------------------------------------------------------------

    @contextmanager
    def _stage(self, timings: dict[str, float], name: str) -> Iterator[None]:
        start = self._clock()
        yield
        timings[name] = timings.get(name, 0.0) + self._clock() - start

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels run on after their launch returns
        return time.perf_counter()

    def _progress_bar(self, total: int, progress: bool) -> tqdm:
        return tqdm(total=total, **({"desc": "dit.step", "disable": not progress} | self._progress_bar_config))

    def _networks(self) -> list[nn.Module]:
        own = [c for c in (getattr(self, name) for name in folders.COMPONENTS) if isinstance(c, nn.Module)]
        return own + ([] if self.text_to_image is None else content.networks(self.text_to_image))

    def _check_components(self) -> None:
        """Refuse networks that cannot work together: told now, not by a shape error in the middle of a clip."""
        config = self.transformer.config
        text_channels = getattr(getattr(self.text_encoder, "config", None), "hidden_size", config.caption_channels)
        tower = getattr(self.image_encoder, "visual", None)
        semantic_channels = config.semantic_channels if tower is None else tower.ln_post.normalized_shape[0]
        for name, needed, source, given in (
            ("latent_channels", config.latent_channels, "vae", self.vae.config.latent_channels),
            ("caption_channels", config.caption_channels, "text_encoder", text_channels),
            ("semantic_channels", config.semantic_channels, "image_encoder", semantic_channels),
        ):
            if needed != given:
                raise ReducioError(f"transformer has {name}={needed}, {source} gives {given}")


class _StepEnd:
    """The sampler's callback: moves the progress bar, runs the user's, and ends the loop where that asks for it."""

    def __init__(self, pipe: ReducioPipeline, callback: StepCallback | None, bar: tqdm, shape: tuple[int, ...]) -> None:
        self.pipe, self.callback, self.bar, self.shape = pipe, callback, bar, shape
        self.replaced: Tensor | None = None  # a replacement that came together with the request to stop

    def __call__(self, step: int, timestep: Tensor, latent: Tensor) -> Tensor | None:
        self.bar.update()
        if self.callback is None:
            return None
        answer = self.callback(self.pipe, step, timestep, {"latents": latent}) or {}
        new = answer.get("latents", latent)
        if new is not latent:
            new = inputs.check_latents(new, self.shape[1:], 1, True, "callback_on_step_end: latents")[0].to(latent)
        if self.pipe.interrupt:
            self.replaced = new
            raise StopSampling
        return None if new is latent else new


def generate(
    prompt: str | list[str],
    image: Any = None,
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    **words: Any,
) -> ReducioOutput:
    """Make a clip in one line: `generate("a red circle moving right on a black background").save("clip.mp4")`.

    `model` is a folder or hub id, None the small model inside the package, which knows coloured shapes that move. The
    loaded model is kept, so a second call starts at once. All other words are those of `ReducioPipeline.__call__`.
    """
    device = inputs.resolve_device(device)
    dtype = inputs.resolve_dtype(dtype, None, device)
    folder = embedded_model() if model is None else checkpoints.find_model(model)
    pipe = _cached_pipeline(folder.resolve(), dtype, device, backend)
    return pipe(prompt, image, **words)


_pipelines: OrderedDict[tuple[Any, ...], ReducioPipeline] = OrderedDict()
_pipelines_lock = threading.Lock()  # two threads that ask for one model shall load it once


def _cached_pipeline(folder: Path, dtype: torch.dtype, device: torch.device, backend: str) -> ReducioPipeline:
    key = (folder, dtype, device, backend)
    with _pipelines_lock:
        if key not in _pipelines:
            while len(_pipelines) >= CACHED_PIPELINES:
                _pipelines.popitem(last=False)
            _pipelines[key] = ReducioPipeline.from_pretrained(folder, dtype=dtype, device=device, backend=backend)
        _pipelines.move_to_end(key)
        return _pipelines[key]


def embedded_model() -> Path:
    folder = Path(str(resources.files("reducio_fast"))) / "models" / "tiny"
    if not (folder / checkpoints.INDEX).is_file():
        raise ReducioError(f"model: none named, and this installation has no embedded one ({folder})")
    return folder
