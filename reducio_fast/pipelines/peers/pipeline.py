"""Peers: other image-to-video models, run through diffusers behind the arguments, seeds and output of our own pipeline.

They are here for the comparison a user would make on one machine: what a second of video, or a megapixel of it, costs.
A peer is named like a model: `svd` (its hub repository), `svd:FOLDER`, a folder whose model_index.json names one of
the pipelines below, or `svd:random` and `svd:random-tiny`: random weights at the published size, or small enough for
any CPU. Speed does not depend on the values of the weights.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...checkpoints import diffusers_folders, hub, strict_files
from ...media import image_files
from ...system import devices
from ...system.errors import ReducioError, first_line
from ...system.paths import expanded, is_file, is_folder
from ...system.real_numbers import to_float
from ...system.stage_clock import clock
from ..call import validation
from ..call.chain import MAX_FRAMES
from ..call.output import ReducioOutput, stack, to_output
from ..execution.drawing import WRONG_ARGUMENT
from .models import PEERS, Peer, build_random, diffusers_class

RANDOM, RANDOM_TINY = "random", "random-tiny"


@dataclass(frozen=True, slots=True)
class Source:
    """A peer and where its weights come from: `weights` is a folder, a hub id, "random" or "random-tiny"."""

    peer: Peer
    weights: str

    @property
    def defaults(self) -> dict[str, Any]:
        """The default values of a call."""
        return self.peer.call | (self.peer.tiny_call if self.weights == RANDOM_TINY else {})


def find(model: Any) -> Source | None:
    """The peer that `model` names, by its name or by a folder's index. None if it names no peer."""
    if not isinstance(model, str | os.PathLike):
        return None
    name, _, weights = str(model).partition(":")
    if name in PEERS and not (weights == "" and is_folder(model, "model")):
        return Source(PEERS[name], weights or PEERS[name].hub_id)
    index = expanded(model, "model") / strict_files.INDEX
    if not is_file(index, "model"):
        return None
    class_name = strict_files.read_json(index).get("_class_name")
    return next((Source(p, str(model)) for p in PEERS.values() if class_name in p.pipelines), None)


class PeerPipeline:
    """A loaded peer. Call it with the arguments of `ReducioPipeline`; it returns the same kind of output."""

    def __init__(self, source: Source, pipeline: Any) -> None:
        self.source, self.pipeline = source, pipeline
        accepted = inspect.signature(type(pipeline).__call__).parameters
        self.reads_text, self.takes_image = "prompt" in accepted, "image" in accepted

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | Source,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> PeerPipeline:
        """Load a peer by a name that `find` knows. Raises ReducioError for anything else, and for broken files."""
        source = model if isinstance(model, Source) else find(model)
        if source is None:
            raise ReducioError(f"model: {str(model)!r} is no peer; known are {', '.join(PEERS)}, or a folder of one")
        device = devices.resolve_device(device)
        dtype = devices.resolve_dtype(dtype, None, device)
        peer = source.peer
        if source.weights in (RANDOM, RANDOM_TINY):
            return cls(source, build_random(peer, source.weights == RANDOM_TINY, dtype, device))
        folder = hub.find_model(source.weights)
        strict_files.check_model_folder(folder)
        class_name = strict_files.read_json(folder / strict_files.INDEX).get("_class_name")
        if class_name not in peer.pipelines:
            raise ReducioError(
                f"{folder / strict_files.INDEX}: is of a {class_name}, {peer.name} takes {', '.join(peer.pipelines)}"
            )
        pipeline = diffusers_folders.load_text_to_image(folder, {}, dtype, device)
        if class_name == "LTXPipeline":
            pipeline = diffusers_class("LTXImageToVideoPipeline")(**pipeline.components)
        return cls(source, pipeline)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        progress: bool = True,
        **peers_own: Any,
    ) -> ReducioOutput:
        """Make one clip, or for a list one clip per prompt (per image where the peer reads no prompt).

        Sizes, frames, steps and guidance default to the published call of the peer (`source.defaults`). The image is
        scaled to cover the clip and cropped. For SVD, `guidance_scale` is that of the last frame; the first frame's
        is 1. Clips are made one after the other, clip i from a CPU generator of seed + i. `timings` has our stages;
        `dit.step` is the whole denoising loop, whichever network runs in it. `callback_on_step_end` is passed on to
        diffusers; setting `pipe._interrupt` ends the loop of LTX-Video and Wan, but diffusers' SVD cannot be stopped.
        `peers_own`: further arguments of the diffusers pipeline's call, such as SVD's `fps`, `motion_bucket_id`,
        `noise_aug_strength`, `decode_chunk_size`, `min_guidance_scale`, `max_guidance_scale`, `sigmas` and `latents`,
        passed on as they are (see `own_arguments`).

        Raises ReducioError before any work for an argument that does not fit.
        """
        defaults = self.source.defaults
        height = defaults["height"] if height is None else height
        width = defaults["width"] if width is None else width
        steps = defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        guidance = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        frames = self._num_frames(num_frames)
        max_steps = self.pipeline.scheduler.config.num_train_timesteps
        guidance = validation.check_sampling(steps, max_steps, guidance, output_type)
        validation.check_callback(callback_on_step_end, ["latents"], ["latents"])
        for name, value in (("height", height), ("width", width)):
            validation.check_multiple(name, value, self.source.peer.size_factor(self.pipeline))
        prompts, negatives, images, is_list = self._check_inputs(prompt, negative_prompt, image)
        generators = validation.check_generators(len(images), seed, generator)

        peer = self.source.peer
        kwargs: dict[str, Any] = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": steps}
        kwargs |= {
            theirs: {"guidance_scale": guidance, "fps": defaults["fps"]}[ours] for ours, theirs in peer.names.items()
        }
        check_own(peer, peers_own)
        kwargs |= peer.extra | peers_own
        fps_name = peer.names.get("fps", "fps")
        fps = kwargs.get(fps_name, defaults["fps"])
        if not 0 < to_float(fps) < math.inf:
            raise ReducioError(f"{fps_name}: must be a positive number, is {fps!r:.60}")
        self.pipeline.set_progress_bar_config(disable=not progress, desc="dit.step")
        timings: dict[str, float] = {}
        clips: list[Any] = []
        fitted: list[np.ndarray] = []
        for text, negative, picture, each in zip(prompts, negatives, images, generators, strict=True):
            if picture is not None:
                fitted.append(image_files.fit_image(picture, height, width))
                kwargs["image"] = Image.fromarray(fitted[-1])
            if self.reads_text:
                kwargs |= {"prompt": text, "negative_prompt": negative}
            clips.append(self._clip(kwargs, each, output_type, callback_on_step_end, timings))
            if getattr(self.pipeline, "interrupt", False):
                break
        return ReducioOutput(
            frames=stack(clips) if is_list else clips[0],
            content=np.stack(fitted) if is_list and fitted else fitted[0] if fitted else None,
            seeds=[g.initial_seed() for g in generators[: len(clips)]],
            fps=fps,
            timings=timings,
            output_type=output_type,
            is_list=is_list,
            interrupted=bool(getattr(self.pipeline, "interrupt", False)),
        )

    def _clip(
        self,
        kwargs: dict[str, Any],
        generator: torch.Generator,
        output_type: str,
        callback: Callable[..., Any] | None,
        timings: dict[str, float],
    ) -> Any:
        peer_output_type = "latent" if output_type == "latent" else "pt"
        raised: list[Exception] = []  # by the caller's callback
        try:
            with _stages(self.pipeline, self.source.peer.denoiser, timings) as step_end:
                video = self.pipeline(
                    **kwargs,
                    generator=generator,
                    output_type=peer_output_type,
                    callback_on_step_end=functools.partial(_step_end, callback, step_end, raised),
                ).frames[0]
        except ReducioError:
            raise
        except WRONG_ARGUMENT as error:  # an argument that diffusers refuses or cannot follow
            if error in raised:
                raise
            raise ReducioError(f"{self.source.peer.name}: {first_line(error)}") from error
        if not torch.isfinite(video).all():
            raise ReducioError("vae.decode: the clip has values that are not finite (NaN or infinite)")
        if peer_output_type == "latent":
            return video
        return to_output(video.float().transpose(0, 1) * 2 - 1, output_type)

    def _check_inputs(
        self, prompt: Any, negative_prompt: Any, image: Any
    ) -> tuple[list[str | None], list[str | None], list[np.ndarray | None], bool]:
        """Prompts, negative prompts and images as lists of one length, and whether the caller gave a list."""
        title = self.source.peer.title
        if not self.reads_text:
            for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
                if value:
                    raise ReducioError(f"{name}: {title} animates an image and reads no text, so leave out {value!r}")
        if not self.takes_image and image is not None:
            raise ReducioError(f"image: {title} makes clips from text alone, so leave the image out")
        if self.takes_image and image is None:
            raise ReducioError(f"image: None given; {title} animates an image")
        if self.reads_text:
            prompts, negatives, is_list = validation.check_prompts(prompt, negative_prompt)
            return [*prompts], [*negatives], image_files.read_images(image, len(prompts)), is_list
        is_list = isinstance(image, list | tuple) or (isinstance(image, np.ndarray) and image.ndim == 4)
        count = len(image) if is_list else 1
        if count == 0:
            raise ReducioError("image: the list is empty")
        return [None] * count, [None] * count, image_files.read_images(image, count), is_list

    def _num_frames(self, asked: Any) -> int:
        """A frame count that fits the VAE: any for SVD, which has no compression in time, else k x factor + 1."""
        if asked is None:
            published = self.source.defaults.get("num_frames")
            return self.pipeline.unet.config.num_frames if published is None else published
        names = ("vae_temporal_compression_ratio", "vae_scale_factor_temporal")  # LTX's, Wan's
        factor: int = next((getattr(self.pipeline, name) for name in names if hasattr(self.pipeline, name)), 1)
        asked = validation.check_count("num_frames", asked, MAX_FRAMES)
        if factor > 1 and asked % factor != 1:
            below = (asked - 1) // factor * factor + 1
            raise ReducioError(
                f"num_frames: {asked} is not a multiple of {factor} plus 1; "
                f"the two nearest legal counts are {below} and {below + factor}"
            )
        return asked


def check_call(source: Source, backend: str, names: Iterable[str]) -> None:
    """Refuse, by name, arguments of our call that a peer does not have."""
    if backend not in ("auto", "reference"):
        raise ReducioError(f"backend: {backend!r} asked for, but a peer runs through diffusers; leave it out")
    ours = inspect.signature(PeerPipeline.__call__).parameters
    check_own(source.peer, set(names) - set(ours))


# Arguments of a diffusers call that ours sets itself, or that change the shape of the result.
SET_HERE = (
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "num_videos_per_prompt",
)


def own_arguments(peer: Peer) -> list[str]:
    """Arguments of the diffusers pipeline's call that ours does not name."""
    ours = inspect.signature(PeerPipeline.__call__).parameters
    theirs = inspect.signature(diffusers_class(peer.pipelines[0]).__call__).parameters
    return [name for name in theirs if name not in ours and name not in SET_HERE]


def check_own(peer: Peer, names: Iterable[str]) -> None:
    """Raise ReducioError for a name that is not among `own_arguments`."""
    if names and (unknown := sorted(set(names) - set(known := own_arguments(peer)))):
        raise ReducioError(f"{unknown[0]}: not a word of the peer {peer.name}; known are {', '.join(known)}")


# ---- building and timing --------------------------------------------------------------------------------------------


@contextmanager
def _stages(pipeline: Any, denoiser: str, timings: dict[str, float]) -> Iterator[Callable[[], None]]:
    """Time a diffusers pipeline by our stages, from outside; yields a function to call at the end of each step.

    Encoders and decoder are timed around their calls. The loop lasts from the first call of the denoiser to the end
    of the last step, so it includes the scheduler and guidance.
    """
    device = pipeline._execution_device
    loop: list[float] = []

    def step_end() -> None:
        timings["dit.step"] = timings.get("dit.step", 0.0) + clock(device) - loop[-1]
        loop.append(clock(device))

    def around(call: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock(device)
            result = call(*args, **kwargs)
            timings[stage] = timings.get(stage, 0.0) + clock(device) - start
            return result

        return timed

    def start_loop(*_: Any) -> None:
        if not loop:
            loop.append(clock(device))

    with ExitStack() as undo:
        network = getattr(pipeline, denoiser)
        undo.callback(network.register_forward_pre_hook(start_loop).remove)
        for component, method, stage in (
            ("text_encoder", "forward", "text.encode"),
            ("image_encoder", "forward", "image.encode"),
            ("vae", "encode", "image.encode"),
            ("vae", "decode", "vae.decode"),
        ):
            module = getattr(pipeline, component, None)
            if module is not None:
                setattr(module, method, around(getattr(module, method), stage))
                undo.callback(delattr, module, method)  # what is left is the class's own
        yield step_end


def _step_end(
    callback: Callable[..., Any] | None,
    timed: Callable[[], None],
    raised: list[Exception],
    pipe: Any,
    step: int,
    timestep: Any,
    tensors: Any,
) -> dict[str, Tensor]:
    timed()
    try:
        return (callback(pipe, step, timestep, tensors) or {}) if callback is not None else {}
    except Exception as error:
        raised.append(error)
        raise
